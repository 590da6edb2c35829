"""A Prometheus histogram. Does not import torch."""

from bisect import bisect_left
from collections.abc import Iterable


class Histogram:
    """Counts values (seconds) up to each of several bounds."""

    def __init__(self, bounds: Iterable[float]) -> None:
        self.bounds = tuple(bounds)
        self.counts = [0] * (len(self.bounds) + 1)
        self.total = 0.0

    def observe(self, value: float, times: int = 1) -> None:
        """Counts a value `times` times."""
        self.counts[bisect_left(self.bounds, value)] += times
        self.total += value * times

    def lines(self, name: str, label: str = "") -> list[str]:
        """Cumulative buckets, sum and count in Prometheus' format, with an additional label if given."""
        found, so_far = [], 0
        more, own = (f",{label}", f"{{{label}}}") if label else ("", "")
        for bound, count in zip((*map(str, self.bounds), "+Inf"), self.counts, strict=True):
            so_far += count
            found.append(f'{name}_bucket{{le="{bound}"{more}}} {so_far}')
        return [*found, f"{name}_sum{own} {self.total:.6f}", f"{name}_count{own} {so_far}"]
