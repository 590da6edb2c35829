// Notes on an answer that did not end normally, or was edited.
import { html } from "../lib.js";
import { isRunning } from "./tree.js";

export function Notes({ node, foreign, store, last, busy }) {
  if (foreign)
    return html`<p class="notice"><span class="dot" aria-hidden="true"></span>Being written in another tab.</p>`;
  if (isRunning(node)) return null;
  const note = noteOf(node);
  if (!note) return null;
  const { text, kind, canResume } = note;
  const isReady = !busy && store.server === "ready";
  return html`
    <p class=${`notice ${kind}`}>
      <span>${text}</span>
      ${last && canResume && html`<button type="button" class="button small" disabled=${!isReady} onClick=${() => store.resume(node)}>${node.content || node.reasoning ? "Continue" : "Try again"}</button>`}
    </p>`;
}

function noteOf(node) {
  if (node.state === "failed") return { text: node.error, kind: "bad", canResume: node.errorState !== "full" };
  if (node.state === "stopped") return { text: "Stopped.", kind: "", canResume: true };
  if (node.state === "cut")
    return { text: "Interrupted before it was finished.", kind: "", canResume: true };
  if (node.finish === "length") return { text: "The answer reached its limit of tokens.", kind: "", canResume: true };
  if (!node.content.trim())
    return {
      text: node.reasoning ? "The model thought, but gave no answer." : "The model gave no answer.",
      kind: "",
      canResume: false,
    };
  return node.isEdited ? { text: "Edited by you.", kind: "", canResume: false } : null;
}
