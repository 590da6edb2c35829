// One answer: its chain, its text, its reward, and how training changed its tokens.
import { html, useState } from "../lib.js";
import { Changed } from "./difference.js";
import { value } from "./format.js";
import { Tokens } from "./tokens.js";

const ENDS = { length: "cut off", stop: "" };

/** `against`: the answer with which this one is compared. */
export function Record({ record, against }) {
  const [byToken, setByToken] = useState(false);
  const { correct, reward, advantage, tokens, finish, detail } = record;
  const earned = Object.entries(reward);
  const sum = earned.reduce((total, [, n]) => total + (n ?? 0), 0);
  return html`
    <article class=${`record ${correct === null ? "" : correct ? "right" : "wrong"}`}>
      <div class="verdict">${correct !== null && html`<b>${correct ? "Right" : "Wrong"}</b>`}
        <span>${tokens} tokens</span>${ENDS[finish] && html`<span>${ENDS[finish]}</span>`}${advantage !== null && html`<span>advantage ${advantage > 0 ? "+" : ""}${value(advantage)}</span>`}
        ${detail && html`<button type="button" class="button small" aria-pressed=${String(byToken)} onClick=${() => setByToken(!byToken)}>By tokens</button>`}</div>
      ${byToken && detail ? html`<${Tokens} record=${record} />` : html`<${Texts} record=${record} against=${against} />`}
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

/** Chain and answer, each with its changes. */
function Texts({ record, against }) {
  const shown = (part) => (against ? html`<${Changed} before=${against[part]} after=${record[part]} />` : record[part]);
  const has = (part) => record[part] || against?.[part];
  return html`
    ${has("thinking") && html`<div class="chain" dir="auto">${shown("thinking")}</div>`}
    <div class="final" dir="auto">${has("answer") ? shown("answer") : html`<i>no answer</i>`}</div>`;
}
