// Rules for text that is not English: emphasis next to Chinese, Japanese and Korean, ends of links; and the tags that models write.
import { Lexer, Tokenizer } from "../vendor/marked.js";

const CJK = "\\p{Script=Han}\\p{Script=Hiragana}\\p{Script=Katakana}\\p{Script=Hangul}\\p{Script=Bopomofo}\\u3000-\\u303f\\ufe10-\\ufe4f\\uff00-\\uffef";
// characters next to asterisks: P is punctuation outside CJK, C is CJK, A is any other; a tilde counts as a letter
const P = `(?![~${CJK}])[\\p{P}\\p{S}]`;
const A = `(?:(?![${CJK}])[^\\s\\p{P}\\p{S}]|~)`;
const PC = `(?:[${CJK}]|${P})`;
const AC = `(?:[${CJK}]|${A})`;

// github.com/tats-u/markdown-cjk-friendly: CJK punctuation counts as a letter, and next to CJK other punctuation binds as
// next to a space. The groups are those of marked: 1 and 2 end emphasis, 3 and 4 begin it, 5 and 6 may do both.
const ENDS = [
  "^[^_*]*?__[^_*]*?\\*[^_*]*?(?=__)",
  "[^*]+(?=[^*])",
  "(?!\\*)[^\\s*](\\*+)(?=\\s|$)",
  `${A}(\\*+)(?!\\*)(?=${P})`,
  `(?!\\*)${P}(\\*+)(?=${A})`,
  "\\s(\\*+)(?!\\*)(?=[^\\s*])",
  `(?!\\*)${PC}(\\*+)(?!\\*)(?=${PC})`,
  `${AC}(\\*+)(?=${AC})`,
];
const RULES = {
  emStrongLDelim: new RegExp(`^(?:\\*+(?:((?!\\*)${P})|([^\\s*]))?)|^_+(?:((?!_)${P})|([^\\s_]))?`, "u"),
  emStrongRDelimAst: new RegExp(ENDS.join("|"), "gu"),
  punctuation: new RegExp(`^((?![*_])(?:\\s|${PC}))`, "u"),
};

const LINK_END = /(?=[\u3000-\u303f\ufe10-\ufe4f\uff00-\uffef])[\p{P}\p{S}\p{Z}]|[“”‘’…—،؛؟۔।॥]/u; // Arabic's and Devanagari's too
// two tildes, since one means "to" in CJK, as in 3~5
const GONE = /^~~(?=[^\s~])((?:\\[\s\S]|[^\\])*?(?:\\[\s\S]|[^\s~\\]))~~(?=[^~]|$)/;
const BREAK = /^<br\s*\/?>/i;
const STYLED = /^<(sub|sup|kbd|mark|small|u|s|b|i|em|strong|del)>((?:(?!<\/?\1>)[\s\S])+?)<\/\1>/i;

class Words extends Tokenizer {
  del(text) {
    const match = GONE.exec(text);
    return match ? { type: "del", raw: match[0], text: match[1], tokens: this.lexer.inlineTokens(match[1]) } : undefined;
  }

  url(text) {
    const found = super.url(text);
    const end = found ? found.raw.search(LINK_END) : -1;
    return end < 0 ? found : super.url(text.slice(0, end));
  }

  /** HTML is shown as text, except for line breaks. */
  tag(text) {
    const match = BREAK.exec(text);
    return match ? { type: "br", raw: match[0] } : undefined;
  }

  html() {}

  // references would let the end of a text change its beginning
  def() {}

  reflink() {}
}

/** Tags without attributes around a piece of a line, as in H<sub>2</sub>O. */
export const styled = {
  name: "styled",
  level: "inline",
  start: (text) => text.match(/<[a-z]/i)?.index,
  tokenizer(text) {
    const match = STYLED.exec(text);
    if (!match) return undefined;
    const [raw, tag, inner] = match;
    return { type: "styled", raw, tag: tag.toLowerCase(), tokens: this.lexer.inlineTokens(inner) };
  },
  renderer({ tag, tokens }) {
    return `<${tag}>${this.parser.parseInline(tokens)}</${tag}>`;
  },
};

/** The tokens of a markdown text. */
export function tokensOf(text, options) {
  const lexer = new Lexer({ ...options, tokenizer: new Words() });
  lexer.tokenizer.rules.inline = { ...lexer.tokenizer.rules.inline, ...RULES };
  return lexer.lex(text);
}
