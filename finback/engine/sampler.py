"""From logits to tokens, one uniform random number per token and request.

Every row is treated by its own knobs and by nothing else, so that a request comes out the same in any company.
"""

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from finback.engine.request import COLD, Alternatives, SamplingParams, uniforms

__all__ = ["Knobs", "alternatives", "guess", "narrow", "sample", "uniforms"]

LEAST = 1e-6  # of top-p; less is lost in fp32, and nothing would be left
LIKELIEST = 512  # tokens looked at before the whole vocabulary is sorted for top-p


@dataclass(frozen=True)
class Knobs:
    """The sampling knobs of a batch as columns (rows, 1), None where no row uses one."""

    greedy: Tensor | None  # bool; None: no row is
    all_greedy: bool
    temperature: Tensor  # 1 for greedy rows
    tempered: bool  # whether any row's is another than 1
    top_k: Tensor | None
    most: int  # the largest top_k
    top_p: Tensor | None
    min_p: Tensor | None

    @classmethod
    def of(cls, rows: Sequence[SamplingParams], vocab: int, device: torch.device) -> "Knobs":
        """Columns for these rows."""

        def column(values: list[float], off: float) -> Tensor | None:
            return None if all(v == off for v in values) else torch.tensor(values, device=device)[:, None]

        greedy = [s.temperature < COLD for s in rows]
        warmth = [1.0 if g else s.temperature for s, g in zip(rows, greedy, strict=True)]
        # a greedy row needs no narrowing
        k = [vocab if g or not 0 < s.top_k < vocab else s.top_k for s, g in zip(rows, greedy, strict=True)]
        return cls(
            greedy=torch.tensor(greedy, device=device) if any(greedy) else None,
            all_greedy=all(greedy),
            temperature=torch.tensor(warmth, device=device)[:, None],
            tempered=any(t != 1 for t in warmth),
            top_k=None if min(k) == vocab else torch.tensor(k, device=device)[:, None],
            most=max((n for n in k if n < vocab), default=0),
            top_p=column([1.0 if g else max(s.top_p, LEAST) for s, g in zip(rows, greedy, strict=True)], 1.0),
            min_p=column([0.0 if g else s.min_p for s, g in zip(rows, greedy, strict=True)], 0.0),
        )


def sample(logits: Tensor, knobs: Knobs, uniform: Tensor) -> tuple[Tensor, Tensor]:
    """logits (n, vocab) fp32, uniform (n,) -> tokens (n,) and their log-probabilities (n,).

    Inverse of the cumulative distribution; greedy at temperature 0. The log-probabilities are those of the whole
    distribution at this temperature (at 1 when greedy): top-k, top-p and min-p only narrow the choice.
    """
    logp = (logits / knobs.temperature if knobs.tempered else logits).log_softmax(dim=-1)
    if knobs.all_greedy:
        tokens = logits.argmax(dim=-1)
    else:
        cumulative = narrow(logp.exp(), knobs).cumsum(dim=-1)
        # Scaling by the last entry keeps rounding from pointing behind the vocabulary.
        target = (uniform * cumulative[:, -1])[:, None]
        tokens = torch.searchsorted(cumulative, target, right=True).squeeze(1).clamp(max=logits.size(1) - 1)
        if knobs.greedy is not None:
            tokens = torch.where(knobs.greedy, logits.argmax(dim=-1), tokens)
    return tokens, logp.gather(1, tokens[:, None]).squeeze(1)


def guess(logits: Tensor, knobs: Knobs, uniform: Tensor) -> Tensor:
    """The tokens that `sample` would choose, without their log-probabilities."""
    return logits.argmax(dim=-1) if knobs.all_greedy else sample(logits, knobs, uniform)[0]


def narrow(p: Tensor, knobs: Knobs) -> Tensor:
    """Zero the probabilities (n, vocab) that top-k, then top-p, then min-p leave out; the rest is not rescaled.

    top-p keeps the fewest tokens whose share of what top-k left reaches it; min-p those with at least that share of the
    likeliest one's probability. The likeliest token always stays, and so do ties with the last one kept.
    """
    if knobs.top_k is not None:
        best = p.topk(knobs.most, dim=-1).values
        least = best.gather(1, (knobs.top_k - 1).clamp(max=knobs.most - 1))
        p = _at_least(p, least.masked_fill(knobs.top_k > knobs.most, 0.0))  # rows without top-k stay whole
    if knobs.top_p is not None:
        p = _at_least(p, _nucleus(p, knobs.top_p))
    if knobs.min_p is not None:
        p = _at_least(p, knobs.min_p * p.max(dim=-1, keepdim=True).values)
    return p


def _nucleus(p: Tensor, top_p: Tensor) -> Tensor:
    """The smallest probability that top-p keeps, (n, 1); 0 where top_p is 1."""
    needed = top_p * p.sum(dim=-1, keepdim=True)
    # Sorting a vocabulary costs more than a small model's whole step, and the likeliest tokens nearly always suffice.
    ordered = p.topk(min(LIKELIEST, p.size(1)), dim=-1).values
    if bool(((ordered.sum(dim=-1, keepdim=True) < needed) & (top_p < 1)).any()):
        ordered = p.sort(dim=-1, descending=True).values
    before = ordered.cumsum(dim=-1) - ordered
    least = ordered.masked_fill(before >= needed, 2.0).min(dim=-1, keepdim=True).values
    return least.masked_fill(top_p == 1, 0.0)


def _at_least(p: Tensor, least: Tensor) -> Tensor:
    return p.masked_fill(p < least, 0.0)


def alternatives(logits: Tensor, tokens: Sequence[int], counts: Sequence[int]) -> list[Alternatives]:
    """For each row of logits (n, vocab): the token given, then the `counts` likeliest, with log-probabilities at 1."""
    logp = logits.log_softmax(dim=-1)
    own = logp.gather(1, torch.tensor(tokens, device=logits.device)[:, None]).squeeze(1).tolist()
    best = logp.topk(min(max(counts), logits.size(1)), dim=-1) if max(counts) else None
    found = []
    for row, (token, value, count) in enumerate(zip(tokens, own, counts, strict=True)):
        line: Alternatives = [(token, value)]
        if best is not None:
            line += zip(best.indices[row, :count].tolist(), best.values[row, :count].tolist(), strict=True)
        found.append(line)
    return found
