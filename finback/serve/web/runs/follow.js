// One prompt across training: the answers of each stage's model, with their changes marked word by word.
import { askJson, query } from "../api.js";
import { html, useEffect, useState } from "../lib.js";
import { go, linkTo } from "./place.js";
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
  const back = { ...place, question: undefined, since: undefined };
  const stops = (data?.said ?? []).flatMap(stopsOf);
  return html`
    <p class="crumbs"><a href=${linkTo(back)}>Back to the answers</a></p>
    <section class="follow" aria-label="One prompt across training">
      <h2 dir="auto">${question}</h2>
      ${error && html`<p class="notice bad" role="alert">${error}</p>`}
      ${data && !stops.length && html`<p class="notice">No model was asked this.</p>`}
      ${
        stops.length > 1 &&
        html`
        <label class="source">Mark what has changed since <select value=${place.since ?? ""} onChange=${(e) => go({ ...place, since: e.target.value }, true)}>
          <option value="">nothing</option><option value="before">the step before</option>
          ${stops.map((stop) => html`<option key=${stop.id} value=${stop.id}>${stop.name}, ${stop.at}</option>`)}
        </select></label>`
      }
      <ol>${stops.map((stop, i) => html`<${Stop} key=${stop.id} stop=${stop} since=${sinceOf(stops, i, place.since)} />`)}</ol>
    </section>`;
}

/** The steps at which one stage's model was asked, each with its answers; `id` names one in an address. */
function stopsOf({ stage, source, exam, model, records }) {
  const steps = new Map();
  for (const record of records) steps.set(record.step, [...(steps.get(record.step) ?? []), record]);
  return [...steps]
    .sort(([a], [b]) => a - b)
    .map(([step, answers]) => ({
      id: [stage, source, step].map(encodeURIComponent).join("|"),
      name: exam ? model : stage,
      at: exam ? `exam “${exam}”` : `step ${step}${source ? ", watched" : ""}`,
      records: answers,
    }));
}

/** The stop that stop `i` is compared with. */
const sinceOf = (stops, i, since) => (since === "before" ? stops[i - 1] : stops.find((stop) => stop.id === since && stop !== stops[i]));

function Stop({ stop, since }) {
  const [all, setAll] = useState(false);
  const { records } = stop;
  const right = records.filter((r) => r.correct).length;
  const shown = all ? records : records.slice(0, SHOWN);
  return html`
    <li class="stop">
      <header><h3>${stop.name}</h3>
        <span class="small">${stop.at}${records.length > 1 && records[0].correct !== null ? `, ${right} of ${records.length} right` : ""}${since && `; changes since ${since.name}, ${since.at}`}</span></header>
      ${shown.map((record, i) => html`<${Record} key=${i} record=${record} against=${since?.records[i] ?? since?.records[0]} />`)}
      ${records.length > SHOWN && html`<button type="button" class="button small" onClick=${() => setAll(!all)}>${all ? "Fewer" : `All ${records.length} answers`}</button>`}
    </li>`;
}
