"""Metrics of requests: usage as OpenAI and DeepSeek count it, timings as llama.cpp reports them, Prometheus counters.

Does not import torch.
"""

from collections import Counter
from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any

from finback.serve.histogram import Histogram
from finback.serve.vllm_metrics import ModelMetrics

if TYPE_CHECKING:
    from finback.engine.request import Request

TTFT = (0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1, 2.5, 5, 10, 30, 60)
GAP = (0.001, 0.0025, 0.005, 0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1, 2.5)
TOTALS = {
    "prompt_tokens": "Prompt tokens of accepted requests.",
    "prompt_tokens_cached": "Prompt tokens found in the cache.",
    "generated_tokens": "Tokens generated.",
    "drafted_tokens": "Tokens that MTP drafted.",
    "accepted_tokens": "Drafts that were accepted.",
    "cancelled": "Choices whose client left before the end.",
    "failed_steps": "Engine steps that failed.",
}
CONTENT_TYPE = "text/plain; version=0.0.4; charset=utf-8"


class Metrics:
    """Counters since the start of the server; only the event loop writes here."""

    def __init__(self) -> None:
        self.requests: Counter[tuple[str, int]] = Counter()  # (route, status)
        self.totals: Counter[str] = Counter()  # by the names of TOTALS
        self.first_token, self.gap = Histogram(TTFT), Histogram(GAP)
        self.models: dict[str, ModelMetrics] = {}  # by name

    def observe(self, request: "Request", new_tokens: int, gap: float | None, finish: str | None, model: str) -> None:
        """Counts an output of one choice; `gap`: seconds since the previous one, None for the first."""
        self.models.setdefault(model, ModelMetrics()).observe(request, new_tokens, gap, finish)
        self.totals["generated_tokens"] += new_tokens
        if new_tokens and gap is None:
            self.first_token.observe(request.first - request.submitted)
        elif new_tokens and gap is not None:
            self.gap.observe(gap / new_tokens, new_tokens)
        if finish is not None:
            self.totals.update(drafted_tokens=request.drafted, accepted_tokens=request.accepted)
            if request.leader is None:
                self.totals.update(prompt_tokens=len(request.prompt), prompt_tokens_cached=request.cached)

    def text(self, gauges: Mapping[str, tuple[str, float]]) -> str:
        """All metrics as text, with `gauges` (name -> description, current value)."""
        lines = _head("finback_requests_total", "counter", "Requests by route and status.")
        for (route, status), count in sorted(self.requests.items()):
            lines.append(f'finback_requests_total{{route="{route}",status="{status}"}} {count}')
        for name, text in TOTALS.items():
            lines += [*_head(f"finback_{name}_total", "counter", text), f"finback_{name}_total {self.totals[name]}"]
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


def usage(requests: Sequence["Request"]) -> dict[str, Any]:
    """Tokens of all choices; a prompt counts once, however many choices it has."""
    leaders = [r for r in requests if r.leader is None]
    prompt, cached = sum(len(r.prompt) for r in leaders), sum(r.cached for r in leaders)
    generated = sum(len(r.tokens) for r in requests)
    return {
        "prompt_tokens": prompt,
        "completion_tokens": generated,
        "total_tokens": prompt + generated,
        "prompt_cache_hit_tokens": cached,
        "prompt_cache_miss_tokens": prompt - cached,
        "prompt_tokens_details": {"cached_tokens": cached},
        "completion_tokens_details": {"reasoning_tokens": sum(r.thinking_tokens for r in requests)},
    }


def timings(requests: Sequence["Request"]) -> dict[str, Any]:
    """Times in milliseconds: in the queue, reading uncached prompt tokens, and from the first token to the last."""
    leaders = [r for r in requests if r.leader is None]
    read = sum(len(r.prompt) - r.cached for r in leaders)
    generated = sum(len(r.tokens) for r in requests)
    began = min((r.started for r in requests if r.started), default=0.0)
    first = min((r.first for r in requests if r.first), default=began)
    last = max((r.last for r in requests), default=first)
    queued, prompt_time = began - min(r.submitted for r in requests) if began else 0.0, first - began
    generating = max(0.0, last - first)
    return {
        "cache_n": sum(r.cached for r in leaders),
        "queue_ms": _ms(queued),
        "prompt_n": read,
        "prompt_ms": _ms(prompt_time),
        "prompt_per_second": _rate(read, prompt_time),
        # reading the prompt generates the first token, so it belongs to the prompt's time
        "predicted_n": generated,
        "predicted_ms": _ms(generating),
        "predicted_per_second": _rate(max(0, generated - 1), generating),
        "draft_n": sum(r.drafted for r in requests),
        "draft_n_accepted": sum(r.accepted for r in requests),
    }


def _ms(seconds: float) -> float:
    return round(seconds * 1000, 3)


def _rate(number: int, seconds: float) -> float:
    return round(number / seconds, 3) if seconds > 0 else 0.0
