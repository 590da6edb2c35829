// The messages of a chat, one under the other. It stays at the end unless the user has scrolled up.
import { Glyph } from "../controls.js";
import { html, useLayoutEffect } from "../lib.js";
import { useFollowing } from "./following.js";
import { Message } from "./message.js";
import { Pair } from "./pair.js";
import { path } from "./tree.js";

const EXAMPLES = ["8-3+5+4-6=?", "Explain in one paragraph why the sky is blue.", "Write a haiku about whales."];

export function Thread({ store }) {
  const { chat } = store;
  const { box, inner, away, scrolled, toEnd } = useFollowing();
  const shown = path(chat);
  const count = shown.length;
  useLayoutEffect(toEnd, [count]);
  return html`
    <main class="thread" ref=${box} onScroll=${scrolled} tabindex="0" aria-label="Messages">
      <div class="column" ref=${inner}>
        ${count ? html`<h1 class="sr">${chat.title}</h1>` : html`<${Welcome} store=${store} />`}
        ${shown.map(({ node, place, count: of, branches }, i) => {
          const key = node.pair ?? node.id;
          const last = i === count - 1;
          if (node.pair && last)
            return html`<${Pair} key=${key} store=${store} chat=${chat} node=${node} branches=${branches} />`;
          return html`<${Message} key=${key} store=${store} chatId=${chat.id} node=${node} answer=${store.answers.get(node.id)} place=${place} of=${of} branches=${of > 1 ? branches.map((b) => b.id).join() : ""} last=${last} busy=${store.busy} ready=${store.server === "ready"} />`;
        })}
        <${State} store=${store} />
      </div>
      ${away && html`<button type="button" class="button latest" onClick=${toEnd}><${Glyph} name="down" />Latest</button>`}
    </main>`;
}

function Welcome({ store }) {
  const name = store.chat.settings.model || store.models[0]?.id;
  return html`
    <div class="empty welcome">
      <h1>${name ? `Talk to ${name}` : store.server === "loading" ? "Connecting…" : "No model yet"}</h1>
      <p>It runs on your own machine or server. What you say goes there and nowhere else.</p>
      ${store.forgets && html`<p class="notice warn">This browser keeps nothing: chats end with this tab.</p>`}
      <div class="examples">
        ${EXAMPLES.map((text) => html`<button type="button" class="button" key=${text} disabled=${store.server !== "ready"} onClick=${() => store.say(text)}>${text}</button>`)}
      </div>
    </div>`;
}

function State({ store }) {
  if (store.server !== "gone") return null;
  return html`<p class="notice bad" role="alert"><span>The server is gone. This page tries again every few seconds; nothing you wrote is lost.</span></p>`;
}
