// LaTeX in markdown: $a$ and \(a\) inside a line, $$a$$, \[a\] and \begin{align} as a block. Money is not mathematics.

// pandoc's rule: no space inside the dollars, no digit right behind them, so that "$5 and $6" stays two prices
const DOLLAR = /^\$(?![\s$])((?:\\[^\n]|[^\\$\n])*?[^\s\\$]|(?:\\[^\n]|[^\\$\n])*\\[^\s])\$(?![\d$])/;
const ROUND = /^\\\(((?:[^\\\n]|\\[^()\n])+?)\\\)/;
const INLINE_DISPLAY = /^\$\$((?:\\[^\n]|[^\\$\n])+?)\$\$|^\\\[((?:[^\\\n]|\\[^[\]\n])+?)\\\]/;
const BLOCK = /^ {0,3}(?:\$\$((?:(?!\n[ \t]*\n)[^$])+?)\$\$|\\\[((?:(?!\n[ \t]*\n|\\\])[\s\S])+?)\\\])[ \t]*(?:\n|$)/;
/** Most characters of a formula with blank lines, which begins with a mark alone on its line or with an environment. */
export const REACH = 4000;
const ENVIRONMENT = String.raw`(?:align|aligned|alignat|alignedat|equation|flalign|gather|gathered|multline|split|cases|dcases|rcases|array|[pbBvV]?matrix|smallmatrix)\*?`;
const INLINE_ENVIRONMENT = new RegExp(String.raw`^\\begin\{(${ENVIRONMENT})\}(?:(?!\\end\{\1\})[^\n])+\\end\{\1\}`);
const WIDE = new RegExp(
  String.raw`^ {0,3}(?:\$\$[ \t]*\n([^$]{1,${REACH}}?)\n[ \t]*\$\$|\\\[[ \t]*\n((?:(?!\\\])[\s\S]){1,${REACH}}?)\n[ \t]*\\\]|` +
    String.raw`(\\begin\{(${ENVIRONMENT})\}(?:(?!\\end\{\4\})[\s\S]){1,${REACH}}\\end\{\4\}))[ \t]*(?:\n|$)`,
);
const OPENING = /^ {0,3}(?:(?:\$\$|\\\[)[ \t]*$|\\begin\{)/m;
const CLOSED = ["code", "mathBlock", "space", "list", "blockquote", "hr"]; // blocks that are complete

/** Whether a block's end may turn out to be the beginning of a formula. */
export const mayOpen = ({ type, raw }) => !CLOSED.includes(type) && OPENING.test(raw);

const LONGEST = 20000; // characters of one formula

const escaped = (text) =>
  text.replace(/[&<>"]/g, (c) => ({ "&": "&amp;", "<": "&lt;", ">": "&gt;", '"': "&quot;" })[c]);

function token(type, match, text, display) {
  return text.length > LONGEST ? undefined : { type, raw: match[0], tex: text.trim(), display };
}

// the source is stored in an attribute and drawn by view.js, so that no markup comes from here
const renderer = ({ tex, display }) =>
  `<span class="math${display ? " display" : ""}" data-tex="${escaped(tex)}">${escaped(tex)}</span>`;

export const mathBlock = {
  name: "mathBlock",
  level: "block",
  start: (text) => text.match(/\n {0,3}(?:\$\$|\\\[|\\begin\{)/)?.index,
  tokenizer(text) {
    const match = BLOCK.exec(text) ?? WIDE.exec(text);
    return match ? token("mathBlock", match, match[1] ?? match[2] ?? match[3], true) : undefined;
  },
  renderer,
};

export const mathInline = {
  name: "mathInline",
  level: "inline",
  start: (text) => text.match(/\$|\\[([]|\\begin\{/)?.index,
  tokenizer(text) {
    const wide = INLINE_DISPLAY.exec(text);
    if (wide) return token("mathInline", wide, wide[1] ?? wide[2], true);
    const environment = INLINE_ENVIRONMENT.exec(text);
    if (environment) return token("mathInline", environment, environment[0], true);
    const match = DOLLAR.exec(text) ?? ROUND.exec(text);
    return match ? token("mathInline", match, match[1], false) : undefined;
  },
  renderer,
};
