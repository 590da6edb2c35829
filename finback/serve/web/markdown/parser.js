// Incremental markdown: only the end of a growing text is parsed again.
import { Marked } from "../vendor/marked.js";
import { REACH, mathBlock, mathInline, mayOpen } from "./math.js";
import { styled, tokensOf } from "./words.js";

const MARKS = { "&": "&amp;", "<": "&lt;", ">": "&gt;", '"': "&quot;", "'": "&#39;" };
const escaped = (text) => text.replace(/[&<>"']/g, (c) => MARKS[c]);

const markdown = new Marked({
  gfm: true,
  breaks: true, // models intend the line breaks that they write
  renderer: {
    // an image would be fetched from an address that the model chooses
    image({ href, text }) {
      return `<a href="${escaped(href)}">${escaped(text || href)}</a>`;
    },
    code({ text, lang }) {
      const language = (lang ?? "").trim().split(/\s+/)[0].slice(0, 40);
      return `<pre><code data-language="${escaped(language)}">${escaped(text)}</code></pre>`;
    },
    checkbox({ checked }) {
      return checked ? "☑ " : "☐ ";
    },
  },
});
markdown.use({ extensions: [mathBlock, mathInline, styled] });
const lexed = (text) => tokensOf(text, markdown.defaults);

const UNSTABLE = 3; // groups at the end that may still change: later text can absorb a blank line
const BLANK = /\n[ \t]*\n[ \t]*$/;

/** Tokens between blank lines. Parsing can restart at any group: nothing spans two of them. */
function groupsOf(tokens) {
  const groups = [];
  let group = [];
  for (const token of tokens) {
    group.push(token);
    if (token.type === "space" || BLANK.test(token.raw)) {
      groups.push(group);
      group = [];
    }
  }
  return group.length ? [...groups, group] : groups;
}

/** How many groups precede the first one with an open formula, which later text may close. */
function beforeOpen(groups) {
  let behind = 0;
  for (const { raw } of groups) behind += raw.length;
  const at = groups.findIndex(({ raw, tokens }) => {
    behind -= raw.length;
    return behind <= REACH && tokens.some(mayOpen);
  });
  return at < 0 ? groups.length : at;
}

const rawOf = (group) => group.map((token) => token.raw).join("");
const normal = (text) => text.replace(/\r\n?/g, "\n");

/** HTML of some tokens, not yet sanitised. */
export const htmlOf = (tokens) => markdown.parser(tokens);
/** HTML of a whole text at once; the incremental result must equal it. */
export const htmlOfAll = (text) => markdown.parser(lexed(normal(text)));

/** A text that only grows. `groups` covers all of it: { raw, tokens }; the first `settled` of them are final. */
export class Growing {
  #tail = "";
  groups = [];
  settled = 0;

  /** Append text. */
  push(text) {
    this.#tail += text;
    const groups = groupsOf(lexed(normal(this.#tail))).map((tokens) => ({ raw: rawOf(tokens), tokens }));
    this.groups = [...this.groups.slice(0, this.settled), ...groups];
    this.#settle(groups);
  }

  get html() {
    return this.groups.map((group) => htmlOf(group.tokens)).join("");
  }

  #settle(groups) {
    const done = groups.slice(0, Math.max(0, Math.min(groups.length - UNSTABLE, beforeOpen(groups))));
    const raw = done.map((group) => group.raw).join("");
    if (!done.length) return;
    const tail = normal(this.#tail);
    if (!tail.startsWith(raw)) return; // never seen; then the text is parsed again, which is slow but right
    const torn = this.#tail.endsWith("\r") ? "\r" : ""; // a line feed that belongs to it may follow
    this.#tail = torn ? tail.slice(raw.length, -1) + torn : tail.slice(raw.length);
    this.settled += done.length;
  }
}
