// The bar above the thread: which chat, which model, and how full its window is.
import { Icon, Theme } from "../controls.js";
import { html } from "../lib.js";
import { path } from "./tree.js";

export function Top({ store, shown, onSidebar, onPanel }) {
  const { chat, models } = store;
  const { model, beside } = chat.settings;
  const first = model || models[0]?.id || "";
  return html`
    <header class="top">
      <${Icon} glyph="menu" label=${shown ? "Hide the sidebar" : "Show the sidebar"} aria-expanded=${String(shown)} onClick=${onSidebar} />
      <${Picker} label="Model" value=${first} models=${models} onChange=${(id) => store.configure({ model: id, beside: beside === id ? "" : beside })} />
      ${
        beside &&
        html`<span class="versus">and</span>
        <${Picker} label="Second model" value=${beside} models=${models} onChange=${(id) => store.configure({ beside: id })} />`
      }
      <span class="spring"></span>
      <${Gauge} store=${store} />
      <${Icon} glyph="sliders" label="Settings" onClick=${() => onPanel("settings")} />
      <span class="wide-only"><${Icon} glyph="keys" label="Keyboard" onClick=${() => onPanel("keys")} /></span>
      <${Theme} />
    </header>`;
}

function Picker({ label, value, models, onChange }) {
  const known = models.some((m) => m.id === value);
  if (models.length < 2 && known) return html`<span class="model" title="The model that answers">${value}</span>`;
  return html`
    <select class="picker" aria-label=${label} value=${value} onChange=${(event) => onChange(event.target.value)}>
      ${!known && html`<option value=${value}>${value ? `${value} (not here)` : "…"}</option>`}
      ${models.map((m) => html`<option key=${m.id} value=${m.id}>${m.id}</option>`)}
    </select>`;
}

/** How much of the model's window the last answer has used. */
function Gauge({ store }) {
  const last = path(store.chat)
    .map(({ node }) => node.usage)
    .filter(Boolean)
    .at(-1);
  if (!last || !store.window) return null;
  const used = last.total_tokens;
  const share = Math.min(1, used / store.window);
  const text = `${used.toLocaleString("en")} of ${store.window.toLocaleString("en")} tokens of the window are used`;
  return html`
    <span class=${`gauge ${share > 0.85 ? "tight" : ""}`} role="img" aria-label=${text} title=${text}>
      <svg viewBox="0 0 36 36" aria-hidden="true">
        <circle class="all" cx="18" cy="18" r="14" pathLength="100" />
        <circle class="used" cx="18" cy="18" r="14" pathLength="100" stroke-dasharray=${`${Math.max(1.5, share * 100)} 100`} />
      </svg>
      <span class="wide-only">${share < 0.01 ? "<1" : Math.round(share * 100)} %</span>
    </span>`;
}
