"""95 % confidence intervals of mean scores over questions, and of the mean difference of two models on the same questions.

The questions are the random sample; several answers to a question only make its score more exact. A score is any number in
0..1. All functions are closed formulas along the last axis of arrays, without torch or random numbers. `benchmarks/coverage.py`
measures how often the intervals contain the true value.
"""

import math
from statistics import NormalDist

import numpy as np

Limits = tuple[np.ndarray, np.ndarray]

LEVEL = 0.95
# Pseudo-questions added to the sample with the largest possible variance: what never occurs among n may occur at a rate of
# three in n (the rule of three). Without them, a few equal scores would imply that all others are equal too.
_IMAGINED = 3.0
_NOTHING = 1e-9  # fewer right answers than this are rounding errors of 0
_SMALLEST = -700.0  # the logarithm of the smallest limit that is distinguished from 0


def limits_of_mean(scores: np.ndarray, level: float = LEVEL) -> Limits:
    """The interval of the mean of scores [..., questions] in 0..1; its width is never 0."""
    n = scores.shape[-1]
    variance = scores.var(axis=-1, ddof=1) if n > 1 else np.zeros(scores.shape[:-1])
    return limits_of_moments(scores.mean(axis=-1), variance, n, level)


def limits_of_moments(
    mean: np.ndarray, variance: np.ndarray, n: int, level: float = LEVEL, largest: float | np.ndarray = 1.0
) -> Limits:
    """The interval from mean and variance (with n - 1) of n scores in 0..`largest`.

    As for complex samples (Korn and Graubard 1998), it is the interval of a binomial share, here mid-P, with the effective
    number of independent answers. This number is at least n, since scores in 0..1 vary at most as much as 0 and 1 do; it is
    reduced by Student's t, because n questions determine their variance only roughly.
    """
    worth = np.full(np.shape(mean), float(n))
    if n > 1:
        upper = (1 + level) / 2
        doubt = (NormalDist().inv_cdf(upper) / student(upper, n - 1)) ** 2
        imagined = _IMAGINED / 4  # 1/4 is the variance of 0 and 1 with equal probability
        spread = (n * variance + imagined * largest) / (n * mean * (1 - mean) + imagined)
        worth = np.maximum(worth, doubt * n / spread)
    return mid_p(mean * worth, worth, level)


def limits_of_difference(gaps: np.ndarray, level: float = LEVEL) -> Limits:
    """The interval of the mean of gaps [..., questions], each in -1..1: one model's score minus another's.

    Gains and losses are two means with an interval each, combined by square-and-add (Newcombe 1998, method 10; Zou and
    Donner 2008), so that a model that has not lost a question yet may still lose some. The largest gap of a question is
    estimated from all gaps and from pseudo-questions with gaps of 1.
    """
    n, size = gaps.shape[-1], abs(gaps)
    largest = ((gaps**2).sum(axis=-1) + _IMAGINED) / (size.sum(axis=-1) + _IMAGINED)
    means, limits = [], []
    for part in (np.maximum(gaps, 0), np.maximum(-gaps, 0)):
        means.append(part.mean(axis=-1))
        variance = part.var(axis=-1) * n / max(n - 1, 1)
        limits.append(limits_of_moments(means[-1], variance, n, level, largest))
    (gained, lost), (gained_limits, lost_limits) = means, limits
    mean = gained - lost
    low = mean - _arm(gained, gained_limits[0], lost, lost_limits[1], largest)
    high = mean + _arm(lost, lost_limits[0], gained, gained_limits[1], largest)
    return np.maximum(low, -1.0), np.minimum(high, 1.0)


def _arm(less: np.ndarray, fewest: np.ndarray, more: np.ndarray, most: np.ndarray, largest: np.ndarray) -> np.ndarray:
    """The distance from a difference to its limit, at which one mean is at its limit `fewest` and the other at `most`.

    A question is gained or lost, never both, which correlates the two means negatively. The correlation is taken at these
    limits, since the data show none while no question has been lost.
    """
    free = np.maximum((largest - fewest) * (largest - most), 1e-12)
    correlation = -np.minimum(1.0, np.sqrt(fewest * most / free))
    down, up = less - fewest, most - more
    return np.sqrt(down**2 + up**2 - 2 * correlation * down * up)


def mid_p(right: np.ndarray, n: np.ndarray, level: float = LEVEL) -> Limits:
    """The mid-P interval of a share, `right` of n answers, not necessarily integers (Lancaster 1961; Berry and Armitage 1995)."""
    return _lower(right, n, (1 - level) / 2), 1 - _lower(n - right, n, (1 - level) / 2)


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


def _lower(right: np.ndarray, n: np.ndarray, tail: float) -> np.ndarray:
    """The share p with P(X > right) + P(X = right) / 2 = tail for X of n answers; 0 if none is right.

    Newton's method for the logarithm of that probability in log p, of which it is a concave function.
    """
    known = np.where(right > _NOTHING, right, 1.0)  # an arbitrary number where the result is 0
    choose = _log_gamma(n + 1) - _log_gamma(known + 1) - _log_gamma(n - known + 1)
    log_p = np.log(np.minimum(known / n, 0.999))
    for _ in range(100):
        p = np.exp(log_p)
        log_exactly = choose + known * log_p + (n - known) * np.log1p(-p)
        # the probability and its slope in log p, both divided by P(X = right)
        more = (1 - p) * _continued_fraction(known, n - known + 1, p) - 0.5
        slope = (known + (n - known) * p / (1 - p)) / 2
        step = (log_exactly + np.log(more) - math.log(tail)) * more / slope
        log_p = np.clip(log_p - step, _SMALLEST, -1e-12)
        if np.all((abs(step) < 1e-10) | (log_p == _SMALLEST)):
            break
    return np.where(right > _NOTHING, np.exp(log_p), 0.0)


def _continued_fraction(a: np.ndarray, b: np.ndarray, x: np.ndarray) -> np.ndarray:
    """I_x(a, b) a B(a, b) / (x^a (1-x)^b) (Abramowitz and Stegun 26.5.8), by Lentz's method; for x below the mean."""
    tiny = 1e-300
    c, d = np.ones_like(x), 1 / (1 - (a + b) * x / (a + 1))
    value = d
    for m in range(1, 10_000):
        even = m * (b - m) * x / ((a + 2 * m - 1) * (a + 2 * m))
        odd = -(a + m) * (a + b + m) * x / ((a + 2 * m) * (a + 2 * m + 1))
        for term in (even, odd):
            d = 1 + term * d
            d = 1 / np.where(d == 0, tiny, d)
            c = 1 + term / np.where(c == 0, tiny, c)
            value = value * c * d
        if np.all(abs(c * d - 1) < 1e-12):
            break
    return value


def _log_gamma(x: np.ndarray) -> np.ndarray:
    """log Γ(x) for x >= 1, by Stirling's series at x + 10 (Abramowitz and Stegun 6.1.40)."""
    up = x + 10
    series = 1 / (12 * up) - 1 / (360 * up**3) + 1 / (1260 * up**5)
    shift = np.log(np.multiply.reduce([x + i for i in range(10)]))
    return (up - 0.5) * np.log(up) - up + math.log(2 * math.pi) / 2 + series - shift
