"""Long curves for small screens: the fewest points that look the same, and smoothing over all of them. No torch here."""

import numpy as np
from numpy.typing import NDArray

Line = NDArray[np.float64]
NOTHING = 1e-18  # a share that no sum of this precision feels


def thin(x: Line, y: Line, points: int) -> NDArray[np.int64]:
    """Places of at most about `points` points of a curve: of each stretch of x the lowest and the highest y.

    First and last stay, and so does one value that is NaN or infinite in each stretch that has some: a gap is a finding.
    x must not fall.
    """
    if len(x) <= points:
        return np.arange(len(x))
    buckets = max(1, (points - 2) // 3)
    begin, end = float(x[0]), float(x[-1])
    edges = np.searchsorted(x, np.linspace(begin, end, buckets + 1)[:-1] if end > begin else [begin])
    starts = np.unique(edges)
    finite = np.isfinite(y)
    low = _first_lowest(np.where(finite, y, np.inf), starts)
    high = _first_lowest(np.where(finite, -y, np.inf), starts)
    places = [low, high, np.array([0, len(x) - 1])]
    if not finite.all():
        bad = np.flatnonzero(~finite)
        places.append(bad[np.unique(np.searchsorted(starts, bad, side="right"), return_index=True)[1]])
    return np.unique(np.concatenate(places)).astype(np.int64)


def _first_lowest(y: Line, starts: NDArray[np.int64]) -> NDArray[np.int64]:
    """For each stretch the first place at which its lowest value stands."""
    extremes = np.minimum.reduceat(y, starts)
    lengths = np.diff(np.append(starts, len(y)))
    hits = np.flatnonzero(y == np.repeat(extremes, lengths))
    owner = np.searchsorted(starts, hits, side="right")
    return hits[np.unique(owner, return_index=True)[1]]


def smooth(y: Line, weight: float) -> Line:
    """Exponential mean s_t = w s_{t-1} + (1 - w) y_t, divided by 1 - w^t; NaN and infinite values are passed over."""
    assert 0 <= weight < 1, f"weight {weight} is not in [0, 1)"
    if weight == 0 or not len(y):
        return y
    finite = np.isfinite(y)
    sums = _decayed(np.where(finite, y, 0.0), weight)
    counts = _decayed(finite.astype(np.float64), weight)
    found = np.full(len(y), np.nan)
    np.divide(sums, counts, out=found, where=finite)
    return found


def _decayed(y: Line, weight: float) -> Line:
    """Sums of w^(t-s) y_s over s <= t: those over 2k values are two of those over k."""
    found, k = y.copy(), 1
    while k < len(y) and weight**k > NOTHING:
        found[k:] += weight**k * found[:-k]
        k *= 2
    return found
