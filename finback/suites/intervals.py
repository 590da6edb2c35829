"""95 % intervals of mean scores over questions, and of the mean difference of two models on the same questions.

Questions are what is drawn: their samples only make each one's score exact. A score is any number in 0..1. Everything is a formula,
along the last axis of its arrays; no torch, no random numbers. `benchmarks/coverage.py` measures how often the truth is inside.
"""

import math
from statistics import NormalDist

import numpy as np

Limits = tuple[np.ndarray, np.ndarray]

LEVEL = 0.95
# Questions that are imagined beside those there are, as different as scores can be: what was never seen among n may be three
# in n (the rule of three). Without them few scores that are alike so far would promise that all others are like them.
_IMAGINED = 3.0
_NOTHING = 1e-9  # right answers below which there are none but for rounding
_SMALLEST = -700.0  # the logarithm of the smallest limit that is told from 0


def limits_of_mean(scores: np.ndarray, level: float = LEVEL) -> Limits:
    """The interval of the mean of scores [..., questions] in 0..1; it always has a width."""
    n = scores.shape[-1]
    variance = scores.var(axis=-1, ddof=1) if n > 1 else np.zeros(scores.shape[:-1])
    return limits_of_moments(scores.mean(axis=-1), variance, n, level)


def limits_of_moments(
    mean: np.ndarray, variance: np.ndarray, n: int, level: float = LEVEL, largest: float | np.ndarray = 1.0
) -> Limits:
    """The same from the mean and the variance (of n - 1) of n scores; `largest` is how far a score goes from 0.

    As for complex samples (Korn and Graubard 1998): the interval of a binomial share, here mid-P, of as many independent answers
    as the questions are worth. They are worth n at least, since no scores in 0..1 vary more than 0 and 1 do, and fewer
    the less n questions tell about their own variance (Student's t).
    """
    worth = np.full(np.shape(mean), float(n))
    if n > 1:
        upper = (1 + level) / 2
        doubt = (NormalDist().inv_cdf(upper) / student(upper, n - 1)) ** 2
        imagined = _IMAGINED / 4  # the variance of what is as likely 0 as 1
        spread = (n * variance + imagined * largest) / (n * mean * (1 - mean) + imagined)
        worth = np.maximum(worth, doubt * n / spread)
    return mid_p(mean * worth, worth, level)


def limits_of_difference(gaps: np.ndarray, level: float = LEVEL) -> Limits:
    """The interval of the mean of gaps [..., questions], each in -1..1, one model's score minus another's.

    What the first gains and what it loses are two means with intervals of their own, joined by square-and-add (Newcombe 1998, method 10;
    Zou and Donner 2008): one that was never seen to lose may yet lose. How much a question can be lost by is
    read from all gaps, and from the imagined ones, which are as large as a gap can be.
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
    """How far a difference may be off if one mean is as low as its limit `fewest` and the other as high as `most`.

    A question is gained or lost, never both, which correlates the two means: at these limits, as nothing is seen of it where no
    question was lost yet.
    """
    free = np.maximum((largest - fewest) * (largest - most), 1e-12)
    correlation = -np.minimum(1.0, np.sqrt(fewest * most / free))
    down, up = less - fewest, most - more
    return np.sqrt(down**2 + up**2 - 2 * correlation * down * up)


def mid_p(right: np.ndarray, n: np.ndarray, level: float = LEVEL) -> Limits:
    """The mid-P interval of a share, `right` of n answers (Lancaster 1961; Berry and Armitage 1995); neither need be whole."""
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
    """The share p with P(X > right) + P(X = right) / 2 = tail for X of n answers; 0 where none is right.

    Newton's method for the logarithm of that probability in log p, of which it is a concave function.
    """
    known = np.where(right > _NOTHING, right, 1.0)  # any number, where the answer is 0
    choose = _log_gamma(n + 1) - _log_gamma(known + 1) - _log_gamma(n - known + 1)
    log_p = np.log(np.minimum(known / n, 0.999))
    for _ in range(100):
        p = np.exp(log_p)
        log_exactly = choose + known * log_p + (n - known) * np.log1p(-p)
        # all over P(X = right): the probability, and its slope in log p
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
    """log Γ(x) for x >= 1, by Stirling's series ten further up (Abramowitz and Stegun 6.1.40)."""
    up = x + 10
    series = 1 / (12 * up) - 1 / (360 * up**3) + 1 / (1260 * up**5)
    shift = np.log(np.multiply.reduce([x + i for i in range(10)]))
    return (up - 0.5) * np.log(up) - up + math.log(2 * math.pi) / 2 + series - shift
