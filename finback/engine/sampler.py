"""From scores to tokens, one uniform random number per token and sequence."""

import numpy as np
import torch
from torch import Tensor


def uniforms(seed: int, count: int) -> np.ndarray:
    """The random numbers of one sequence, (count,) in [0, 1): a function of its seed alone."""
    return np.random.Generator(np.random.Philox(seed)).random(count, dtype=np.float32)


def sample(scores: Tensor, temperature: float, uniform: Tensor) -> tuple[Tensor, Tensor]:
    """scores (n, vocab) fp32, uniform (n,) -> tokens (n,) and their log-probabilities (n,).

    Inverse of the cumulative distribution; greedy at temperature 0, then with log-probabilities at temperature 1.
    """
    if temperature == 0:
        logp = scores.log_softmax(dim=-1)
        tokens = scores.argmax(dim=-1)
    else:
        logp = (scores / temperature).log_softmax(dim=-1)
        cumulative = logp.exp().cumsum(dim=-1)
        # Scaling by the last entry keeps rounding from pointing behind the vocabulary.
        target = (uniform * cumulative[:, -1])[:, None]
        tokens = torch.searchsorted(cumulative, target, right=True).squeeze(1).clamp(max=scores.size(1) - 1)
    return tokens, logp.gather(1, tokens[:, None]).squeeze(1)
