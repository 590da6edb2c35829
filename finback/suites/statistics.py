"""Statistics of scores on a fixed list of questions: intervals, paired differences, pass@k, majority@k.

Samples of one question are not independent, so all statistics are over questions. Does not import torch.
"""

import math
from collections import Counter
from collections.abc import Hashable, Sequence
from dataclasses import dataclass

import numpy as np

from finback.suites.intervals import LEVEL, limits_of_difference, limits_of_mean

RESAMPLES = 10_000
_EXACT = 14  # up to this many differing questions, all combinations of signs are enumerated
_AT_ONCE = 4_000_000  # random signs drawn at a time


@dataclass(frozen=True)
class Difference:
    """The difference of two models' scores on the same questions: one minus other."""

    mean: float
    low: float
    high: float
    # two-sided p-value of the sign-flip test on the questions' differences
    p: float
    # questions that both answered
    n: int

    @property
    def is_significant(self) -> bool:
        """Whether the interval excludes 0 and p is at most 1 - LEVEL."""
        return (self.low > 0 or self.high < 0) and self.p <= 1 - LEVEL


def pass_at_k(n: int, right: int, k: int) -> float:
    """The probability that at least one of k of n samples is right, 1 - C(n-c, k) / C(n, k) (Chen et al. 2021, equation 1)."""
    assert 0 <= right <= n and 1 <= k <= n, "0 <= right <= n and 1 <= k <= n must hold"
    return 1 - math.comb(n - right, k) / math.comb(n, k)


def majority(votes: Sequence[Hashable | None], right: Sequence[bool]) -> float:
    """1 if the most frequent answer is right, else 0; in a tie, the share of the tied answers that is right.

    Equal `votes` are equal answers, None is no vote. Right answers count as one answer, however they are written.
    """
    cast = ["right" if ok else ("wrong", vote) for vote, ok in zip(votes, right, strict=True) if ok or vote is not None]
    if not cast:
        return 0.0
    counts = Counter(cast)
    most = [vote for vote, count in counts.items() if count == max(counts.values())]
    return float("right" in most) / len(most)


def interval(values: Sequence[float], level: float = LEVEL) -> tuple[float, float]:
    """The interval of the mean of the questions' scores, each in 0..1."""
    assert values, "an interval needs at least one question"
    low, high = limits_of_mean(np.asarray(values, dtype=float), level)
    return float(low), float(high)


def paired(one: Sequence[float], other: Sequence[float], seed: int, level: float = LEVEL) -> Difference:
    """Compares two models' scores on the same questions in the same order; `seed` is for the sign flips."""
    assert len(one) == len(other) > 0, "both need the same questions, at least one"
    gaps = np.asarray(one, dtype=float) - np.asarray(other, dtype=float)
    low, high = limits_of_difference(gaps, level)
    return Difference(float(gaps.mean()), float(low), float(high), sign_flips(gaps, seed), len(gaps))


def sign_flips(gaps: np.ndarray, seed: int) -> float:
    """The two-sided p-value of the sign-flip test, whose null hypothesis is that each gap may have either sign."""
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
    return (extreme + 1) / (RESAMPLES + 1)  # counts the observed signs as one of the outcomes


def holm(p_values: Sequence[float]) -> list[float]:
    """p-values of several comparisons, adjusted by Holm's method (1979)."""
    order = sorted(range(len(p_values)), key=lambda i: p_values[i])
    raised, highest = [1.0] * len(p_values), 0.0
    for rank, place in enumerate(order):
        highest = max(highest, min(1.0, (len(p_values) - rank) * p_values[place]))
        raised[place] = highest
    return raised


def _rows(n: int) -> list[int]:
    """RESAMPLES split into batches that fit in memory, for n questions."""
    most = max(1, _AT_ONCE // n)
    return [min(most, RESAMPLES - start) for start in range(0, RESAMPLES, most)]
