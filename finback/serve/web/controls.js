// Small components of both pages: icons, dialogs, the theme, the form for a key.
import { key, setKey } from "./api.js";
import { html, remember, remembered, useEffect, useLayoutEffect, useRef, useState } from "./lib.js";

const GLYPHS = {
  menu: "M4 6h16M4 12h16M4 18h16",
  plus: "M12 5v14M5 12h14",
  close: "M6 6l12 12M18 6L6 18",
  send: "M12 19V5M6 11l6-6 6 6",
  stop: "M7 7h10v10H7z",
  copy: "M9 9h11v11H9zM5 15H4V4h11v1",
  edit: "M4 20h4L19 9l-4-4L4 16zM13 7l4 4",
  again: "M20 11a8 8 0 1 0-2.5 6M20 4v7h-7",
  left: "M15 5l-7 7 7 7",
  right: "M9 5l7 7-7 7",
  down: "M5 9l7 7 7-7",
  search: "M11 18a7 7 0 1 1 0-14 7 7 0 0 1 0 14zM16 16l5 5",
  trash: "M5 7h14M10 7V4h4v3M7 7l1 13h8l1-13",
  sliders: "M4 7h9M17 7h3M4 17h3M11 17h9M15 4.5v5M9 14.5v5",
  more: "M6 12h.01M12 12h.01M18 12h.01",
  sun: "M12 16a4 4 0 1 0 0-8 4 4 0 0 0 0 8zM12 2v2M12 20v2M2 12h2M20 12h2M5 5l1.5 1.5M17.5 17.5L19 19M5 19l1.5-1.5M17.5 6.5L19 5",
  moon: "M20 14.5A8.5 8.5 0 0 1 9.5 4 8.5 8.5 0 1 0 20 14.5z",
  screen: "M3 5h18v12H3zM8 21h8",
  keys: "M3 7h18v10H3zM7 11h.01M11 11h.01M15 11h.01M8 14h8",
  chart: "M4 20V4M4 20h16M8 15l4-5 3 3 5-7",
  chat: "M4 5h16v11H9l-5 4z",
  columns: "M4 5h7v14H4zM13 5h7v14h-7z",
  download: "M12 4v11M7 11l5 5 5-5M5 20h14",
  upload: "M12 16V5M7 9l5-5 5 5M5 20h14",
};

/** An icon, hidden from screen readers: the element around it has a label. */
export const Glyph = ({ name }) => html`
  <svg class="glyph" viewBox="0 0 24 24" fill="none" stroke="currentColor" stroke-width="1.8" stroke-linecap="round"
    stroke-linejoin="round" aria-hidden="true"><path d=${GLYPHS[name]} /></svg>`;

/** A button that shows only an icon; `label` says what it does. */
export const Icon = ({ glyph, label, small, ...rest }) => html`
  <button type="button" class=${small ? "icon small" : "icon"} aria-label=${label} title=${label} ...${rest}>
    <${Glyph} name=${glyph} />
  </button>`;

/** Return the focus to the element that had it, or to the message field if that element is gone. */
export function refocus(before) {
  setTimeout(() => {
    const { activeElement, body } = document;
    if (activeElement && activeElement !== body) return; // another element has taken it
    const isThere = before && before !== body && before.isConnected;
    (isThere ? before : document.getElementById("say"))?.focus();
  });
}

/** A modal dialog, open for as long as it is drawn. */
export function Dialog({ title, onClose, children }) {
  const box = useRef();
  // before it is painted: a key pressed at once must already find it open
  useLayoutEffect(() => {
    const before = document.activeElement;
    box.current.showModal();
    return () => refocus(before);
  }, []);
  const outside = (event) => event.target === box.current && onClose();
  return html`
    <dialog ref=${box} aria-labelledby="dialog-title" onClose=${onClose} onCancel=${onClose} onClick=${outside}>
      <header><h2 id="dialog-title">${title}</h2><${Icon} glyph="close" label="Close" onClick=${onClose} /></header>
      <div class="body">${children}</div>
    </dialog>`;
}

/** One of a few choices. */
export const Segments = ({ label, options, value, onChange }) => html`
  <div class="segments" role="group" aria-label=${label}>
    ${options.map(
      ([name, text]) => html`
      <button type="button" key=${name} aria-pressed=${String(name === value)} onClick=${() => onChange(name)}>${text}</button>`,
    )}
  </div>`;

/** A question that is answered with yes or no. */
export const Confirm = ({ title, text, yes, onYes, onClose }) => html`
  <${Dialog} title=${title} onClose=${onClose}>
    <p>${text}</p>
    <div class="actions">
      <button type="button" class="button" onClick=${onClose}>Cancel</button>
      <button type="button" class="button danger" onClick=${() => (onClose(), onYes())}>${yes}</button>
    </div>
  </${Dialog}>`;

const NEXT = { system: "light", light: "dark", dark: "system" };
const SIGN = { system: "screen", light: "sun", dark: "moon" };

/** A button that switches between the light, the dark and the system's theme. */
export function Theme() {
  const [theme, setTheme] = useState(document.documentElement.dataset.theme ?? "system");
  const change = () => {
    const next = NEXT[theme];
    setTheme(next);
    if (next === "system") delete document.documentElement.dataset.theme;
    else document.documentElement.dataset.theme = next;
    try {
      localStorage.setItem("finback.theme", next);
    } catch {
      // storage is off: it holds until the next load
    }
    window.dispatchEvent(new Event("themechange"));
  };
  return html`<${Icon} glyph=${SIGN[theme]} label=${`Theme: ${theme}; change`} onClick=${change} />`;
}

/** Asks for the key that the server wants. */
export function KeyForm({ onKey }) {
  const field = useRef();
  const wrong = key() !== "";
  const enter = (event) => {
    event.preventDefault();
    setKey(field.current.value.trim());
    onKey();
  };
  useEffect(() => field.current.focus(), []);
  return html`
    <main class="key-form">
      <form onSubmit=${enter}>
        <h1>This server wants a key</h1>
        <p>Whoever started the server has one. It stays in this tab and is forgotten when you close it.</p>
        <div class="field">
          <label for="key">API key</label>
          <input id="key" type="password" ref=${field} autocomplete="off" required aria-describedby=${wrong ? "key-wrong" : undefined} />
          ${wrong && html`<span id="key-wrong" class="notice bad" role="alert">The server does not know this key.</span>`}
        </div>
        <button class="button main" type="submit">Open</button>
      </form>
    </main>`;
}

/** Whether the screen is as narrow as a phone's. */
export function useNarrow(limit = 760) {
  const media = window.matchMedia(`(max-width: ${limit}px)`);
  const [narrow, setNarrow] = useState(media.matches);
  useEffect(() => {
    const heard = (event) => setNarrow(event.matches);
    media.addEventListener("change", heard);
    return () => media.removeEventListener("change", heard);
  }, []);
  return narrow;
}

/** A state that is restored at the next visit. */
export function useRemembered(name, fallback) {
  const [value, setValue] = useState(() => remembered(name, fallback));
  return [value, (next) => (setValue(next), remember(name, next))];
}
