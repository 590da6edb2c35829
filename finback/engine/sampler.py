"""From scores to tokens, one uniform random number per token and sequence."""

import numpy as np
import torch
from torch import Tensor

from finback.engine.sequence import Sampling


def uniforms(seed: int, count: int) -> np.ndarray:
    """The random numbers of one sequence, (count,) in [0, 1): a function of its seed alone."""
    return np.random.Generator(np.random.Philox(seed)).random(count, dtype=np.float32)


def sample(scores: Tensor, sampling: Sampling, uniform: Tensor) -> tuple[Tensor, Tensor]:
    """scores (n, vocab) fp32, uniform (n,) -> tokens (n,) and their log-probabilities (n,).

    Inverse of the cumulative distribution; greedy at temperature 0. The log-probabilities are those of the whole
    distribution at this temperature (at 1 when greedy): top-k, top-p and min-p only narrow the choice.
    """
    if sampling.temperature == 0:
        logp = scores.log_softmax(dim=-1)
        tokens = scores.argmax(dim=-1)
    else:
        logp = (scores / sampling.temperature).log_softmax(dim=-1)
        cumulative = narrow(logp.exp(), sampling).cumsum(dim=-1)
        # Scaling by the last entry keeps rounding from pointing behind the vocabulary.
        target = (uniform * cumulative[:, -1])[:, None]
        tokens = torch.searchsorted(cumulative, target, right=True).squeeze(1).clamp(max=scores.size(1) - 1)
    return tokens, logp.gather(1, tokens[:, None]).squeeze(1)


def narrow(p: Tensor, sampling: Sampling) -> Tensor:
    """Zero the probabilities (n, vocab) that top-k, then top-p, then min-p leave out; the rest is not rescaled.

    top-p keeps the fewest tokens whose share of what top-k left reaches it; min-p those with at least that share of the
    likeliest one's probability. The likeliest token always stays, and so do ties with the last one kept.
    """
    if 0 < sampling.top_k < p.size(1):
        p = _at_least(p, p.topk(sampling.top_k, dim=-1).values[:, -1:])
    if sampling.top_p < 1:
        ordered = p.sort(dim=-1, descending=True).values
        before = ordered.cumsum(dim=-1) - ordered
        inside = before < sampling.top_p * ordered.sum(dim=-1, keepdim=True)
        p = _at_least(p, ordered.masked_fill(~inside, 2.0).min(dim=-1, keepdim=True).values)
    if sampling.min_p > 0:
        p = _at_least(p, sampling.min_p * p.max(dim=-1, keepdim=True).values)
    return p


def _at_least(p: Tensor, least: Tensor) -> Tensor:
    return p.masked_fill(p < least, 0.0)
