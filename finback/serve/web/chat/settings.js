// The settings of a chat: system prompt, sampling, thinking, two models.
import { Dialog, Segments } from "../controls.js";
import { html } from "../lib.js";
import { PRESETS, samplingOf } from "./request.js";

const SAMPLING = [
  ["temperature", "Temperature", 0, 2, 0.05, "0 always takes the likeliest token."],
  ["top_p", "Top p", 0.01, 1, 0.01, "Only the likeliest tokens up to this probability."],
  ["top_k", "Top k", 0, 1000, 1, "Only the k likeliest tokens; 0 is all."],
  ["min_p", "Min p", 0, 1, 0.01, "Only tokens at least this likely relative to the likeliest."],
];

export function Settings({ store, onClose }) {
  const { settings } = store.chat;
  const set = (name) => (event) => store.configure({ [name]: event.target.value });
  return html`
    <${Dialog} title="Settings" onClose=${onClose}>
      <div class="field"><label for="system">System prompt</label>
        <textarea id="system" rows="4" dir="auto" value=${settings.system} onInput=${set("system")} placeholder="How the model should behave, in this chat"></textarea></div>
      ${store.thinks && html`<div class="field"><span class="label">Thinking</span>
        <${Segments} label="Thinking" value=${settings.thinking} onChange=${(v) => store.configure({ thinking: v })} options=${[
          ["auto", "As the model likes"],
          ["on", "On"],
          ["off", "Off"],
        ]} /></div>
      <${Numeric} id="budget" label="Longest chain of thought" unit="tokens" hint="Then it is closed and the model answers. Empty: no bound." value=${settings.budget} onInput=${set("budget")} disabled=${settings.thinking === "off"} />`}
      <div class="field"><span class="label">Sampling</span>
        <${Segments} label="Sampling" value=${settings.preset} onChange=${(name) => store.configure(name === "custom" ? { preset: name, sampling: { ...samplingOf(settings) } } : { preset: name })} options=${Object.entries(PRESETS).map(([name, { label }]) => [name, label])} /></div>
      ${settings.preset === "custom" && html`<div class="grid">${SAMPLING.map((row) => html`<${Knob} key=${row[0]} row=${row} store=${store} />`)}</div>`}
      <div class="grid">
        <${Numeric} id="seed" label="Seed" hint="The same seed gives the same answer. Empty: a new one each time." value=${settings.seed} onInput=${set("seed")} />
        <${Numeric} id="most" label="Longest answer" unit="tokens" hint="Chain included. Empty: what fits." value=${settings.maxTokens} onInput=${set("maxTokens")} />
      </div>
      <${Beside} store=${store} />
      <label class="check"><input type="checkbox" checked=${settings.logprobs} onChange=${(e) => store.configure({ logprobs: e.target.checked })} />
        <span>Show how likely each token was<br /><span class="hint">The answer is then shown token by token, without markdown.</span></span></label>
    <//>`;
}

function Numeric({ id, label, unit, hint, ...rest }) {
  return html`
    <div class="field"><label for=${id}>${label}${unit && html` <span class="unit">(${unit})</span>`}</label>
      <input id=${id} type="number" min=${id === "seed" ? undefined : 1} step="1" inputmode="numeric" aria-describedby=${`${id}-hint`} ...${rest} />
      <span class="hint" id=${`${id}-hint`}>${hint}</span></div>`;
}

function Knob({ row: [name, label, min, max, step, hint], store }) {
  const { sampling } = store.chat.settings;
  const set = (event) => store.configure({ sampling: { ...sampling, [name]: event.target.value } });
  return html`
    <div class="field"><label for=${name}>${label}</label>
      <input id=${name} type="number" min=${min} max=${max} step=${step} value=${sampling[name] ?? ""} placeholder="model’s own" aria-describedby=${`${name}-hint`} onInput=${set} />
      <span class="hint" id=${`${name}-hint`}>${hint}</span></div>`;
}

function Beside({ store }) {
  const { models, chat } = store;
  const first = chat.settings.model || models[0]?.id;
  const others = models.filter((m) => m.id !== first);
  return html`
    <div class="field"><label for="beside">Second model, side by side</label>
      <select id="beside" value=${chat.settings.beside} onChange=${(e) => store.configure({ beside: e.target.value })} disabled=${!others.length} aria-describedby="beside-hint">
        <option value="">None</option>
        ${others.map((m) => html`<option key=${m.id} value=${m.id}>${m.id}</option>`)}
      </select>
      <span class="hint" id="beside-hint">${others.length ? "Both answer every message; you go on with one of the two." : "Start the server with --also MODEL to compare two."}</span></div>`;
}
