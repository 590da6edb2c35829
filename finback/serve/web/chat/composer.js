// The message field and its buttons.
import { Glyph } from "../controls.js";
import { composes, html, useEffect, useRef, useState } from "../lib.js";
import { draftName, draftOf, keepDraft } from "./drafts.js";

export function Composer({ store, field }) {
  const { chat, busy } = store;
  const draft = draftName(chat);
  const [text, setText] = useState(draftOf(draft));
  const before = useRef(draft);
  if (before.current !== draft) {
    before.current = draft;
    setText(draftOf(draft));
  }
  const keep = (value) => (keepDraft(draft, value), setText(value));
  const isReady = store.server === "ready";
  const waits = useRef(false); // a message sent before the server has answered goes out as soon as it does
  const send = () => {
    if (!text.trim() || busy) return;
    waits.current = store.server === "loading";
    if (!isReady) return;
    keep("");
    store.say(text.trim());
  };
  const pressed = (event) => {
    if (event.key !== "Enter" || event.shiftKey || composes(event)) return;
    event.preventDefault();
    send();
  };
  useEffect(() => void (isReady && waits.current && send()), [isReady]);
  useEffect(() => {
    const box = field.current;
    box.style.height = "auto";
    box.style.height = `${Math.min(box.scrollHeight + 2, window.innerHeight * 0.4)}px`;
  }, [text, chat.id]);
  useEffect(() => void (window.matchMedia("(pointer: fine)").matches && field.current.focus()), [chat.id]);
  return html`
    <footer class="composer">
      <form onSubmit=${(event) => (event.preventDefault(), send())}>
        <textarea id="say" ref=${field} rows="1" dir="auto" aria-label="Message" placeholder=${isReady ? "Ask something" : "Waiting for the server"}
          value=${text} onInput=${(event) => keep(event.target.value)} onKeyDown=${pressed}></textarea>
        <div class="row">
          <${Thinking} store=${store} />
          ${
            busy
              ? html`<button type="button" class="button send" aria-label="Stop" title="Stop (Esc)" onClick=${() => store.stop()}><${Glyph} name="stop" /></button>`
              : html`<button class="button main send" aria-label="Send" title="Send (Enter)" disabled=${!text.trim() || !isReady}><${Glyph} name="send" /></button>`
          }
        </div>
      </form>
      <p class="beware">AI-generated text. It may be wrong: check what matters.</p>
    </footer>`;
}

const THINKING = {
  auto: ["on", "Thinking: as the model likes"],
  on: ["off", "Thinking: on"],
  off: ["auto", "Thinking: off"],
};

function Thinking({ store }) {
  if (!store.thinks) return null;
  const [next, text] = THINKING[store.chat.settings.thinking] ?? THINKING.auto;
  const isOn = store.chat.settings.thinking === "on";
  return html`<button type="button" class=${`button small think ${store.chat.settings.thinking}`} aria-pressed=${String(isOn)} onClick=${() => store.configure({ thinking: next })}>${text}</button>`;
}
