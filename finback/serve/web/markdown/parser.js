// Markdown that grows: what has been read stays read, only the end is parsed again.
import { Marked } from "../vendor/marked.js";
import { mathBlock, mathInline } from "./math.js";

const MARKS = { "&": "&amp;", "<": "&lt;", ">": "&gt;", '"': "&quot;", "'": "&#39;" };
const escaped = (text) => text.replace(/[&<>"']/g, (c) => MARKS[c]);

const markdown = new Marked({
  gfm: true,
  breaks: true, // models mean the lines that they write
  tokenizer: {
    // HTML is shown, not obeyed; references would let the end of a text change its beginning
    html: () => undefined,
    tag: () => undefined,
    def: () => undefined,
    reflink: () => undefined,
  },
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
markdown.use({ extensions: [mathBlock, mathInline] });

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

const rawOf = (group) => group.map((token) => token.raw).join("");
const normal = (text) => text.replace(/\r\n?/g, "\n");

/** HTML of some tokens, not yet sanitised. */
export const htmlOf = (tokens) => markdown.parser(tokens);
/** The whole of a text at once: what growing has to agree with. */
export const htmlOfAll = (text) => markdown.parser(markdown.lexer(normal(text)));

/** A text that is only ever appended to. `groups` is all of it: { raw, tokens }, the first `settled` of them for good. */
export class Growing {
  #tail = "";
  groups = [];
  settled = 0;

  /** Go on with the text. */
  push(text) {
    this.#tail += text;
    const groups = groupsOf(markdown.lexer(normal(this.#tail))).map((tokens) => ({ raw: rawOf(tokens), tokens }));
    this.groups = [...this.groups.slice(0, this.settled), ...groups];
    this.#settle(groups);
  }

  get html() {
    return this.groups.map((group) => htmlOf(group.tokens)).join("");
  }

  #settle(groups) {
    const done = groups.slice(0, Math.max(0, groups.length - UNSTABLE));
    const raw = done.map((group) => group.raw).join("");
    if (!done.length) return;
    const tail = normal(this.#tail);
    if (!tail.startsWith(raw)) return; // never seen; then it is read again, which is slow and right
    const torn = this.#tail.endsWith("\r") ? "\r" : ""; // a line feed may follow, and be a part of it
    this.#tail = torn ? tail.slice(raw.length, -1) + torn : tail.slice(raw.length);
    this.settled += done.length;
  }
}
