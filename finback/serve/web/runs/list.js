// All runs under the folder.
import { html } from "../lib.js";
import { ago, clock, money } from "./format.js";
import { linkTo } from "./place.js";

const WORDS = { running: "Running", done: "Done", stopped: "Stopped" };

/** A state in a word and a colour. */
export const State = ({ state }) =>
  html`<span class=${`state ${state}`}>${state === "running" && html`<span class="dot" aria-hidden="true"></span>`}${WORDS[state] ?? state}</span>`;

export function List({ data }) {
  if (!data.runs.length) {
    return html`
      <div class="empty"><h1>No runs yet</h1>
        <p>Run folders under <code>${data.root}</code> will be here as soon as there is one. This makes the first:</p>
        <pre tabindex="0">finback run recipes/tiny.py</pre></div>`;
  }
  return html`
    <h1>Runs</h1>
    <p class="under">${data.runs.length} ${data.runs.length === 1 ? "run" : "runs"} in <code>${data.root}</code></p>
    <ul class="cards">${data.runs.map((run) => html`<${Card} key=${run.name} run=${run} />`)}</ul>`;
}

function Card({ run }) {
  const running = run.stages.find((s) => s.state === "running");
  return html`
    <li><a class="card" href=${linkTo({ run: run.name })}>
      <div class="line"><h2>${run.name}</h2><${State} state=${run.state} /></div>
      <div class="strip" role="img" aria-label=${`${run.stages.filter((s) => s.state === "done").length} of ${run.stages.length} stages done`}>
        ${run.stages.map((s) => html`<span key=${s.name} class=${s.state} title=${`${s.name} (${s.kind}): ${WORDS[s.state]}`}></span>`)}
      </div>
      ${running && html`<p class="now"><b>${running.name}</b> ${running.progress?.of ? `${Math.round((100 * running.progress.at) / running.progress.of)} %, ${running.progress.left === null ? "time left unknown" : `${clock(running.progress.left)} left`}` : `step ${running.progress?.step ?? "?"}`}</p>`}
      <dl class="facts">
        <div><dt>Recipe</dt><dd>${run.recipe}</dd></div><div><dt>Seed</dt><dd>${run.seed ?? "–"}</dd></div>
        <div><dt>Stages</dt><dd>${run.stages.length}</dd></div><div><dt>Time</dt><dd>${clock(run.seconds)}</dd></div>
        <div title=${run.basis}><dt>Cost (est.)</dt><dd>${money(run.money)}</dd></div><div><dt>Changed</dt><dd>${ago(run.changed)}</dd></div>
      </dl>
    </a></li>`;
}
