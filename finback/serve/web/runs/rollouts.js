// Answers during training: every answer of a step with its reward, and one prompt across training.
import { askJson, query } from "../api.js";
import { Glyph, Icon } from "../controls.js";
import { html, useEffect, useState } from "../lib.js";
import { Follow } from "./follow.js";
import { go, linkTo } from "./place.js";
import { Record } from "./record.js";

/** The sources of answers in a run: [id, label] of each RL stage, of its watched prompts, and of each exam. */
export function sourcesOf(run) {
  return run.stages.flatMap((s) => [
    ...(s.has_samples ? [[s.name, `${s.name}, every step`]] : []),
    ...(s.watches ? [[`${s.name}/${s.watches}`, `${s.name}, watched prompts`]] : []),
    ...s.exams.map((exam) => [`${s.name}/${exam}`, `${s.name}, exam “${exam}”`]),
  ]);
}

export function Rollouts({ run, place }) {
  const sources = sourcesOf(run);
  const first = sources.find(([id]) => !id.includes("/")) ?? sources[0]; // RL before exams
  const source = sources.some(([id]) => id === place.source) ? place.source : first?.[0];
  const [stage, exam] = (source ?? "").split("/");
  const { data, error } = useAsked(
    source && !place.question && query("/api/rollouts", { run: run.name, stage, exam, step: place.step }),
    run,
  );
  if (!source) return html`<p class="notice">No stage of this run has kept answers: only RL and exams do.</p>`;
  if (place.question) return html`<${Follow} run=${run} place=${place} />`;
  const set = (change) => go({ ...place, source, ...change }, true);
  return html`
    <section class="controls" aria-label="What is shown">
      <label class="source">Answers of <select value=${source} onChange=${(e) => set({ source: e.target.value, step: undefined, at: undefined })}>${sources.map(([id, text]) => html`<option key=${id} value=${id}>${text}</option>`)}</select></label>
      ${data && data.steps.length > 1 && html`<${Steps} data=${data} onStep=${(step) => set({ step, at: undefined })} />`}
      <${Search} run=${run} stage=${stage} exam=${exam} place=${place} source=${source} />
    </section>
    ${error && html`<p class="notice bad" role="alert">${error.message}</p>`}
    ${data && !data.complete && html`<p class="notice" role="status"><span class="dot" aria-hidden="true"></span>Still reading the file; more steps follow.</p>`}
    ${data && html`<${Groups} data=${data} place=${{ ...place, source }} onAt=${(at) => set({ at })} />`}`;
}

/** The server's reply for a path: at once what it has read so far, then again until it has read everything. */
function useAsked(path, changed) {
  const [state, setState] = useState({});
  useEffect(() => {
    let closed = false;
    const look = (soon) =>
      askJson(path + soon).then(
        (data) => {
          if (closed) return;
          setState({ path, data });
          if (!data.complete) look("");
        },
        (error) => closed || setState({ path, error }),
      );
    if (path) look("&soon=1");
    return () => void (closed = true);
  }, [path, changed]);
  return state;
}

function Steps({ data, onStep }) {
  const at = Math.max(0, data.steps.indexOf(data.step));
  const to = (place) => onStep(data.steps[Math.max(0, Math.min(data.steps.length - 1, place))]);
  return html`
    <div class="steps">
      <${Icon} glyph="left" small label="Step before" disabled=${at === 0} onClick=${() => to(at - 1)} />
      <input type="range" aria-label="Step" min="0" max=${data.steps.length - 1} value=${at} aria-valuetext=${`step ${data.step}`} onInput=${(e) => to(Number(e.target.value))} />
      <${Icon} glyph="right" small label="Step after" disabled=${at === data.steps.length - 1} onClick=${() => to(at + 1)} />
      <output>Step ${data.step} of ${data.steps.at(-1)}</output>
    </div>`;
}

function Search({ run, stage, exam, place, source }) {
  const [text, setText] = useState("");
  const [found, setFound] = useState(null);
  useEffect(() => {
    if (!text.trim()) return void setFound(null);
    const timer = setTimeout(
      () =>
        askJson(query("/api/rollouts", { run: run.name, stage, exam, find: text.trim() })).then(
          (d) => setFound(d.questions),
          () => setFound([]),
        ),
      200,
    );
    return () => clearTimeout(timer);
  }, [text, source]);
  return html`
    <div class="finder">
      <input type="search" aria-label="Find a prompt" placeholder="Find a prompt" value=${text} onInput=${(e) => setText(e.target.value)} />
      ${found && html`<ul class="found">${found.map((q) => html`<li key=${q}><a href=${linkTo({ ...place, source, question: q })}>${q}</a></li>`)}${!found.length && html`<li class="small">No prompt contains this text.</li>`}</ul>`}
    </div>`;
}

function grouped(records) {
  const groups = new Map();
  for (const record of records) groups.set(record.question, [...(groups.get(record.question) ?? []), record]);
  return [...groups];
}

function Groups({ data, place, onAt }) {
  const groups = grouped(data.records);
  const at = Math.min(groups.length - 1, Number(place.at) || 0);
  if (!groups.length) return html`<p class="notice">No answers here.</p>`;
  const [question, records] = groups[at];
  return html`
    <div class="rollouts">
      <nav class="prompts" aria-label="Prompts">
        <ul>${groups.map(
          ([q, answers], i) => html`
          <li key=${q}><button type="button" aria-current=${i === at ? "true" : undefined} onClick=${() => onAt(i)}>
            <span class="q" dir="auto">${q}</span>${answers[0].correct !== null && html`<span class="right" title="right answers">${answers.filter((r) => r.correct).length}/${answers.length}</span>`}
          </button></li>`,
        )}</ul>
      </nav>
      <section class="answers" aria-label="Answers">
        <header><h2 dir="auto">${question}</h2>
          ${records[0].gold && html`<p class="small">Gold answer: <b>${records[0].gold}</b></p>`}
          <a class="button small" href=${linkTo({ ...place, question })}><${Glyph} name="chart" />Follow this prompt across training</a></header>
        ${records.map((record, i) => html`<${Record} key=${`${data.step} ${question} ${i}`} record=${record} />`)}
      </section>
    </div>`;
}
