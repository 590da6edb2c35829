// The stages of a run: progress, time, cost and results.
import { Glyph } from "../controls.js";
import { html, useState } from "../lib.js";
import { clock, cost, money, named, percent, short, value } from "./format.js";
import { State } from "./list.js";
import { linkTo, stageId } from "./place.js";

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
  const tokens = tokensOf(stage);
  const result = headline(stage);
  return html`
    <tr>
      <th scope="row"><button type="button" class="fold" aria-expanded=${String(open)} onClick=${() => setOpen(!open)}><${Glyph} name="right" />${stage.name}</button><span class="kind">${stage.kind}</span></th>
      <td data-label="State"><${State} state=${stage.state} />${stage.state !== "done" && html`<${Progress} progress=${stage.progress} state=${stage.state} />`}</td>
      <td class=${result === NOTHING ? "none" : ""} data-label="Result">${result}</td>
      <td class=${tokens || tokensOf(stage.plan) ? "n" : "n none"} data-label="Tokens" title=${`${short(stage.tokens_trained)} trained on, ${short(stage.tokens_generated)} generated`}>${tokens ? short(tokens) : NOTHING}<${Plan} amount=${tokensOf(stage.plan)} write=${(n) => `≤ ${short(n)}`} /></td>
      <td class="n" data-label="Time">${clock(stage.seconds)}<${Plan} amount=${stage.plan?.seconds} write=${clock} /></td>
      <td class="n" data-label="Cost">${cost(stage)}<${Plan} amount=${stage.plan?.dollars} write=${money} /></td>
    </tr>
    ${open && html`<tr class="details"><td colspan="6"><${Details} run=${run} stage=${stage} /></td></tr>`}`;
}

const tokensOf = (counts) => (counts?.tokens_trained ?? 0) + (counts?.tokens_generated ?? 0);

/** The planned amount, shown below the actual one if there is a plan. */
const Plan = ({ amount, write }) => amount > 0 && html`<div class="small">planned ${write(amount)}</div>`;

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

/** The results of a stage: accuracies, the probe, bits per byte; else the last values of its curves. */
function headline({ results, last }) {
  const rows = [];
  for (const e of listed(results?.evaluations))
    rows.push([e.exam, percent(e.accuracy), e.interval && `${percent(e.interval[0])} to ${percent(e.interval[1])}`]);
  if (typeof results?.probe_reached === "boolean") rows.push(["probe", percent(results.probe_best)]);
  for (const [source, bits] of Object.entries(results?.bits_per_byte ?? {}))
    if (Number.isFinite(bits)) rows.push([`bits per byte, ${source}`, value(bits)]);
  if (!rows.length) for (const [name, n] of Object.entries(last ?? {})) rows.push([`${named(name).toLowerCase()}, last`, value(n)]);
  if (!rows.length) return NOTHING;
  return rows.map(
    ([name, found, interval], i) => html`<div key=${i}>${name} <b>${found}</b>${interval && html` <span class="small">${interval}</span>`}</div>`,
  );
}

const listed = (found) => (Array.isArray(found) ? found.filter((e) => Number.isFinite(e?.accuracy)) : []);

function Details({ run, stage }) {
  return html`
    <div class="links">
      ${stage.has_metrics && html`<a class="button small" href=${linkTo({ run: run.name, view: "curves", stages: stageId(run.name, stage.name) })}>Curves</a>`}
      ${stage.has_samples && html`<a class="button small" href=${linkTo({ run: run.name, view: "rollouts", source: stage.name })}>Rollouts</a>`}
      ${stage.watches && html`<a class="button small" href=${linkTo({ run: run.name, view: "rollouts", source: `${stage.name}/${stage.watches}` })}>Watched prompts</a>`}
      ${stage.exams.map((exam) => html`<a key=${exam} class="button small" href=${linkTo({ run: run.name, view: "rollouts", source: `${stage.name}/${exam}` })}>Answers: ${exam}</a>`)}
    </div>
    ${stage.plan && html`<${Against} stage=${stage} />`}
    <div class="json">
      <${Json} title="Knobs" data=${stage.config} />
      ${stage.results && html`<${Json} title="Results" data=${stage.results} />`}
    </div>`;
}

/** Plan and actual: planned and spent amounts, and their ratio. */
function Against({ stage }) {
  const rows = [
    ["Tokens, at most", short, tokensOf(stage.plan), tokensOf(stage)],
    ["Time", clock, stage.plan.seconds, stage.seconds],
    ["Cost", money, stage.plan.dollars, stage.money],
    ["FLOP", short, stage.plan.flops, stage.flops],
  ].filter(([, , planned]) => planned > 0);
  if (!rows.length) return null;
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
  html`<section><h2>${title}</h2><pre tabindex="0" aria-label=${title}>${JSON.stringify(data, null, 2)}</pre></section>`;
