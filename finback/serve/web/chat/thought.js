// The chain of thought: open while it is written, then folded under "Thought for 12 s"; the user's choice is remembered.
import { Glyph } from "../controls.js";
import { html, remember, remembered, useEffect, useState } from "../lib.js";
import { Markdown } from "../markdown/markdown.js";
import { useFollowing } from "./following.js";
import { isRunning } from "./tree.js";

/** "Thought for 12 s". */
export function label(node) {
  if (node.state === "thinking") return "Thinking…";
  if (!node.thoughtMs) return "Thoughts";
  const s = node.thoughtMs / 1000;
  return `Thought for ${s < 10 ? s.toFixed(1) : Math.round(s)} s`;
}

export function Thought({ node, answer }) {
  const writing = node.state === "thinking";
  const [chosen, setChosen] = useState(null); // for this message, while it is drawn
  const [reads, setReads] = useState(false); // the user has scrolled up in it
  const open = chosen ?? (writing || reads ? remembered("thinking-open", true) : remembered("thoughts-open", false));
  const change = () => {
    setChosen(!open);
    remember(writing ? "thinking-open" : "thoughts-open", !open);
  };
  const { box, inner, away, scrolled } = useFollowing(open && writing);
  useEffect(() => setReads(away), [away]);
  useEffect(() => {
    // folds when the answer begins, unless chains stay open or the user has scrolled up in it
    if (!writing) setChosen(reads && chosen !== false ? true : null);
  }, [writing]);
  return html`
    <section class=${`thought ${open ? "open" : ""}`}>
      <div class="line">
        <button type="button" class="summary" aria-expanded=${String(open)} onClick=${change}>
          ${writing && html`<span class="dot" aria-hidden="true"></span>`}<span>${label(node)}</span><${Glyph} name="right" />
        </button>
        ${writing && answer && html`<button type="button" class="button small" onClick=${() => answer.answerNow()}>Answer now</button>`}
      </div>
      ${open && html`<div class="chain" ref=${box} onScroll=${scrolled} tabindex="0" role="region" aria-label="Chain of thought">
        <div ref=${inner}><${Markdown} text=${node.reasoning} done=${!isRunning(node) || !writing} /></div></div>`}
    </section>`;
}
