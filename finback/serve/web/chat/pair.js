// Two models on the same prompt, side by side; one of the two answers is kept.
import { html, useState } from "../lib.js";
import { Answered, Message, Timings } from "./message.js";
import { isRunning } from "./tree.js";

export function Pair({ store, chat, node, branches }) {
  const pair = branches.filter((n) => n.pair === node.pair);
  const [, again] = useState(0);
  if (pair.length < 2)
    return html`<${Message} store=${store} chatId=${chat.id} node=${node} answer=${store.answers.get(node.id)} place=${branches.indexOf(node) + 1} of=${branches.length} last=${true} busy=${store.busy} />`;
  return html`
    <div class="pair" role="group" aria-label="Two answers to the same message">
      ${pair.map((one) => {
        const answer = store.answers.get(one.id);
        const chosen = one.id === node.id;
        return html`
          <section key=${one.id} class=${chosen ? "chosen" : ""}>
            <header><h2>${one.model}</h2>
              <button type="button" class="button small" aria-pressed=${String(chosen)} disabled=${store.busy} onClick=${() => (store.choose(one), again((n) => n + 1))}>${chosen ? "Going on with this" : "Go on with this"}</button>
            </header>
            <${Answered} store=${store} node=${one} answer=${answer} last=${true} busy=${store.busy} bare=${true} />
            ${!isRunning(one) && html`<div class="tools still"><${Timings} node=${one} /></div>`}
          </section>`;
      })}
    </div>`;
}
