// A text token by token: the pointer or the arrow keys select one, and its details appear below.
import { html, useState } from "./lib.js";

/** A log-probability as a probability. */
export const percent = (logprob) => {
  const p = Math.exp(logprob) * 100;
  return p >= 99.95 ? "100 %" : p >= 10 ? `${p.toFixed(0)} %` : p >= 0.1 ? `${p.toFixed(1)} %` : "< 0.1 %";
};

const NOTHING = "∅"; // a token without text, such as the end of an answer or a part of a character

/** A token's text with visible blanks. */
export const visible = (text) => text.replace(/\n/g, "⏎").replace(/ /g, "␣") || NOTHING;

/** `styles` has a class for each text, `detail` draws the details of one, `hint` is shown until one is selected. */
export function Pieces({ texts, styles, label, hint, detail }) {
  const [at, setAt] = useState(-1);
  const over = (event) => {
    const found = event.target.closest?.("[data-i]");
    setAt(found ? Number(found.dataset.i) : -1);
  };
  const step = (event) => {
    const by = { ArrowRight: 1, ArrowLeft: -1 }[event.key];
    if (!by) return;
    event.preventDefault();
    setAt(Math.min(texts.length - 1, Math.max(0, at + by)));
  };
  return html`
    <div class="tokens">
      <div class="text" dir="auto" tabindex="0" role="group" aria-label=${`${label}; arrow keys select a token`} onMouseOver=${over} onMouseLeave=${() => setAt(-1)} onKeyDown=${step}>
        ${texts.map((text, i) => html`<span key=${i} data-i=${i} class=${`${styles[i]} ${i === at ? "at" : ""}`.trim()}>${text || NOTHING}</span>`)}
      </div>
      <div class="odds" aria-live="polite">${at in texts ? html`<b>${visible(texts[at])}</b> ${detail(at)}` : hint}</div>
    </div>`;
}
