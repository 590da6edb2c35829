"""What scores on a fixed list of questions can say: intervals over questions, paired differences, pass@k, majority@k.

Samples of one question are not independent, so questions are what is drawn again (a cluster bootstrap). No torch here.
"""

import math
from collections import Counter
from collections.abc import Hashable, Sequence
from dataclasses import dataclass
from statistics import NormalDist

import numpy as np

LEVEL = 0.95
RESAMPLES = 10_000
FEW = 10.0  # right or wrong answers, in questions' worth, below which resampled means are too lumpy to be trusted
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


def interval(values: Sequence[float], seed: int, level: float = LEVEL) -> tuple[float, float]:
    """The bootstrap interval of the mean of the questions' scores, each in 0..1.

    Percentiles are moved outwards as Student's t asks (Hesterberg 2015, section 5.3): plain ones are too narrow for few
    questions. Where nearly all are right or wrong it is Wilson's, of as many independent answers as the spread between
    questions says these are worth; resampling what holds no mistake would promise that there is none.
    """
    assert values, "no questions, no interval"
    scores = np.asarray(values, dtype=float)
    mean, n = float(scores.mean()), len(scores)
    if n * min(mean, 1 - mean) < FEW:
        return wilson(mean, _worth(scores, level), level)
    low, high = _percentiles(scores, seed, level)
    return max(0.0, low), min(1.0, high)


def paired(one: Sequence[float], other: Sequence[float], seed: int, level: float = LEVEL) -> Difference:
    """Compare two models' scores on the same questions, in the same order."""
    assert len(one) == len(other) > 0, "the same questions for both, and one at least"
    gaps = np.asarray(one, dtype=float) - np.asarray(other, dtype=float)
    low, high = _percentiles(gaps, seed, level)
    return Difference(float(gaps.mean()), max(-1.0, low), min(1.0, high), sign_flips(gaps, seed), len(gaps))


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


def wilson(mean: float, n: float, level: float = LEVEL) -> tuple[float, float]:
    """Wilson's interval (1927) of a share of n answers; n need not be whole."""
    z = NormalDist().inv_cdf((1 + level) / 2)
    centre, spread = mean + z * z / (2 * n), z * math.sqrt(mean * (1 - mean) / n + z * z / (4 * n * n))
    low, high = (centre - spread) / (1 + z * z / n), (centre + spread) / (1 + z * z / n)
    return max(0.0, low), min(1.0, high)


def student(p: float, degrees: int) -> float:
    """The quantile of Student's t, by its expansion around the normal one (Abramowitz and Stegun 26.7.5)."""
    if degrees == 1:
        return math.tan(math.pi * (p - 0.5))
    if degrees == 2:
        return (2 * p - 1) / math.sqrt(2 * p * (1 - p))
    z = NormalDist().inv_cdf(p)
    terms = (
        (z**3 + z) / 4,
        (5 * z**5 + 16 * z**3 + 3 * z) / 96,
        (3 * z**7 + 19 * z**5 + 17 * z**3 - 15 * z) / 384,
        (79 * z**9 + 776 * z**7 + 1482 * z**5 - 1920 * z**3 - 945 * z) / 92160,
    )
    return z + sum(term / degrees ** (i + 1) for i, term in enumerate(terms))


def _percentiles(values: np.ndarray, seed: int, level: float) -> tuple[float, float]:
    """Percentiles of means of resampled questions, at levels widened for how many there are."""
    n = len(values)
    if n == 1:  # one question says nothing of others
        return -1.0, 1.0
    rng = np.random.default_rng(seed)
    means = np.concatenate([values[rng.integers(0, n, (rows, n))].mean(axis=1) for rows in _rows(n)])
    tail = NormalDist().cdf(-math.sqrt(n / (n - 1)) * student((1 + level) / 2, n - 1))
    low, high = np.quantile(means, [tail, 1 - tail])
    return float(low), float(high)


def _worth(values: np.ndarray, level: float) -> float:
    """How many independent answers the questions' scores are worth (Korn and Graubard 1998): questions at the least."""
    n, mean = len(values), float(values.mean())
    if n < 2 or values.var() == 0:
        return float(n)
    upper = (1 + level) / 2
    doubt = (NormalDist().inv_cdf(upper) / student(upper, n - 1)) ** 2  # the spread itself is known from n questions
    return max(float(n), doubt * mean * (1 - mean) / (float(values.var(ddof=1)) / n))


def _rows(n: int) -> list[int]:
    """RESAMPLES cut into parts of which each fits into memory, for n questions."""
    most = max(1, _AT_ONCE // n)
    return [min(most, RESAMPLES - start) for start in range(0, RESAMPLES, most)]
