// One prompt across training: what each model answered, stage after stage, so that one sees the reasoning change.
import { askJson, query } from "../api.js";
import { html, useEffect, useState } from "../lib.js";
import { linkTo } from "./place.js";
import { Record } from "./record.js";

const SHOWN = 2; // answers of one step that are shown at first

export function Follow({ run, place }) {
  const [data, setData] = useState(null);
  const [error, setError] = useState("");
  const { question } = place;
  useEffect(
    () =>
      void askJson(query("/api/follow", { run: run.name, question })).then(
        (d) => (setData(d), setError("")),
        (e) => setError(e.message),
      ),
    [question, run],
  );
  const back = { ...place, question: undefined };
  return html`
    <p class="crumbs"><a href=${linkTo(back)}>Back to the answers</a></p>
    <section class="follow" aria-label="One prompt across training">
      <h2 dir="auto">${question}</h2>
      ${error && html`<p class="notice bad" role="alert">${error}</p>`}
      ${data && !data.said.length && html`<p class="notice">Nobody was asked this.</p>`}
      ${data && html`<ol>${data.said.flatMap((answers, i) => bySteps(answers).map(([step, records]) => html`<${Stop} key=${`${i} ${step}`} answers=${answers} step=${step} records=${records} />`))}</ol>`}
    </section>`;
}

function bySteps({ records }) {
  const steps = new Map();
  for (const record of records) steps.set(record.step, [...(steps.get(record.step) ?? []), record]);
  return [...steps].sort(([a], [b]) => a - b);
}

function Stop({ answers, step, records }) {
  const [all, setAll] = useState(false);
  const right = records.filter((r) => r.correct).length;
  const shown = all ? records : records.slice(0, SHOWN);
  return html`
    <li class="stop">
      <header><h3>${answers.exam ? answers.model : answers.stage}</h3>
        <span class="small">${answers.exam ? `exam “${answers.exam}”` : `step ${step}`}${records.length > 1 && records[0].correct !== null ? `, ${right} of ${records.length} right` : ""}</span></header>
      ${shown.map((record, i) => html`<${Record} key=${i} record=${record} />`)}
      ${records.length > SHOWN && html`<button type="button" class="button small" onClick=${() => setAll(!all)}>${all ? "Fewer" : `All ${records.length} answers`}</button>`}
    </li>`;
}
