// Markdown that grows: what has been read stays read, only the end is parsed again.
import { Marked } from "../vendor/marked.js";
import { REACH, mathBlock, mathInline, mayOpen } from "./math.js";
import { styled, tokensOf } from "./words.js";

const MARKS = { "&": "&amp;", "<": "&lt;", ">": "&gt;", '"': "&quot;", "'": "&#39;" };
const escaped = (text) => text.replace(/[&<>"']/g, (c) => MARKS[c]);

const markdown = new Marked({
  gfm: true,
  breaks: true, // models mean the lines that they write
  renderer: {
    // an image would be fetched from wherever the model says
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

const UNSTABLE = 3; // groups at the end that may still change: a blank line can yet be absorbed by what comes
const BLANK = /\n[ \t]*\n[ \t]*$/;

/** Tokens between blank lines. Parsing can start anew at any group: nothing reaches across. */
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

/** How many groups stand before the first in which a formula has begun that what comes may still end. */
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
/** The whole of a text at once: what growing has to agree with. */
export const htmlOfAll = (text) => markdown.parser(lexed(normal(text)));

/** A text that is only ever appended to. `groups` is all of it: { raw, tokens }, the first `settled` of them for good. */
export class Growing {
  #tail = "";
  groups = [];
  settled = 0;

  /** Go on with the text. */
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
    if (!tail.startsWith(raw)) return; // never seen; then it is read again, which is slow and right
    const torn = this.#tail.endsWith("\r") ? "\r" : ""; // a line feed may follow, and be a part of it
    this.#tail = torn ? tail.slice(raw.length, -1) + torn : tail.slice(raw.length);
    this.settled += done.length;
  }
}
