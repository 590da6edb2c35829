// Expert load: one map per layer, steps from left to right, one expert per row. Pointer and arrow keys select a field.
import { askJson, query } from "../api.js";
import { html, useEffect, useRef, useState } from "../lib.js";
import { colour } from "./colours.js";
import { percent } from "./format.js";

const ROW = 16; // height of an expert's row in pixels

export function Heat({ run, stage, changed }) {
  const [data, setData] = useState(null);
  useEffect(
    () => void askJson(query("/api/heat", { run, stage, key: "expert_load" })).then(setData, () => setData(null)),
    [run, stage, changed],
  );
  if (!data?.values.length) return null;
  const layers = data.values[0].length;
  return html`
    <section class="heat" aria-label=${`Expert load of ${stage}`}>
      <h2>Expert load, ${stage}</h2>
      <p class="small">Share of each layer’s tokens that an expert gets. Pale is an even load, blue is less, orange is more.</p>
      <div class="charts">${Array.from({ length: layers }, (_, layer) => html`<${Layer} key=${layer} layer=${layer} data=${data} />`)}</div>
    </section>`;
}

/** -1 for an expert that gets nothing, 0 for an even share, 1 for twice that or more. */
const excess = (share, experts) => (share === null ? null : Math.max(-1, Math.min(1, share * experts - 1)));

function Layer({ layer, data }) {
  const canvas = useRef();
  const [at, setAt] = useState(null);
  const columns = data.values.map((matrix) => matrix[layer] ?? []);
  const experts = columns[0].length;
  useEffect(() => {
    const draw = () => paint(canvas.current, columns, experts);
    draw();
    addEventListener("themechange", draw);
    return () => removeEventListener("themechange", draw);
  }, [data]);
  const over = (event) => {
    const { left, top, width, height } = canvas.current.getBoundingClientRect();
    const step = Math.floor(((event.clientX - left) / width) * columns.length);
    const expert = Math.floor(((event.clientY - top) / height) * experts);
    if (columns[step]?.[expert] !== undefined) setAt({ step, expert });
  };
  const press = (event) => {
    const by = { ArrowLeft: [-1, 0], ArrowRight: [1, 0], ArrowUp: [0, -1], ArrowDown: [0, 1] }[event.key];
    if (!by) return;
    event.preventDefault();
    const from = at ?? { step: columns.length - 1 - by[0], expert: -by[1] };
    const step = Math.max(0, Math.min(columns.length - 1, from.step + by[0]));
    setAt({ step, expert: Math.max(0, Math.min(experts - 1, from.expert + by[1])) });
  };
  const last = columns.at(-1);
  const text = `Layer ${layer + 1}: at step ${data.steps.at(-1)} the busiest expert gets ${percent(Math.max(...last))} and the least busy one ${percent(Math.min(...last))}; even would be ${percent(1 / experts)}`;
  return html`
    <section class="chart">
      <header><h3>Layer with experts ${layer + 1}</h3><span class="values" aria-live="polite">${at && `step ${data.steps[at.step]}   expert ${at.expert + 1}   ${percent(columns[at.step][at.expert] ?? 0)}`}</span></header>
      <canvas ref=${canvas} tabindex="0" role="application" aria-roledescription="map" aria-label=${`${text}; arrow keys select a field`} onKeyDown=${press} onMouseMove=${over} onMouseLeave=${() => setAt(null)}></canvas>
      <p class="small">Steps ${data.steps[0]} to ${data.steps.at(-1)}; ${experts} experts from top to bottom.</p>
    </section>`;
}

function paint(canvas, columns, experts) {
  canvas.width = columns.length;
  canvas.height = experts;
  canvas.style.height = `${Math.min(320, Math.max(96, experts * ROW))}px`;
  const pen = canvas.getContext("2d");
  const [paper, less, more] = ["paper-3", "series-1", "series-2"].map(colour);
  columns.forEach((column, x) =>
    column.forEach((share, y) => {
      const strength = excess(share, experts);
      pen.globalAlpha = 1;
      pen.fillStyle = paper;
      pen.fillRect(x, y, 1, 1);
      if (strength === null) return;
      pen.globalAlpha = Math.abs(strength);
      pen.fillStyle = strength < 0 ? less : more;
      pen.fillRect(x, y, 1, 1);
    }),
  );
}
