"""Counters and histograms in Prometheus' text format. No torch here."""

from collections import Counter
from collections.abc import Iterable, Mapping

TTFT = (0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1, 2.5, 5, 10, 30, 60)
GAP = (0.001, 0.0025, 0.005, 0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1, 2.5)
CONTENT_TYPE = "text/plain; version=0.0.4; charset=utf-8"


class Histogram:
    """How often values fell below each of some bounds (seconds)."""

    def __init__(self, bounds: Iterable[float]) -> None:
        self.bounds = tuple(bounds)
        self.counts = [0] * (len(self.bounds) + 1)
        self.total = 0.0

    def observe(self, value: float, times: int = 1) -> None:
        """Count a value."""
        place = next((i for i, bound in enumerate(self.bounds) if value <= bound), len(self.bounds))
        self.counts[place] += times
        self.total += value * times

    def lines(self, name: str) -> list[str]:
        """As cumulative buckets, sum and count."""
        found, so_far = [], 0
        for bound, count in zip((*map(str, self.bounds), "+Inf"), self.counts, strict=True):
            so_far += count
            found.append(f'{name}_bucket{{le="{bound}"}} {so_far}')
        return [*found, f"{name}_sum {self.total:.6f}", f"{name}_count {so_far}"]


class Metrics:
    """What the server has done since it started; only the event loop writes here."""

    def __init__(self) -> None:
        self.requests: Counter[tuple[str, int]] = Counter()  # (route, status)
        self.prompt_tokens = self.cached_tokens = self.generated_tokens = 0
        self.drafted = self.accepted = self.cancelled = self.failures = 0
        self.first_token, self.gap = Histogram(TTFT), Histogram(GAP)

    def text(self, gauges: Mapping[str, tuple[str, float]]) -> str:
        """All of it, with `gauges` (name -> what it is, value) as they stand now."""
        lines = _head("finback_requests_total", "counter", "Requests by route and status.")
        for (route, status), count in sorted(self.requests.items()):
            lines.append(f'finback_requests_total{{route="{route}",status="{status}"}} {count}')
        for name, text, value in (
            ("prompt_tokens", "Prompt tokens of accepted requests.", self.prompt_tokens),
            ("prompt_tokens_cached", "Prompt tokens found in the cache.", self.cached_tokens),
            ("generated_tokens", "Tokens made.", self.generated_tokens),
            ("drafted_tokens", "Tokens that MTP drafted.", self.drafted),
            ("accepted_tokens", "Drafts that were right.", self.accepted),
            ("cancelled", "Choices whose client left before the end.", self.cancelled),
            ("failed_steps", "Passes of the model that failed.", self.failures),
        ):
            lines += [*_head(f"finback_{name}_total", "counter", text), f"finback_{name}_total {value}"]
        for name, (text, number) in gauges.items():
            lines += [*_head(f"finback_{name}", "gauge", text), f"finback_{name} {number:g}"]
        for name, text, histogram in (
            ("finback_time_to_first_token_seconds", "From arrival to the first token.", self.first_token),
            ("finback_inter_token_seconds", "Between one token and the next.", self.gap),
        ):
            lines += [*_head(name, "histogram", text), *histogram.lines(name)]
        return "\n".join(lines) + "\n"


def _head(name: str, kind: str, text: str) -> list[str]:
    return [f"# HELP {name} {text}", f"# TYPE {name} {kind}"]
