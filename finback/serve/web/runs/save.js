// A chart as a file: its values as CSV, or the picture with its title and the names of its curves.
import { colour, series } from "./colours.js";

const HEAD = 44; // pixels above the picture, for title and names
// a spreadsheet would read a cell with such a beginning as a formula
const quoted = (text) => `"${String(text).replace(/^(?=[=+\-@])/, "'").replaceAll('"', '""')}"`;

/** A table [x, y, y, ...] as CSV; nothing where a curve has no value. */
export function asCsv(names, table) {
  const rows = table[0].map((_, row) => table.map((column) => column[row] ?? "").join(","));
  return [names.map(quoted).join(","), ...rows, ""].join("\n");
}

/** A plot's canvas as a PNG, with the title and the names of the curves above it. */
export function asPng(plot, title, lines) {
  const { width, height } = plot.ctx.canvas;
  const scale = devicePixelRatio;
  const canvas = Object.assign(document.createElement("canvas"), { width, height: height + HEAD * scale });
  const pen = canvas.getContext("2d");
  pen.fillStyle = colour("paper");
  pen.fillRect(0, 0, canvas.width, canvas.height);
  pen.drawImage(plot.ctx.canvas, 0, HEAD * scale);
  pen.scale(scale, scale);
  const write = (text, x, y, name) => {
    pen.fillStyle = colour(name);
    pen.fillText(text, x, y);
    return x + pen.measureText(text).width + 14;
  };
  pen.font = "600 14px system-ui, sans-serif";
  write(title, 12, 18, "ink");
  pen.font = "12px system-ui, sans-serif";
  lines.reduce((x, line) => write(line.label, x, 36, series(line.place)), 12);
  return new Promise((done) => canvas.toBlob(done));
}
