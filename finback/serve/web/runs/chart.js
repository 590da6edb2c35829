// One metric as curves. Dragging zooms in, Shift and dragging moves, a double click shows all again; keys do the same.
import { download } from "../files.js";
import { html, render, useEffect, useLayoutEffect, useRef } from "../lib.js";
import uPlot from "../vendor/uplot.js";
import { colour, faint, series } from "./colours.js";
import { clock, money, short, value } from "./format.js";
import { asCsv, asPng } from "./save.js";

const HEIGHT = 200;
const TICKS = { step: short, tokens: short, time: clock, cost: money };

/** Curves with different x values as one table, as uPlot needs it: [x, y, y, ...]. */
export function joined(lines) {
  const tables = lines.flatMap((line) =>
    line.smooth
      ? [
          [line.x, line.y],
          [line.x, line.smooth],
        ]
      : [[line.x, line.y]],
  );
  return tables.length
    ? uPlot.join(
        tables.map(([x, y]) => distinct(x, y)),
        tables.map(() => []),
      )
    : [[]];
}

/** A curve without repeated x values: of several values at one x, the last. */
function distinct(x, y) {
  const places = [];
  const values = [];
  for (let i = 0; i < x.length; i++) {
    if (x[i] === null) continue;
    if (places.at(-1) === x[i]) values[values.length - 1] = y[i];
    else (places.push(x[i]), values.push(y[i]));
  }
  return [places, values];
}

function options({ lines, axis, log, width, onZoom, onMove }) {
  const grid = { stroke: colour("line"), width: 1 };
  const ink = { stroke: colour("ink-3"), font: "12px system-ui, sans-serif", grid, ticks: { show: false } };
  const shown = lines.flatMap((line) => {
    const css = colour(series(line.place));
    const base = { label: line.label, place: line.place, spanGaps: true, points: { show: line.x.length < 3 } };
    const raw = {
      ...base,
      stroke: line.smooth ? faint(css, 0.28) : css,
      width: line.smooth ? 1 : 1.6,
      isRaw: Boolean(line.smooth),
    };
    return line.smooth ? [raw, { ...base, stroke: css, width: 1.8 }] : [raw];
  });
  return {
    width,
    height: HEIGHT,
    legend: { show: false },
    padding: [8, 12, 0, 0],
    scales: { x: { time: false }, y: log ? { distr: 3 } : { range: padded } },
    axes: [
      { ...ink, values: (_, ticks) => ticks.map(TICKS[axis]), space: 70, size: 32 },
      { ...ink, values: (_, ticks) => ticks.map((t) => (t === null ? "" : value(t))), size: 62 },
    ],
    series: [{}, ...shown],
    cursor: {
      sync: { key: `finback-${axis}`, setSeries: false },
      drag: { x: true, y: false, setScale: false },
      points: { size: 6 },
      bind: { dblclick: () => () => (onZoom(null, null), null) },
    },
    hooks: {
      setSelect: [
        (plot) => {
          const { left, width: wide } = plot.select;
          if (wide > 4) onZoom(plot.posToVal(left, "x"), plot.posToVal(left + wide, "x"));
          plot.setSelect({ left: 0, width: 0, top: 0, height: 0 }, false);
        },
      ],
      setCursor: [
        ({ cursor: { idx }, data }) => onMove(idx === null ? null : data.map((column) => valueAt(column, idx))),
      ],
    },
  };
}

/** A curve's value at a row, or the one before if only other curves have a value there; none before its start or after its end. */
function valueAt(column, row) {
  if (isThere(column[row]) || !column.slice(row).some(isThere)) return column[row];
  return column.slice(0, row).findLast(isThere);
}

const isThere = (value) => value !== null && value !== undefined;

function padded(_, low, high) {
  if (low === null) return [0, 1];
  const size = Math.max(Math.abs(low), Math.abs(high));
  const isFlat = high - low <= size * 1e-9; // the rounding errors of a constant would get endless ticks
  const room = ((isFlat ? size : high - low) || 1) * 0.06;
  return [low - room, high + room];
}

/** Shift and dragging moves the visible range; missing data are fetched when the pointer is released. */
function pan(plot, onZoom) {
  plot.over.addEventListener(
    "mousedown",
    (event) => {
      if (!event.shiftKey) return;
      event.stopImmediatePropagation();
      const { min, max } = plot.scales.x;
      const each = ((max - min) / plot.bbox.width) * devicePixelRatio;
      let by = 0;
      const move = (e) => {
        by = (event.clientX - e.clientX) * each;
        plot.setScale("x", { min: min + by, max: max + by });
      };
      const end = () => {
        removeEventListener("mousemove", move);
        if (by) onZoom(min + by, max + by);
      };
      addEventListener("mousemove", move);
      addEventListener("mouseup", end, { once: true });
    },
    true,
  );
}

const WALK = { ArrowLeft: -1, ArrowRight: 1, PageUp: -0.1, PageDown: 0.1, Home: -Infinity, End: Infinity }; // rows, or a share of all
const KEYS = "arrow keys select a point, Shift and arrows move, plus and minus zoom, 0 shows all";

