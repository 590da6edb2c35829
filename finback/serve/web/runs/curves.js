// The curves of one or more stages, of this run and of others.
import { askJson, query } from "../api.js";
import { Segments, useRemembered } from "../controls.js";
import { html, useEffect, useMemo, useRef, useState } from "../lib.js";
import { Chart } from "./chart.js";
import { series } from "./colours.js";
import { named } from "./format.js";
import { Heat } from "./heat.js";
import { go, stageId, stageOf } from "./place.js";

const ORDER = [
  "reward",
  "accuracy",
  "length",
  "reward_accuracy",
  "reward_form",
  "reward_language",
  "loss",
  "mtp_loss",
  "probe",
  "valid_loss",
  "thinks",
  "entropy",
  "kl",
  "gap_max",
  "gap_mean",
  "grad_norm",
  "lr",
  "tokens_per_second",
  "mfu",
  "memory",
  "max_violation",
];
const AXES = [
  ["step", "Steps"],
  ["tokens", "Tokens"],
  ["time", "Time"],
  ["cost", "Cost"],
];
const HIDDEN = ["tokens"];
const MOST = 8; // stages at a time
const rank = (key) => (ORDER.indexOf(key) < 0 ? ORDER.length : ORDER.indexOf(key));

/**
 * The stages that are shown, each at the index of its colour, "" at a free index. By default, the running stage, or else the
 * first one with a reward.
 */
function chosenOf(run, place) {
  const able = run.stages.filter((s) => s.has_metrics);
  if (place.stages)
    return place.stages
      .split(",")
      .map((text) => (!text || text.includes("|") ? text : stageId(run.name, text)))
      .slice(0, MOST);
  const first = able.find((s) => s.state === "running") ?? able.find((s) => s.keys.includes("reward")) ?? able[0];
  return first ? [stageId(run.name, first.name)] : [];
}

/** Adds a stage at the first free index; if none is free, it replaces the first. */
function withOne(chosen, id) {
  const free = chosen.indexOf("");
  if (free < 0 && chosen.length < MOST) return [...chosen, id];
  return chosen.with(Math.max(0, free), id);
}

/** Removes a stage; the others keep their indices, and so their colours. */
function without(chosen, id) {
  const left = chosen.map((c) => (c === id ? "" : c));
  while (left.at(-1) === "") left.pop();
  return left.length ? left : chosen;
}

const numberOf = (text) => (text === undefined || !Number.isFinite(Number(text)) ? null : Number(text));

export function Curves({ run, place }) {
  const [usual, setUsual] = useRemembered("axis", "step");
  const axis = AXES.some(([name]) => name === place.x) ? place.x : usual;
  const setAxis = (x) => (setUsual(x), go({ ...place, x, from: undefined, to: undefined }, true));
  const [weight, setWeight] = useRemembered("smooth", 0.6);
  const [log, setLog] = useRemembered("log", false);
  const [text, setText] = useState("");
  const bounds = [numberOf(place.from), numberOf(place.to)];
  const range = bounds.includes(null) ? [null, null] : bounds;
  const chosen = chosenOf(run, place);
  const choose = (stages) => go({ ...place, stages: stages.join(","), from: undefined, to: undefined }, true);
  const { lines, share, error } = useLines(chosen, { axis, weight, range, changed: run });
  const keys = useMemo(
    () => [...new Set(lines.map((l) => l.key))].sort((a, b) => rank(a) - rank(b) || (a < b ? -1 : 1)),
    [lines],
  );
  const zoom = (from, to) => go({ ...place, x: axis, from, to }, true);
  const words = text.trim().toLowerCase();
  const wanted = keys.filter((key) => `${key} ${named(key)}`.toLowerCase().includes(words));
  const able = run.stages.filter((s) => s.has_metrics);
  if (!able.length) return html`<p class="notice">No stage of this run has logged anything yet.</p>`;
  const foreign = chosen.filter((id) => id && stageOf(id)[0] !== run.name);
  const heat = chosen
    .map(stageOf)
    .filter(([r, s]) => r === run.name && able.find((a) => a.name === s)?.nested.includes("expert_load"));
  return html`
    <section class="controls" aria-label="What is shown">
      <div class="chips" role="group" aria-label="Stages">
        ${able.map((s) => html`<${Chip} key=${s.name} id=${stageId(run.name, s.name)} text=${foreign.length ? `${run.name} · ${s.name}` : s.name} chosen=${chosen} onChoose=${choose} />`)}
        ${foreign.map((id) => html`<${Chip} key=${id} id=${id} text=${stageOf(id).join(" · ")} chosen=${chosen} onChoose=${choose} />`)}
        <${Others} run=${run} chosen=${chosen} onChoose=${choose} />
      </div>
      <div class="knobs">
        <${Segments} label="Horizontal axis" value=${axis} onChange=${setAxis} options=${AXES} />
        <label class="smooth">Smoothing <input type="range" min="0" max="0.99" step="0.01" value=${weight} onInput=${(e) => setWeight(Number(e.target.value))} /><output>${weight.toFixed(2)}</output></label>
        <label class="check"><input type="checkbox" checked=${log} onChange=${(e) => setLog(e.target.checked)} />Log scale</label>
        ${keys.length > 1 && html`<input type="search" class="metric" aria-label="Find a metric" placeholder="Find a metric" value=${text} onInput=${(e) => setText(e.target.value)} />`}
        ${range[0] !== null && html`<button type="button" class="button small" onClick=${() => zoom(null, null)}>Show all</button>`}
      </div>
    </section>
    ${error && html`<p class="notice bad" role="alert">${error}</p>`}
    ${share < 1 && html`<p class="notice" role="status"><span class="dot" aria-hidden="true"></span>Reading: ${Math.floor(share * 100)} % of the file so far; until then the curves are in outline.</p>`}
    <div class="charts">
      ${wanted.map((key) => html`<${Chart} key=${key} title=${named(key)} axis=${axis} log=${log} range=${range} onZoom=${zoom} lines=${lines.filter((l) => l.key === key)} />`)}
    </div>
    ${heat.map(([r, s]) => html`<${Heat} key=${s} run=${r} stage=${s} changed=${run} />`)}
    <p class="small">Drag to zoom in, Shift and drag to move, double-click to show all. On the keyboard, arrow keys select a point, Shift and arrows move, + and − zoom, 0 shows all. Long curves are thinned to the lowest and the highest value of every section.</p>`;
}

