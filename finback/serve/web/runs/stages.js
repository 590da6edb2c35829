// The stages of a run: how far, how long, how much, and what came out.
import { Glyph } from "../controls.js";
import { html, useState } from "../lib.js";
import { clock, money, percent, short, value } from "./format.js";
import { State } from "./list.js";
import { linkTo } from "./place.js";

const NOTHING = "–"; // a narrow page leaves it out

export function Stages({ run }) {
  if (!run.stages.length) return html`<p class="notice">No stage has begun.</p>`;
  return html`
    <div class="scroll" tabindex="0" role="region" aria-label="Stages">
      <table class="stages">
        <thead><tr><th scope="col">Stage</th><th scope="col">State</th><th scope="col">Result</th><th scope="col" class="n">Tokens</th><th scope="col" class="n">Time</th><th scope="col" class="n">Cost</th></tr></thead>
        <tbody>${run.stages.map((stage) => html`<${Row} key=${stage.name} run=${run} stage=${stage} />`)}</tbody>
      </table>
    </div>
    <p class="small">Time and tokens are from the ledger. Cost: ${run.basis}.</p>`;
}

function Row({ run, stage }) {
  const [open, setOpen] = useState(false);
  const tokens = stage.tokens_trained + stage.tokens_generated;
  const result = headline(stage);
  return html`
    <tr>
      <th scope="row"><button type="button" class="fold" aria-expanded=${String(open)} onClick=${() => setOpen(!open)}><${Glyph} name="right" />${stage.name}</button><span class="kind">${stage.kind}</span></th>
      <td data-label="State"><${State} state=${stage.state} />${stage.state !== "done" && html`<${Progress} progress=${stage.progress} state=${stage.state} />`}</td>
      <td class=${result === NOTHING ? "none" : ""} data-label="Result">${result}</td>
      <td class=${tokens ? "n" : "n none"} data-label="Tokens" title=${`${short(stage.tokens_trained)} trained on, ${short(stage.tokens_generated)} generated`}>${tokens ? short(tokens) : NOTHING}</td>
      <td class="n" data-label="Time">${clock(stage.seconds)}<${Plan} text=${stage.plan && clock(stage.plan.seconds)} /></td>
      <td class="n" data-label="Cost">${money(stage.money)}<${Plan} text=${stage.plan && money(stage.plan.dollars)} /></td>
    </tr>
    ${open && html`<tr class="details"><td colspan="6"><${Details} run=${run} stage=${stage} /></td></tr>`}`;
}

/** Below what was spent what had been planned, where somebody planned. */
const Plan = ({ text }) => text && html`<div class="small">planned ${text}</div>`;

/** The bar of a stage that is not finished. */
function Progress({ progress, state }) {
  if (!progress) return null;
  if (!progress.of) return html`<div class="small">step ${progress.step}, end unknown</div>`;
  const share = Math.min(1, progress.at / progress.of);
  const left =
    state !== "running"
      ? ""
      : progress.left === null
        ? ", time left unknown"
        : `, ${clock(progress.left)} left at most`;
  return html`
    <progress max="1" value=${share} aria-label="Done"></progress>
    <div class="small">${short(progress.at)} of ${short(progress.of)} ${progress.unit}${left}</div>`;
}

/** The one thing that a stage's results say first. */
function headline({ results }) {
  if (!results) return NOTHING;
  if (Array.isArray(results.evaluations)) {
    return results.evaluations.map(
      (e, i) =>
        html`<div key=${i}>${e.exam} <b>${percent(e.accuracy)}</b>${e.interval && html` <span class="small">${percent(e.interval[0])} to ${percent(e.interval[1])}</span>`}</div>`,
    );
  }
  const numbers = Object.entries(results)
    .filter(([, v]) => typeof v === "number")
    .slice(0, 2);
  if (!numbers.length) return NOTHING;
  return numbers.map(
    ([name, n]) =>
      html`<div key=${name}>${name.replaceAll("_", " ")} <b>${Number.isInteger(n) ? short(n) : value(n)}</b></div>`,
  );
}

function Details({ run, stage }) {
  return html`
    <div class="links">
      ${stage.has_metrics && html`<a class="button small" href=${linkTo({ run: run.name, view: "curves", stages: stage.name })}>Curves</a>`}
      ${stage.has_samples && html`<a class="button small" href=${linkTo({ run: run.name, view: "rollouts", source: stage.name })}>Rollouts</a>`}
      ${stage.exams.map((exam) => html`<a key=${exam} class="button small" href=${linkTo({ run: run.name, view: "rollouts", source: `${stage.name}/${exam}` })}>Answers: ${exam}</a>`)}
    </div>
    ${stage.plan && html`<${Against} stage=${stage} />`}
    <div class="json">
      <${Json} title="Knobs" data=${stage.config} />
      ${stage.results && html`<${Json} title="Results" data=${stage.results} />`}
    </div>`;
}

/** The plan against the ledger: what was foreseen, what it took, and how many times as much that is. */
function Against({ stage }) {
  const rows = [
    ["Time", clock, stage.plan.seconds, stage.seconds],
    ["Cost", money, stage.plan.dollars, stage.money],
    ["FLOP", short, stage.plan.flops, stage.flops],
  ].filter(([, , planned]) => Number.isFinite(planned));
  return html`
    <table class="against">
      <thead><tr><th scope="col">Plan against ledger</th><th scope="col" class="n">Planned</th><th scope="col" class="n">Spent</th><th scope="col" class="n">Spent / planned</th></tr></thead>
      <tbody>${rows.map(
        ([name, write, planned, spent]) => html`
        <tr key=${name}><th scope="row">${name}</th><td class="n">${write(planned)}</td><td class="n">${write(spent)}</td><td class="n">${planned > 0 ? `${(spent / planned).toFixed(2)} ×` : "–"}</td></tr>`,
      )}</tbody>
    </table>`;
}

const Json = ({ title, data }) =>
  html`<section><h3>${title}</h3><pre tabindex="0" aria-label=${title}>${JSON.stringify(data, null, 2)}</pre></section>`;
