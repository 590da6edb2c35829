// The difference between two texts, word by word.
import { html } from "../lib.js";

const CELLS = 4e6; // of the table of common words; longer texts are compared only by their beginning and end
const cutter = Intl.Segmenter && new Intl.Segmenter(undefined, { granularity: "word" });

/** A text's words, blanks and signs; the browser segments scripts without blanks. */
const wordsOf = (text) =>
  cutter ? Array.from(cutter.segment(text), (s) => s.segment) : (text.match(/\s+|[\p{L}\p{N}]+|[^\s\p{L}\p{N}]/gu) ?? []);

/** [kind, text] in order: "same" in both, "gone" from the first, "fresh" in the second. */
export function difference(before, after) {
  const [a, b] = [wordsOf(before), wordsOf(after)];
  let start = 0;
  while (start < Math.min(a.length, b.length) && a[start] === b[start]) start++;
  let end = 0;
  while (end < Math.min(a.length, b.length) - start && a.at(-1 - end) === b.at(-1 - end)) end++;
  const middle = between(a.slice(start, a.length - end), b.slice(start, b.length - end));
  return joined([["same", a.slice(0, start).join("")], ...middle, ["same", end ? a.slice(-end).join("") : ""]]);
}

/** The same for two lists of words, by their longest common subsequence. */
function between(a, b) {
  const wide = b.length + 1;
  if ((a.length + 1) * wide > CELLS) return [["gone", a.join("")], ["fresh", b.join("")]];
  const common = new Uint16Array((a.length + 1) * wide); // of the words from i and from j on
  for (let i = a.length - 1; i >= 0; i--)
    for (let j = b.length - 1; j >= 0; j--)
      common[i * wide + j] =
        a[i] === b[j]
          ? common[(i + 1) * wide + j + 1] + 1
          : Math.max(common[(i + 1) * wide + j], common[i * wide + j + 1]);
  const found = [];
  let [i, j] = [0, 0];
  while (i < a.length || j < b.length) {
    if (i < a.length && j < b.length && a[i] === b[j]) (found.push(["same", a[i]]), i++, j++);
    else if (j === b.length || (i < a.length && common[(i + 1) * wide + j] >= common[i * wide + j + 1]))
      found.push(["gone", a[i++]]);
    else found.push(["fresh", b[j++]]);
  }
  return found;
}

/** Merges neighbours of one kind. */
function joined(parts) {
  const found = [];
  for (const [kind, text] of parts.filter(([, text]) => text)) {
    if (found.at(-1)?.[0] === kind) found.at(-1)[1] += text;
    else found.push([kind, text]);
  }
  return found;
}

/** A text with its changes since another one marked. */
export const Changed = ({ before, after }) =>
  difference(before, after).map(([kind, text], i) =>
    kind === "same" ? text : kind === "gone" ? html`<del key=${i}>${text}</del>` : html`<ins key=${i}>${text}</ins>`,
  );
