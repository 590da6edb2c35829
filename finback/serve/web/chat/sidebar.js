// The chats of this browser: search, rename, delete, import, export.
import { Confirm, Dialog, Glyph, Icon } from "../controls.js";
import { download } from "../files.js";
import { asset, html, useMemo, useRef, useState } from "../lib.js";
import { asJson, asMarkdown, fromJson } from "./export.js";

const DAY = 86400000;

/** Chats that contain a text in their title or in a message. */
function found(chats, text) {
  const words = text.trim().toLowerCase();
  if (!words) return chats;
  return chats.filter(
    (chat) =>
      chat.title.toLowerCase().includes(words) ||
      Object.values(chat.nodes).some((n) => n.content.toLowerCase().includes(words)),
  );
}

function groups(chats) {
  const today = new Date().setHours(0, 0, 0, 0);
  const label = (at) =>
    at >= today ? "Today" : at >= today - DAY ? "Yesterday" : at >= today - 7 * DAY ? "Last 7 days" : "Earlier";
  const made = new Map();
  for (const chat of chats) {
    const name = label(chat.updated);
    if (!made.has(name)) made.set(name, []);
    made.get(name).push(chat);
  }
  return [...made];
}

export function Sidebar({ store, shown, search, onLeave, narrow }) {
  const [text, setText] = useState("");
  const [asked, setAsked] = useState(null); // { kind, chat }
  const listed = useMemo(() => groups(found(store.chats, text)), [store.chats, text]);
  const close = () => setAsked(null);
  return html`
    <nav class="sidebar" aria-label="Chats" inert=${!shown} data-narrow=${narrow}>
      <div class="head">
        <a class="brand" href="/"><img src=${asset("icon.svg")} alt="" />finback</a>
        <a class="button small" href="/runs"><${Glyph} name="chart" />Runs</a>
      </div>
      <button type="button" class="button begin" onClick=${() => (store.begin(), onLeave(), setTimeout(() => document.getElementById("say")?.focus()))}>
        <${Glyph} name="plus" />New chat
      </button>
      <input type="search" ref=${search} dir="auto" aria-label="Search the chats" placeholder="Search" value=${text} onInput=${(e) => setText(e.target.value)} />
      <div class="list">
        ${listed.map(
          ([name, chats]) => html`
          <section key=${name}><h2>${name}</h2>
            <ul>${chats.map((chat) => html`<${Entry} key=${chat.id} chat=${chat} store=${store} onLeave=${onLeave} onAsk=${(kind) => setAsked({ kind, chat })} />`)}</ul>
          </section>`,
        )}
        ${!listed.length && html`<p class="none">${text ? "Nothing holds this text." : "Your chats appear here. They stay in this browser."}</p>`}
      </div>
      <${Files} store=${store} onAsk=${(kind) => setAsked({ kind })} />
      ${asked?.kind === "rename" && html`<${Rename} chat=${asked.chat} store=${store} onClose=${close} />`}
      ${asked?.kind === "remove" && html`<${Confirm} title="Delete this chat?" text=${`“${asked.chat.title}” will be gone for good.`} yes="Delete" onYes=${() => store.remove(asked.chat.id)} onClose=${close} />`}
      ${asked?.kind === "clear" && html`<${Confirm} title="Delete all chats?" text="All chats in this browser will be gone for good. Export them first if you may want them." yes="Delete all" onYes=${() => store.removeAll()} onClose=${close} />`}
    </nav>`;
}

function Entry({ chat, store, onLeave, onAsk }) {
  const [open, setOpen] = useState(false);
  const isCurrent = store.chat.id === chat.id;
  const more = useRef(); // holds the menu's button, which gets the focus when the menu closes
  const close = () => (setOpen(false), more.current.querySelector("[aria-expanded]").focus());
  const act = (does) => () => (close(), does());
  const leave = (event) => !event.currentTarget.contains(event.relatedTarget) && setOpen(false);
  const escape = (event) => event.key === "Escape" && open && (event.stopPropagation(), close());
  return html`
    <li ref=${more} class=${isCurrent ? "current" : ""} onFocusOut=${leave} onKeyDown=${escape}>
      <button type="button" class="name" dir="auto" aria-current=${isCurrent ? "page" : undefined} title=${chat.title} onClick=${() => (store.open(chat.id), onLeave())}>${chat.title}</button>
      <${Icon} glyph="more" small label=${`More for ${chat.title}`} aria-expanded=${String(open)} onClick=${() => setOpen(!open)} />
      ${
        open &&
        html`
        <div class="menu">
          <button type="button" onClick=${act(() => onAsk("rename"))}>Rename</button>
          <button type="button" onClick=${act(() => download(`${chat.title}.json`, asJson([chat]), "application/json"))}>Export JSON</button>
          <button type="button" onClick=${act(() => download(`${chat.title}.md`, asMarkdown(chat), "text/markdown"))}>Export Markdown</button>
          <button type="button" class="danger" onClick=${act(() => onAsk("remove"))}>Delete</button>
        </div>`
      }
    </li>`;
}

function Rename({ chat, store, onClose }) {
  const field = useRef();
  const keep = (event) => {
    event.preventDefault();
    store.rename(chat.id, field.current.value);
    onClose();
  };
  return html`
    <${Dialog} title="Rename" onClose=${onClose}>
      <form onSubmit=${keep}>
        <div class="field"><label for="title">Name of the chat</label><input id="title" type="text" dir="auto" ref=${field} value=${chat.title} maxlength="200" required /></div>
        <div class="actions"><button type="button" class="button" onClick=${onClose}>Cancel</button><button class="button main">Rename</button></div>
      </form>
    <//>`;
}

function Files({ store, onAsk }) {
  const field = useRef();
  const [problem, setProblem] = useState("");
  const take = async () => {
    const [file] = field.current.files;
    field.current.value = "";
    if (!file) return;
    try {
      await store.bring(fromJson(await file.text()));
      setProblem("");
    } catch (error) {
      setProblem(error.message);
    }
  };
  const none = !store.chats.length;
  return html`
    <div class="foot">
      ${problem && html`<p class="notice bad" role="alert">${problem}</p>`}
      ${store.forgets && html`<p class="notice warn">This browser keeps nothing: chats end with this tab.</p>`}
      ${store.storageFailed && html`<p class="notice bad" role="alert">A chat could not be saved. Export it before you leave.</p>`}
      <div class="files">
        <${Icon} glyph="upload" label="Import chats" onClick=${() => field.current.click()} />
        <${Icon} glyph="download" label="Export all chats" disabled=${none} onClick=${() => download("finback-chats.json", asJson(store.chats), "application/json")} />
        <${Icon} glyph="trash" label="Delete all chats" disabled=${none} onClick=${() => onAsk("clear")} />
        <input type="file" ref=${field} accept="application/json,.json" hidden aria-label="Chats to import" onChange=${take} />
      </div>
    </div>`;
}
