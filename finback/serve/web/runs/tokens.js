// How training changed each token of an answer: its probability before and after, and the experts it was routed to.
import { html } from "../lib.js";
import { Pieces, percent } from "../pieces.js";
import { value } from "./format.js";

const CHANGES = [0.01, 0.05, 0.2]; // changes of a probability, each marked more strongly than the one before

/** A token's class: up3 where training made it much likelier, down3 for the opposite. */
function change(before, after) {
  const by = Math.exp(after) - Math.exp(before);
  const size = CHANGES.filter((p) => Math.abs(by) >= p).length;
  return size ? `${by > 0 ? "up" : "down"}${size}` : "";
}

const signed = (n, text) => `${n > 0 ? "+" : n < 0 ? "−" : "±"}${text(Math.abs(n))}`;
const points = (before, after) => signed((Math.exp(after) - Math.exp(before)) * 100, (n) => `${n.toFixed(1)} points`);

export function Tokens({ record: { detail, advantage } }) {
  const { pieces, before, after, layers, experts } = detail;
  const sent = (i) => layers.map((layer, at) => `layer ${layer + 1}: ${(experts[i]?.[at] ?? []).map((id) => id + 1).join(", ") || "–"}`);
  const isLearnt = advantage !== null;
  const then = isLearnt ? "after the step" : "at the next look";
  return html`
    <${Pieces} label="The answer by tokens" texts=${pieces} styles=${pieces.map((_, i) => (after ? change(before[i], after[i]) : ""))}
      hint=${after ? `Green tokens are likelier ${then}, red ones less likely. Point at a token, or use the arrow keys.` : "Point at a token, or use the arrow keys, to see how likely it is."}
      detail=${(i) => html`
        <span>${percent(before[i])}${after && ` → ${percent(after[i])} ${then} (${points(before[i], after[i])})`}</span>
        ${isLearnt && html`<span>advantage ${signed(advantage, value)}</span>`}
        ${layers.length > 0 && html`<span>experts, ${sent(i).join("; ")}</span>`}`} />`;
}
