// One answer: its chain, its end, what it earned.
import { html } from "../lib.js";
import { value } from "./format.js";

const ENDS = { length: "cut off", stop: "" };

export function Record({ record }) {
  const { thinking, answer, correct, reward, advantage, tokens, finish } = record;
  const earned = Object.entries(reward);
  const sum = earned.reduce((total, [, n]) => total + (n ?? 0), 0);
  return html`
    <article class=${`record ${correct === null ? "" : correct ? "right" : "wrong"}`}>
      <div class="verdict">${correct !== null && html`<b>${correct ? "Right" : "Wrong"}</b>`}
        <span>${tokens} tokens</span>${ENDS[finish] && html`<span>${ENDS[finish]}</span>`}${advantage !== null && html`<span>advantage ${advantage > 0 ? "+" : ""}${value(advantage)}</span>`}</div>
      ${thinking && html`<div class="chain" dir="auto">${thinking}</div>`}
      <div class="final" dir="auto">${answer || html`<i>no answer</i>`}</div>
      ${
        earned.length > 0 &&
        html`
        <ul class="parts" aria-label="Reward">
          ${earned.map(([name, n]) => html`<li key=${name} class=${n ? "" : "none"}>${name} <b>${value(n)}</b></li>`)}
          <li class="sum">reward <b>${value(sum)}</b></li>
        </ul>`
      }
    </article>`;
}
