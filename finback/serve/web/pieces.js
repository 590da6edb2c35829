// A text token by token: the pointer or the arrow keys pick one, and what is known of it stands below.
import { html, useState } from "./lib.js";

/** A log-probability as a probability. */
export const percent = (logprob) => {
  const p = Math.exp(logprob) * 100;
  return p >= 99.95 ? "100 %" : p >= 10 ? `${p.toFixed(0)} %` : p >= 0.1 ? `${p.toFixed(1)} %` : "< 0.1 %";
};

const NOTHING = "∅"; // a token without text, as the end of an answer or a part of a character

/** A token's text with its blanks to be seen. */
export const visible = (text) => text.replace(/\n/g, "⏎").replace(/ /g, "␣") || NOTHING;

/** `styles` has a class for each text, `detail` draws what is known of one, `hint` stands there until one is picked. */
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
      <div class="text" dir="auto" tabindex="0" role="group" aria-label=${`${label}; arrow keys walk`} onMouseOver=${over} onMouseLeave=${() => setAt(-1)} onKeyDown=${step}>
        ${texts.map((text, i) => html`<span key=${i} data-i=${i} class=${`${styles[i]} ${i === at ? "at" : ""}`.trim()}>${text || NOTHING}</span>`)}
      </div>
      <div class="odds" aria-live="polite">${at in texts ? html`<b>${visible(texts[at])}</b> ${detail(at)}` : hint}</div>
    </div>`;
}
