// All runs under the folder.
import { useRemembered } from "../controls.js";
import { html, useState } from "../lib.js";
import { ago, clock, cost } from "./format.js";
import { linkTo } from "./place.js";

const WORDS = { running: "Running", done: "Done", stopped: "Stopped", torn: "Torn" };

const ORDERS = {
  changed: ["Changed last", (a, b) => b.changed - a.changed],
  name: ["Name", (a, b) => a.name.localeCompare(b.name, "en", { numeric: true })],
  seconds: ["Time", (a, b) => b.seconds - a.seconds],
  money: ["Cost", (a, b) => b.money - a.money],
};

/** A state in a word and a colour. */
export const State = ({ state }) =>
  html`<span class=${`state ${state}`}>${state === "running" && html`<span class="dot" aria-hidden="true"></span>`}${WORDS[state] ?? state}</span>`;

export function List({ data }) {
  const [text, setText] = useState("");
  const [order, setOrder] = useRemembered("order", "changed");
  if (!data.runs.length) {
    return html`
      <div class="empty"><h1>No runs yet</h1>
        <p>Run folders under <code>${data.root}</code> appear here. This command makes the first one:</p>
        <pre tabindex="0">finback run recipes/tiny.py</pre></div>`;
  }
  const words = text.trim().toLowerCase();
  const shown = data.runs.filter((run) => `${run.name} ${run.recipe} ${run.state}`.toLowerCase().includes(words));
  return html`
    <h1>Runs</h1>
    <p class="under">${data.runs.length} ${data.runs.length === 1 ? "run" : "runs"} in <code>${data.root}</code></p>
    <div class="knobs finding">
      <input type="search" aria-label="Find a run" placeholder="Find by name, recipe or state" value=${text} onInput=${(e) => setText(e.target.value)} />
      <label>Order <select value=${order} onChange=${(e) => setOrder(e.target.value)}>${Object.entries(ORDERS).map(([name, [label]]) => html`<option key=${name} value=${name}>${label}</option>`)}</select></label>
    </div>
    ${!shown.length && html`<p class="notice">No run contains this text.</p>`}
    <ul class="cards">${shown.sort((ORDERS[order] ?? ORDERS.changed)[1]).map((run) => html`<${Card} key=${run.name} run=${run} />`)}</ul>`;
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
        <div title=${run.basis}><dt>Cost (est.)</dt><dd>${cost(run)}</dd></div><div><dt>Changed</dt><dd>${ago(run.changed)}</dd></div>
      </dl>
    </a></li>`;
}
