// An answer token by token: how sure the model was of each, and which others were likely.
import { html } from "../lib.js";
import { Pieces, percent, visible } from "../pieces.js";

/** From 0 for an almost certain token to 4 for a surprising one. */
const surprise = (logprob) => [0.9, 0.6, 0.3, 0.1].filter((p) => Math.exp(logprob) < p).length;

export function Tokens({ tokens }) {
  const others = ([text, , likely]) => likely.filter(([other]) => other !== text);
  return html`
    <${Pieces} label="The answer by tokens" hint="Point at a token, or use the arrow keys, to see how likely it was."
      texts=${tokens.map(([text]) => text)} styles=${tokens.map(([, logprob, , drafted]) => `s${surprise(logprob)} ${drafted ? "drafted" : ""}`)}
      detail=${(i) => html`${percent(tokens[i][1])}${tokens[i][3] && html`<em>drafted by MTP and right</em>`}${others(tokens[i]).map(([text, p]) => html`<span key=${text}><code>${visible(text)}</code> ${percent(p)}</span>`)}`} />`;
}
