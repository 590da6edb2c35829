// Highlights code in the vendored languages.
import hljs from "../vendor/highlight.js";
import bash from "../vendor/languages/bash.js";
import c from "../vendor/languages/c.js";
import cpp from "../vendor/languages/cpp.js";
import css from "../vendor/languages/css.js";
import diff from "../vendor/languages/diff.js";
import go from "../vendor/languages/go.js";
import java from "../vendor/languages/java.js";
import javascript from "../vendor/languages/javascript.js";
import json from "../vendor/languages/json.js";
import latex from "../vendor/languages/latex.js";
import markdown from "../vendor/languages/markdown.js";
import python from "../vendor/languages/python.js";
import rust from "../vendor/languages/rust.js";
import sql from "../vendor/languages/sql.js";
import typescript from "../vendor/languages/typescript.js";
import xml from "../vendor/languages/xml.js";
import yaml from "../vendor/languages/yaml.js";

const KNOWN = {
  bash,
  c,
  cpp,
  css,
  diff,
  go,
  java,
  javascript,
  json,
  latex,
  markdown,
  python,
  rust,
  sql,
  typescript,
  xml,
  yaml,
};
for (const [name, language] of Object.entries(KNOWN)) hljs.registerLanguage(name, language);

const LONGEST = 30000; // characters; highlighting more would block the page for a moment

/** Highlighted HTML, not yet sanitised; undefined if the language is unknown or the code too long. */
export function coloured(text, language) {
  if (!language || text.length > LONGEST || !hljs.getLanguage(language)) return undefined;
  return hljs.highlight(text, { language, ignoreIllegals: true }).value;
}
