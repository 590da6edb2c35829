// LaTeX in markdown: $a$ and \(a\) inside a line, $$a$$ and \[a\] as a block. Money is not mathematics.

// pandoc's rule: no space inside the dollars, no digit right behind them, so that "$5 and $6" stays two prices
const DOLLAR = /^\$(?![\s$])((?:\\[^\n]|[^\\$\n])*?[^\s\\$]|(?:\\[^\n]|[^\\$\n])*\\[^\s])\$(?![\d$])/;
const ROUND = /^\\\(((?:[^\\\n]|\\[^()\n])+?)\\\)/;
const INLINE_DISPLAY = /^\$\$((?:\\[^\n]|[^\\$\n])+?)\$\$|^\\\[((?:[^\\\n]|\\[^[\]\n])+?)\\\]/;
// a block holds no blank line: what comes behind one can never change what stood before it
const BLOCK = /^ {0,3}(?:\$\$((?:(?!\n[ \t]*\n)[^$])+?)\$\$|\\\[((?:(?!\n[ \t]*\n|\\\])[\s\S])+?)\\\])[ \t]*(?:\n|$)/;
const LONGEST = 20000; // characters of one formula

const escaped = (text) =>
  text.replace(/[&<>"]/g, (c) => ({ "&": "&amp;", "<": "&lt;", ">": "&gt;", '"': "&quot;" })[c]);

function token(type, match, text, display) {
  return text.length > LONGEST ? undefined : { type, raw: match[0], tex: text.trim(), display };
}

// only where the formula is waits in an attribute; view.js draws it, so that no markup comes from here
const renderer = ({ tex, display }) =>
  `<span class="math${display ? " display" : ""}" data-tex="${escaped(tex)}">${escaped(tex)}</span>`;

export const mathBlock = {
  name: "mathBlock",
  level: "block",
  start: (text) => text.match(/\n {0,3}(?:\$\$|\\\[)/)?.index,
  tokenizer(text) {
    const match = BLOCK.exec(text);
    return match ? token("mathBlock", match, match[1] ?? match[2], true) : undefined;
  },
  renderer,
};

export const mathInline = {
  name: "mathInline",
  level: "inline",
  start: (text) => text.match(/\$|\\[([]/)?.index,
  tokenizer(text) {
    const wide = INLINE_DISPLAY.exec(text);
    if (wide) return token("mathInline", wide, wide[1] ?? wide[2], true);
    const match = DOLLAR.exec(text) ?? ROUND.exec(text);
    return match ? token("mathInline", match, match[1], false) : undefined;
  },
  renderer,
};