function Chip({ id, text, chosen, onChoose }) {
  const at = chosen.indexOf(id);
  const flip = () => onChoose(at < 0 ? withOne(chosen, id) : without(chosen, id));
  return html`<button type="button" class="chip" aria-pressed=${String(at >= 0)} onClick=${flip}>${at >= 0 && html`<span class=${`mark ${series(at)}`} aria-hidden="true"></span>`}${text}</button>`;
}

/** Stages of other runs, to compare with. */
function Others({ run, chosen, onChoose }) {
  const [runs, setRuns] = useState(null);
  useEffect(
    () =>
      void askJson("/api/runs").then(
        (data) => setRuns(data.runs),
        () => setRuns([]),
      ),
    [run.name],
  );
  const add = (event) => {
    const id = event.target.value;
    event.target.value = "";
    if (id && !chosen.includes(id)) onChoose(withOne(chosen, id));
  };
  const others = (runs ?? []).filter((r) => r.name !== run.name && r.stages.some((s) => s.has_metrics));
  return html`
    <select class="others" aria-label="Compare with another run" onChange=${add} value="">
      <option value="">${runs && !others.length ? "No other run" : "Compare with…"}</option>
      ${others.map((r) => html`<optgroup key=${r.name} label=${r.name}>${r.stages.filter((s) => s.has_metrics).map((s) => html`<option key=${s.name} value=${stageId(r.name, s.name)}>${r.name} · ${s.name}</option>`)}</optgroup>`)}
    </select>`;
}

/** The lines of all chosen stages, fetched again when something that they depend on changes. */
function useLines(chosen, { axis, weight, range, changed }) {
  const [state, setState] = useState({ lines: [], share: 1, error: "" });
  const turn = useRef(0);
  const several = new Set(chosen.filter(Boolean).map((id) => stageOf(id)[0])).size > 1;
  const wanted = `${chosen.join()} ${axis} ${weight} ${range.join()}`;
  useEffect(() => {
    const mine = ++turn.current;
    let timer = 0;
    let soon = state.lines.length ? undefined : 1; // first what is available at once, then everything
    const look = async () => {
      try {
        const found = await Promise.all(
          chosen.flatMap((id, place) => (id ? [linesOf(id, place, several, { axis, weight, range, soon })] : [])),
        );
        soon = undefined;
        if (mine !== turn.current) return;
        const share = Math.min(1, ...found.map((f) => f.share));
        setState({ lines: found.flatMap((f) => f.lines), share, error: "" });
        if (share < 1) timer = setTimeout(look, 50);
      } catch (error) {
        if (mine === turn.current) setState((before) => ({ ...before, error: error.message }));
      }
    };
    timer = setTimeout(look, state.lines.length ? 80 : 0);
    return () => clearTimeout(timer);
  }, [wanted, changed]);
  return state;
}

async function linesOf(id, place, several, { axis, weight, range: [from, to], soon }) {
  const [run, stage] = stageOf(id);
  const asked = { run, stage, x: axis, smooth: weight, from, to, points: 900, soon };
  const found = await askJson(query("/api/series", asked));
  const label = several ? `${run} · ${stage}` : stage;
  return {
    share: found.share,
    lines: found.lines
      .filter((l) => !HIDDEN.includes(l.name) && l.n > 0)
      .map((l) => ({ ...l, key: l.name, id: `${id} ${l.name}`, label, place })),
  };
}