/** The row that a key selects, starting from the one under the cursor; undefined for other keys. */
function walked(plot, key) {
  const by = WALK[key];
  if (by === undefined) return undefined;
  const x = plot.data[0];
  const { min, max } = plot.scales.x;
  const first = x.findIndex((at) => at >= min);
  const last = x.findLastIndex((at) => at <= max);
  const now = plot.cursor.idx ?? (by > 0 ? first - 1 : last + 1);
  const step = Number.isInteger(by) || !Number.isFinite(by) ? by : Math.sign(by) * Math.ceil(Math.abs(by) * (last - first));
  return Math.max(first, Math.min(last, now + step));
}

/** The x range that a key shows, around the cursor; undefined for other keys, [null, null] for all. */
function stretch(plot, { key, shiftKey }) {
  const { min, max } = plot.scales.x;
  const x = plot.data[0];
  const wide = max - min;
  const moved = shiftKey && { ArrowLeft: -0.25, ArrowRight: 0.25 }[key];
  if (moved) return [min + moved * wide, max + moved * wide];
  const half = { "+": wide / 4, "=": wide / 4, "-": wide, _: wide }[key];
  if (key === "0" || 2 * half >= x.at(-1) - x[0]) return [null, null];
  const middle = x[plot.cursor.idx] ?? (min + max) / 2;
  return half ? [middle - half, middle + half] : undefined;
}

export function Chart({ title, lines, axis, log, range, onZoom }) {
  const box = useRef();
  const values = useRef();
  const plot = useRef();
  const usable = log ? lines.map(positive) : lines;
  const shape = `${axis} ${log} ${lines.map((l) => `${l.id}${Boolean(l.smooth)}${l.x.length < 3}`).join()}`;
  const move = (row) => render(row === null ? "" : html`<${At} axis=${axis} row=${row} curves=${plot.current?.series ?? []} />`, values.current);
  const press = (event) => {
    if (event.ctrlKey || event.metaKey || event.altKey || !usable.some((line) => line.y.length)) return;
    const shown = stretch(plot.current, event);
    const row = shown ? undefined : walked(plot.current, event.key);
    if (shown) onZoom(...shown);
    else if (row === undefined) return;
    else plot.current.setCursor({ left: plot.current.valToPos(plot.current.data[0][row], "x"), top: HEIGHT / 2 });
    event.preventDefault();
  };
  const saveCsv = () => {
    const raw = lines.map((line) => ({ ...line, smooth: undefined }));
    download(`${title}.csv`, asCsv([axis, ...lines.map((l) => l.label)], joined(raw)), "text/csv");
  };
  const savePng = async () => download(`${title}.png`, await asPng(plot.current, title, lines));
  useLayoutEffect(() => {
    const draw = () => {
      plot.current?.destroy();
      plot.current = new uPlot(
        options({ lines: usable, axis, log, width: box.current.clientWidth, onZoom, onMove: move }),
        joined(usable),
        box.current,
      );
      pan(plot.current, onZoom);
      if (range[0] !== null) plot.current.setScale("x", { min: range[0], max: range[1] });
    };
    draw();
    const sized = new ResizeObserver(() => plot.current.setSize({ width: box.current.clientWidth, height: HEIGHT }));
    sized.observe(box.current);
    addEventListener("themechange", draw);
    return () => (
      sized.disconnect(),
      removeEventListener("themechange", draw),
      plot.current.destroy(),
      (plot.current = undefined)
    );
  }, [shape]);
  useEffect(() => {
    plot.current.setData(joined(usable), range[0] === null);
    if (range[0] !== null) plot.current.setScale("x", { min: range[0], max: range[1] });
  }, [lines, range[0], range[1]]);
  return html`
    <section class="chart" aria-label=${title}>
      <header><h2>${title}</h2><span class="values" ref=${values} aria-live="polite"></span>
        <span class="saves"><button type="button" class="button small" onClick=${saveCsv} aria-label=${`${title} as CSV`}>CSV</button><button type="button" class="button small" onClick=${savePng} aria-label=${`${title} as PNG`}>PNG</button></span></header>
      <div ref=${box} class="plot" tabindex="0" role="application" aria-roledescription="chart" aria-label=${`${summary(title, lines)}; ${KEYS}`} onKeyDown=${press}></div>
    </section>`;
}

/** The values under the pointer, each with the name and the colour of its curve. */
function At({ axis, row, curves }) {
  const found = curves.map((s, i) => [s, row[i]]).filter(([s, v], i) => i && !s.isRaw && isThere(v));
  return html`<span>${axis} ${TICKS[axis](row[0])}</span>${found.map(
    ([s, v], i) => html`<span key=${i}><span class=${`mark ${series(s.place)}`} aria-hidden="true"></span>${found.length > 1 && `${s.label} `}${value(v)}</span>`,
  )}`;
}

/** Removes values that a log scale cannot show: those not above 0. */
function positive(line) {
  const cut = (ys) => ys?.map((y) => (y > 0 ? y : null));
  return { ...line, y: cut(line.y), smooth: cut(line.smooth) };
}

function summary(title, lines) {
  const ends = lines
    .filter((l) => l.y.length)
    .map((l) => `${l.label} from ${value(l.y[0])} to ${value((l.smooth ?? l.y).at(-1))}`);
  return `${title}: ${ends.join("; ") || "nothing logged"}`;
}
