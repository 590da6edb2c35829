// Draws incremental markdown: a group is redrawn only when its text has changed, and then only the new part.
import DOMPurify from "../vendor/purify.js";
import temml from "../vendor/temml.js";
import { coloured } from "./code.js";
import { grow, keepingSelection } from "./grow.js";
import { Growing, htmlOf } from "./parser.js";

const ALLOWED = {
  ALLOWED_TAGS: [
    "a",
    "b",
    "blockquote",
    "br",
    "code",
    "del",
    "em",
    "h1",
    "h2",
    "h3",
    "h4",
    "h5",
    "h6",
    "hr",
    "i",
    "kbd",
    "li",
    "mark",
    "ol",
    "p",
    "pre",
    "s",
    "small",
    "span",
    "strong",
    "sub",
    "sup",
    "table",
    "tbody",
    "td",
    "th",
    "thead",
    "tr",
    "u",
    "ul",
  ],
  ALLOWED_ATTR: ["href", "start", "class", "data-tex", "data-language", "title", "align"],
  ADD_URI_SAFE_ATTR: ["data-tex", "data-language", "start", "title", "align"],
  ALLOW_DATA_ATTR: false,
  ALLOWED_URI_REGEXP: /^(?:https?:|mailto:|#)/i,
  RETURN_DOM_FRAGMENT: true,
};
const CLOSED = /^ {0,3}(`{3,}|~{3,})[^\n]*\n(?:[\s\S]*\n)? {0,3}\1[`~]*[ \t]*\n*$/;
const BUDGET = 7; // milliseconds of drawing in one frame; the rest waits for the next
const SLOW = 20; // milliseconds; after a longer step, the next one waits
const REST = 8; // this many times its duration
const LONGEST_REST = 1500; // but at most this many milliseconds

/** Sanitised nodes of untrusted HTML. */
const clean = (text) => DOMPurify.sanitize(text, ALLOWED);

function element(name, className, ...children) {
  const found = document.createElement(name);
  if (className) found.className = className;
  found.append(...children);
  return found;
}

/** Give a text's headings levels below the page's own, without gaps, whatever levels the model wrote; their look stays. */
function rank(root) {
  const above = [];
  for (const heading of root.querySelectorAll("h1, h2, h3, h4, h5, h6")) {
    const depth = Number(heading.tagName[1]);
    while (above.at(-1) >= depth) above.pop();
    above.push(depth);
    heading.ariaLevel = String(1 + above.length);
  }
}

const DRAWN = new WeakSet(); // formulas

function drawMath(span) {
  DRAWN.add(span);
  span.dir = "ltr";
  try {
    const display = span.classList.contains("display");
    temml.render(span.dataset.tex, span, {
      displayMode: display,
      trust: false,
      throwOnError: true,
      maxExpand: 500,
      annotate: true,
    });
    if (display) makeReachable(span, "Formula");
  } catch {
    span.className += " wrong";
    span.textContent = span.dataset.tex; // the source stays readable
  }
}

/** Make a box that scrolls reachable by the keyboard. */
function makeReachable(box, label) {
  box.tabIndex = 0;
  box.setAttribute("role", "region");
  box.setAttribute("aria-label", label);
}

function frameCode(pre) {
  const code = pre.querySelector("code");
  const language = code.dataset.language ?? "";
  const copy = element("button", "button small", "Copy");
  copy.type = "button";
  copy.addEventListener("click", async () => {
    await copyText(code.textContent);
    copy.textContent = "Copied";
    setTimeout(() => (copy.textContent = "Copy"), 1600);
  });
  const box = element("div", "code", element("div", "bar", element("span", "", language || "text"), copy));
  pre.replaceWith(box);
  makeReachable(pre, language ? `Code, ${language}` : "Code");
  box.append(pre);
}

function frameTable(table) {
  const box = element("div", "scroll");
  box.dir = "auto"; // otherwise a right-to-left table would be aligned left
  table.removeAttribute("dir"); // dir="auto" ignores elements that have a dir
  table.replaceWith(box);
  makeReachable(box, "Table");
  box.append(table);
}

/** Put a text on the clipboard, on plain http too. */
export async function copyText(text) {
  if (navigator.clipboard) {
    try {
      return await navigator.clipboard.writeText(text);
    } catch {
      // refused: the old way may work
    }
  }
  const field = element("textarea", "sr");
  field.value = text;
  document.body.append(field);
  field.select();
  document.execCommand("copy");
  field.remove();
}

function colour(pre) {
  const code = pre.querySelector("code");
  const text = coloured(code.textContent, code.dataset.language?.toLowerCase());
  if (text !== undefined) keepingSelection(code, () => code.replaceChildren(clean(text)));
}

/** Draws one text into an element, a few milliseconds at a time. */
export class MarkdownView {
  #shown = ""; // the text that has been parsed
  #wanted = { text: "", done: false };
  #growing = new Growing();
  #drawn = []; // for each group { raw, box, isColoured }
  #sure = 0; // leading groups whose drawing is final
  #timer = 0;
  #rest = 0; // when drawing may go on

  constructor(root) {
    this.root = root;
  }

  /** Show a text; `done` when no more will come. Draws at once as far as time allows, the rest in the next frames. */
  show(text, done) {
    this.#wanted = { text, done };
    clearTimeout(this.#timer);
    const wait = done ? 0 : this.#rest - performance.now();
    if (wait > 0) this.#later(wait);
    else this.#draw();
  }

  /** Cancel pending drawing. */
  close() {
    clearTimeout(this.#timer);
  }

  #later(wait) {
    clearTimeout(this.#timer);
    // not an animation frame: those pause while the page is hidden
    this.#timer = setTimeout(() => this.#draw(), wait);
  }

  #draw() {
    const { text, done } = this.#wanted;
    const began = performance.now();
    if (!text.startsWith(this.#shown)) this.#forget();
    if (text.length > this.#shown.length) {
      this.#sure = Math.min(this.#sure, this.#growing.settled); // an answer that was done may continue
      this.#growing.push(text.slice(this.#shown.length));
    }
    this.#shown = text;
    const { groups, settled } = this.#growing;
    for (const old of this.#drawn.splice(groups.length)) old.box.remove();
    let longest = performance.now() - began;
    for (let i = this.#sure; i < groups.length; i++) {
      const now = performance.now();
      if (now - began > BUDGET && i > this.#sure) return this.#later(8);
      this.#drawGroup(groups[i], i, done || i < groups.length - 1);
      if (done || i < settled) this.#sure = i + 1;
      longest = Math.max(longest, performance.now() - now);
    }
    this.#rest = longest > SLOW ? performance.now() + Math.min(LONGEST_REST, longest * REST) : 0;
  }

  #forget() {
    this.#growing = new Growing();
    this.#drawn = [];
    this.#sure = 0;
    this.root.replaceChildren();
    this.#shown = "";
  }

  #drawGroup(group, i, final) {
    const before = this.#drawn[i];
    if (before?.raw === group.raw) {
      if (final) this.#colour(before, group, final);
      return;
    }
    if (before && this.#append(before, group)) return this.#colour(before, group, final);
    const box = element("div", "", clean(htmlOf(group.tokens)));
    for (const block of box.children) block.dir = block.tagName === "PRE" ? "ltr" : "auto";
    for (const pre of box.querySelectorAll("pre")) frameCode(pre);
    for (const table of box.querySelectorAll("table")) frameTable(table);
    for (const link of box.querySelectorAll("a[href]"))
      Object.assign(link, { target: "_blank", rel: "noopener noreferrer nofollow" });
    if (before) grow(before.box, box);
    else this.root.append(box);
    const shown = before?.box ?? box;
    for (const span of shown.querySelectorAll("span[data-tex]")) if (!DRAWN.has(span)) drawMath(span);
    if (shown.querySelector("h1, h2, h3, h4, h5, h6")) rank(this.root);
    this.#drawn[i] = { raw: group.raw, box: shown, isColoured: false };
    this.#colour(this.#drawn[i], group, final);
  }

  /** Append only the new characters to code that is still being written. */
  #append(drawn, { raw, tokens }) {
    const [token] = tokens;
    if (tokens.length !== 1 || token.type !== "code" || drawn.isColoured || !raw.startsWith(drawn.raw)) return false;
    const code = drawn.box.querySelector(":scope > .code code");
    const shown = code?.textContent;
    if (shown === undefined || !token.text.startsWith(shown) || code.dataset.language !== (token.lang ?? "").trim())
      return false;
    if (code.firstChild) code.firstChild.appendData(token.text.slice(shown.length));
    else code.append(token.text);
    drawn.raw = raw;
    return true;
  }

  #colour(drawn, group, final) {
    if (drawn.isColoured || (!final && !CLOSED.test(group.raw))) return;
    if (!final && group.raw.length > 4000) return; // once, at the end
    drawn.isColoured = true;
    for (const pre of drawn.box.querySelectorAll("pre")) colour(pre);
  }
}
