// Before the first token: what the server is doing.
import { html } from "../lib.js";

const ENDS = { one: "st", two: "nd", few: "rd", other: "th" };
const ordinals = new Intl.PluralRules("en", { type: "ordinal" });

/** 3 as "3rd". */
const ordinal = (n) => `${n}${ENDS[ordinals.select(n)]}`;

export function Waiting({ answer }) {
  const words = answer?.queue ? `Waiting for a place: ${ordinal(answer.queue)} in line…` : "Reading your message…";
  return html`<p class="waiting"><span class="dot" aria-hidden="true"></span>${words}</p>`;
}
