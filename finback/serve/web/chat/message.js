// One message with its actions and timings.
import { Icon, refocus } from "../controls.js";
import { Signal, composes, html, pure, useEffect, useLayoutEffect, useRef, useSignal, useState } from "../lib.js";
import { Markdown } from "../markdown/markdown.js";
import { copyText } from "../markdown/view.js";
import { Notes } from "./notes.js";
import { Thought } from "./thought.js";
import { Tokens } from "./tokens.js";
import { Waiting } from "./waiting.js";
import { isRunning } from "./tree.js";

const SILENT = new Signal();

export const Message = pure(function Message(props) {
  const { node } = props;
  const [editing, setEditing] = useState(false);
  if (editing) return html`<${Editor} ...${props} onClose=${() => setEditing(false)} />`;
  const edit = () => setEditing(true);
  return node.role === "user"
    ? html`<${Sent} ...${props} onEdit=${edit} />`
    : html`<${Answered} ...${props} onEdit=${edit} />`;
});

function Sent({ store, node, place, of, busy, onEdit }) {
  return html`
    <article class="message user" aria-label="You">
      <div class="bubble" dir="auto">${node.content}</div>
      <div class="tools">
        <${Branches} store=${store} node=${node} place=${place} of=${of} busy=${busy} />
        <${Copy} text=${node.content} />
        <${Icon} glyph="edit" small label="Edit" disabled=${busy} onClick=${onEdit} />
      </div>
    </article>`;
}

/** An answer: drawn from `answer` while it is being written, else from the stored chat. */
export function Answered({ store, node: stored, answer, place, of, last, busy, onEdit, bare }) {
  useSignal(answer?.updated ?? SILENT);
  const node = answer?.node ?? stored;
  const running = isRunning(node);
  const foreign = running && !answer; // another tab writes it
  return html`
    <article class="message assistant" aria-label=${`${node.model || "Assistant"}`} aria-busy=${String(running)}>
      ${node.reasoning && html`<${Thought} node=${node} answer=${answer} />`}
      ${node.state === "waiting" && !node.content && !node.reasoning && html`<${Waiting} answer=${answer} />`}
      ${node.tokens?.length && !running ? html`<${Tokens} tokens=${spoken(node)} />` : node.content && html`<${Markdown} text=${node.content} done=${!running} />`}
      <${Notes} node=${node} foreign=${foreign} store=${store} last=${last} busy=${busy} />
      ${
        !running &&
        !bare &&
        html`
        <div class="tools">
          <${Branches} store=${store} node=${node} place=${place} of=${of} busy=${busy} />
          ${node.content && html`<${Copy} text=${node.content} />`}
          <${Icon} glyph="again" small label="Answer again" disabled=${busy || store.server !== "ready"} onClick=${() => store.again(node)} />
          <${Icon} glyph="edit" small label="Edit the answer" disabled=${busy} onClick=${onEdit} />
          <${Timings} node=${node} />
        </div>`
      }
    </article>`;
}

function Branches({ store, node, place, of, busy }) {
  if (!(of > 1)) return null;
  const go = (by) => () => store.choose(siblings(store, node)[place - 1 + by]);
  return html`
    <span class="branches" role="group" aria-label="Versions">
      <${Icon} glyph="left" small label="Earlier version" disabled=${place === 1 || busy} onClick=${go(-1)} />
      <span aria-live="polite">${place}/${of}</span>
      <${Icon} glyph="right" small label="Later version" disabled=${place === of || busy} onClick=${go(1)} />
    </span>`;
}

function siblings(store, node) {
  const found = Object.values(store.chat.nodes).filter((n) => n.parent === node.parent);
  return found.sort((a, b) => a.at - b.at || (a.id < b.id ? -1 : 1));
}

function Copy({ text }) {
  const [done, setDone] = useState(false);
  useEffect(() => {
    if (!done) return;
    const timer = setTimeout(() => setDone(false), 1600);
    return () => clearTimeout(timer);
  }, [done]);
  return html`<${Icon} glyph="copy" small label=${done ? "Copied" : "Copy"} onClick=${() => copyText(text).then(() => setDone(true))} />`;
}

/** The tokens of the text, without the end-of-sequence token, which has log-probabilities too. */
function spoken({ tokens, content }) {
  const last = tokens.at(-1)[0];
  return tokens.length > 1 && last.startsWith("<") && !content.endsWith(last) ? tokens.slice(0, -1) : tokens;
}

/** Timings as measured by the server. */
export function Timings({ node }) {
  const t = node.timings;
  if (!t) return null;
  const parts = [`${t.predicted_n} tokens`];
  if (t.predicted_per_second) parts.push(`${t.predicted_per_second.toFixed(1)} tok/s`);
  parts.push(`first after ${seconds(t.queue_ms + t.prompt_ms)}`);
  if (t.cache_n) parts.push(`${t.cache_n} from cache`);
  if (t.draft_n) parts.push(`MTP ${t.draft_n_accepted}/${t.draft_n} accepted`);
  const title = `Prompt: ${t.prompt_n} tokens read in ${seconds(t.prompt_ms)}, ${t.cache_n} found in the cache; waited ${seconds(t.queue_ms)}`;
  return html`<span class="timings" title=${title}>${parts.map((p, i) => html`<span key=${i}>${p}</span>`)}</span>`;
}

const seconds = (ms) => (ms < 1000 ? `${Math.round(ms)} ms` : `${(ms / 1000).toFixed(1)} s`);

function Editor({ store, node, onClose }) {
  const field = useRef();
  const [text, setText] = useState(node.content);
  const isUser = node.role === "user";
  useLayoutEffect(() => {
    field.current.focus();
    field.current.setSelectionRange(text.length, text.length);
    return () => refocus(null);
  }, []);
  const send = () => (onClose(), store.say(text.trim(), node));
  const pressed = (event) => {
    if (composes(event)) return event.stopPropagation();
    if (event.key === "Escape") return (event.stopPropagation(), onClose());
    if (isUser && event.key === "Enter" && !event.shiftKey && text.trim())
      return (event.preventDefault(), send());
  };
  return html`
    <article class="message editor" aria-label="Edit">
      <textarea ref=${field} dir="auto" aria-label="Edited text" rows=${Math.min(14, text.split("\n").length + 2)} value=${text} onInput=${(e) => setText(e.target.value)} onKeyDown=${pressed}></textarea>
      <div class="actions">
        <button type="button" class="button small" onClick=${onClose}>Cancel</button>
        <button type="button" class="button small" disabled=${!text.trim()} onClick=${() => (onClose(), store.rewrite(node, text.trim()))}>Save only</button>
        ${isUser && html`<button type="button" class="button small main" disabled=${!text.trim() || store.server !== "ready"} onClick=${send}>Save and send</button>`}
      </div>
    </article>`;
}
