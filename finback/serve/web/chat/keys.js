// The keyboard: what each key does, and the list of them.
import { Dialog } from "../controls.js";
import { composes, html, useLayoutEffect } from "../lib.js";

const LIST = [
  ["Send", ["Enter"]],
  ["New line", ["Shift", "Enter"]],
  ["Stop the answer", ["Esc"]],
  ["New chat", ["Ctrl", "Shift", "O"]],
  ["Search the chats", ["Ctrl", "K"]],
  ["Show or hide the sidebar", ["Ctrl", "B"]],
  ["Settings", ["Ctrl", ","]],
  ["To the message field", ["/"]],
  ["This list", ["?"]],
];

const isTyping = (target) => target.closest?.("input, textarea, select, [contenteditable]") !== null;

/** Listen to the keyboard, all over the page. */
export function useKeys(actions) {
  useLayoutEffect(() => {
    const pressed = (event) => {
      if (composes(event) || document.querySelector("dialog[open]")) return;
      const action = actionOf(event, actions);
      if (!action) return;
      event.preventDefault();
      action();
    };
    document.addEventListener("keydown", pressed);
    return () => document.removeEventListener("keydown", pressed);
  });
}

function actionOf(event, actions) {
  const control = event.ctrlKey || event.metaKey;
  const key = event.key.toLowerCase();
  if (key === "escape" && !event.defaultPrevented) return actions.isBusy() ? actions.stop : actions.leave;
  if (control && event.shiftKey && key === "o") return actions.begin;
  if (control && key === "k") return actions.search;
  if (control && key === "b") return actions.sidebar;
  if (control && key === ",") return actions.settings;
  if (control || event.altKey || isTyping(event.target)) return undefined;
  return { "/": actions.composer, "?": actions.help }[key];
}

export const Keys = ({ onClose }) => html`
  <${Dialog} title="Keyboard" onClose=${onClose}>
    <dl class="keys">
      ${LIST.map(([what, keys]) => html`<div key=${what}><dt>${what}</dt><dd>${keys.map((k, i) => html`${i > 0 && " + "}<kbd>${k}</kbd>`)}</dd></div>`)}
    </dl>
  <//>`;
