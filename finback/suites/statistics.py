"""What scores on a fixed list of questions can say: intervals over questions, paired differences, pass@k, majority@k.

Samples of one question are not independent, so everything is over questions. Does not import torch.
"""

import math
from collections import Counter
from collections.abc import Hashable, Sequence
from dataclasses import dataclass

import numpy as np

from finback.suites.intervals import LEVEL, limits_of_difference, limits_of_mean

RESAMPLES = 10_000
_EXACT = 14  # questions that differ, up to which every choice of signs is tried
_AT_ONCE = 4_000_000  # numbers drawn at a time


@dataclass(frozen=True)
class Difference:
    """How much better one model is than another on the same questions, one minus other."""

    mean: float
    low: float
    high: float
    # of a difference this large if the two were alike: sign flips of the questions' differences
    p: float
    # questions that both have answered
    n: int

    @property
    def is_significant(self) -> bool:
        """Whether the questions show which is better: the interval leaves 0 out and chance hardly explains it."""
        return (self.low > 0 or self.high < 0) and self.p <= 1 - LEVEL


def pass_at_k(n: int, right: int, k: int) -> float:
    """The chance that one of k of n samples is right, 1 - C(n-c, k) / C(n, k) (Chen et al. 2021, equation 1)."""
    assert 0 <= right <= n and 1 <= k <= n, "k of n samples, some of them right"
    return 1 - math.comb(n - right, k) / math.comb(n, k)


def majority(votes: Sequence[Hashable | None], right: Sequence[bool]) -> float:
    """Whether the answer given most often is right; where several are, the share of them that is.

    `votes` say which answers are the same, None is no vote; right answers are one answer, however they are written.
    """
    cast = ["right" if ok else ("wrong", vote) for vote, ok in zip(votes, right, strict=True) if ok or vote is not None]
    if not cast:
        return 0.0
    counts = Counter(cast)
    most = [vote for vote, count in counts.items() if count == max(counts.values())]
    return float("right" in most) / len(most)


def interval(values: Sequence[float], level: float = LEVEL) -> tuple[float, float]:
    """The interval of the mean of the questions' scores, each in 0..1."""
    assert values, "no questions, no interval"
    low, high = limits_of_mean(np.asarray(values, dtype=float), level)
    return float(low), float(high)


def paired(one: Sequence[float], other: Sequence[float], seed: int, level: float = LEVEL) -> Difference:
    """Compare two models' scores on the same questions, in the same order; the seed is that of the sign flips."""
    assert len(one) == len(other) > 0, "the same questions for both, and one at least"
    gaps = np.asarray(one, dtype=float) - np.asarray(other, dtype=float)
    low, high = limits_of_difference(gaps, level)
    return Difference(float(gaps.mean()), float(low), float(high), sign_flips(gaps, seed), len(gaps))


def sign_flips(gaps: np.ndarray, seed: int) -> float:
    """The p-value, two-sided, of a mean this far from 0 if each gap could as well have had the other sign."""
    gaps = gaps[gaps != 0]
    if not len(gaps):
        return 1.0
    seen = abs(gaps.sum()) - 1e-9
    if len(gaps) <= _EXACT:
        signs = 1 - 2 * ((np.arange(2 ** len(gaps))[:, None] >> np.arange(len(gaps))) & 1)
        return float((abs(signs @ gaps) >= seen).mean())
    rng, extreme = np.random.default_rng(seed), 0
    for rows in _rows(len(gaps)):
        signs = 1 - 2 * rng.integers(0, 2, (rows, len(gaps)), dtype=np.int8)
        extreme += int((abs(signs @ gaps) >= seen).sum())
    return (extreme + 1) / (RESAMPLES + 1)  # what was seen is one of the possible outcomes


def holm(p_values: Sequence[float]) -> list[float]:
    """p-values of several comparisons, raised so that all that stay low hold together (Holm 1979)."""
    order = sorted(range(len(p_values)), key=lambda i: p_values[i])
    raised, highest = [1.0] * len(p_values), 0.0
    for rank, place in enumerate(order):
        highest = max(highest, min(1.0, (len(p_values) - rank) * p_values[place]))
        raised[place] = highest
    return raised


def _rows(n: int) -> list[int]:
    """RESAMPLES cut into parts of which each fits into memory, for n questions."""
    most = max(1, _AT_ONCE // n)
    return [min(most, RESAMPLES - start) for start in range(0, RESAMPLES, most)]
