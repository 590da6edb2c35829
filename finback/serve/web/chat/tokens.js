// An answer token by token: how sure the model was of each, and which others were likely.
import { html, useState } from "../lib.js";

const percent = (logprob) => {
  const p = Math.exp(logprob) * 100;
  return p >= 99.95 ? "100 %" : p >= 10 ? `${p.toFixed(0)} %` : p >= 0.1 ? `${p.toFixed(1)} %` : "< 0.1 %";
};
const visible = (text) => text.replace(/\n/g, "⏎").replace(/ /g, "␣") || "∅";
/** 0 for what was all but certain to 4 for a surprise. */
const surprise = (logprob) => [0.9, 0.6, 0.3, 0.1].filter((p) => Math.exp(logprob) < p).length;

export function Tokens({ tokens }) {
  const [at, setAt] = useState(-1);
  const shown = tokens[at];
  const over = (event) => {
    const found = event.target.closest?.("[data-i]");
    setAt(found ? Number(found.dataset.i) : -1);
  };
  const step = (event) => {
    const by = { ArrowRight: 1, ArrowLeft: -1 }[event.key];
    if (!by) return;
    event.preventDefault();
    setAt(Math.min(tokens.length - 1, Math.max(0, at + by)));
  };
  return html`
    <div class="tokens">
      <div class="text" tabindex="0" role="group" aria-label="The answer by tokens; arrow keys walk" onMouseOver=${over} onMouseLeave=${() => setAt(-1)} onKeyDown=${step}>
        ${tokens.map(([text, logprob, , drafted], i) => html`<span key=${i} data-i=${i} class=${`s${surprise(logprob)} ${drafted ? "drafted" : ""} ${i === at ? "at" : ""}`}>${text}</span>`)}
      </div>
      <div class="odds" aria-live="polite">
        ${
          shown
            ? html`<b>${visible(shown[0])}</b> ${percent(shown[1])}${shown[3] && html`<em>drafted by MTP and right</em>`}${shown[2].filter(([text]) => text !== shown[0]).map(([text, p]) => html`<span key=${text}><code>${visible(text)}</code> ${percent(p)}</span>`)}`
            : "Point at a token, or walk with the arrow keys, to see how likely it was."
        }
      </div>
    </div>`;
}
