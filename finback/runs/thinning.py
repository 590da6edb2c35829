"""Long curves for small screens: thinning to few points that look the same, and smoothing. Does not import torch."""

import numpy as np
from numpy.typing import NDArray

Line = NDArray[np.float64]
NOTHING = 1e-18  # a share below the precision of float64 sums


def thin(x: Line, y: Line, points: int) -> NDArray[np.int64]:
    """Indices of about `points` points of a curve: the lowest and highest y in each interval of x.

    The first and last points are kept, and one NaN or infinite value per interval, since gaps are informative. x must not
    decrease.
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
    """For each interval, the first index of its minimum."""
    extremes = np.minimum.reduceat(y, starts)
    lengths = np.diff(np.append(starts, len(y)))
    hits = np.flatnonzero(y == np.repeat(extremes, lengths))
    owner = np.searchsorted(starts, hits, side="right")
    return hits[np.unique(owner, return_index=True)[1]]


def smooth(y: Line, weight: float) -> Line:
    """Exponential moving average s_t = w s_{t-1} + (1 - w) y_t, divided by 1 - w^t; NaN and infinite values are skipped."""
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
    """Sums of w^(t-s) y_s over s <= t, by doubling: sums over 2k values from those over k."""
    found, k = y.copy(), 1
    while k < len(y) and weight**k > NOTHING:
        found[k:] += weight**k * found[:-k]
        k *= 2
    return found
