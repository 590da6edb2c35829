"""The counters under vLLM's names, for existing dashboards: per model, in Prometheus' text format. Does not import torch."""

from collections import Counter
from collections.abc import Iterable, Mapping
from typing import TYPE_CHECKING

from finback.serve.histogram import Histogram

if TYPE_CHECKING:
    from finback.engine.request import Request

# vLLM's bounds, so that quantiles can be compared
TTFT = (
    *(0.001, 0.005, 0.01, 0.02, 0.04, 0.06, 0.08, 0.1, 0.25, 0.5, 0.75, 1, 2.5, 5, 7.5, 10),
    *(20, 40, 80, 160, 640, 2560),
)
GAP = (0.01, 0.025, 0.05, 0.075, 0.1, 0.15, 0.2, 0.3, 0.4, 0.5, 0.75, 1, 2.5, 5, 7.5, 10, 20, 40, 80)
LATENCY = (0.3, 0.5, 0.8, 1, 1.5, 2, 2.5, 5, 10, 15, 20, 30, 40, 50, 60, 120, 240, 480, 960, 1920, 7680)
HISTOGRAMS = {
    "time_to_first_token_seconds": (TTFT, "From arrival to the first token."),
    "inter_token_latency_seconds": (GAP, "Between one token and the next."),
    "e2e_request_latency_seconds": (LATENCY, "From arrival to the last token."),
    "request_queue_time_seconds": (LATENCY, "In the queue."),
    "request_prefill_time_seconds": (LATENCY, "From the batch to the first token."),
    "request_decode_time_seconds": (LATENCY, "From the first token to the last."),
}
COUNTERS = {
    "prompt_tokens_total": "Prompt tokens of requests that have ended.",
    "generation_tokens_total": "Tokens generated.",
    "prefix_cache_queries_total": "Prompt tokens looked for in the cache.",
    "prefix_cache_hits_total": "Prompt tokens found in the cache.",
    "num_preemptions_total": "Preemptions of requests.",
    "spec_decode_num_draft_tokens_total": "Tokens that MTP drafted.",
    "spec_decode_num_accepted_tokens_total": "Drafts that were accepted.",
}
GAUGES = {
    "num_requests_running": "Choices being generated.",
    "num_requests_waiting": "Choices waiting.",
    "kv_cache_usage_perc": "Share of the cache's pages in use, 0 to 1.",
}


class ModelMetrics:
    """Metrics of one model."""

    def __init__(self) -> None:
        self.totals: Counter[str] = Counter()
        self.finished: Counter[str] = Counter()
        self.histograms = {name: Histogram(bounds) for name, (bounds, _) in HISTOGRAMS.items()}

    def observe(self, request: "Request", new_tokens: int, gap: float | None, finish: str | None) -> None:
        """Counts an output of one choice."""
        self.totals["generation_tokens_total"] += new_tokens
        if new_tokens and gap is None:
            self.histograms["time_to_first_token_seconds"].observe(request.first - request.submitted)
        elif new_tokens and gap is not None:
            self.histograms["inter_token_latency_seconds"].observe(gap / new_tokens, new_tokens)
        if finish is not None:
            self._end(request, finish)

    def _end(self, request: "Request", finish: str) -> None:
        self.finished[finish] += 1
        prompt = len(request.prompt) if request.leader is None else 0
        self.totals.update(
            prompt_tokens_total=prompt,
            prefix_cache_queries_total=prompt,
            prefix_cache_hits_total=request.cached if request.leader is None else 0,
            num_preemptions_total=request.preempted,
            spec_decode_num_draft_tokens_total=request.drafted,
            spec_decode_num_accepted_tokens_total=request.accepted,
        )
        if request.started and request.first:
            times = {
                "e2e_request_latency_seconds": request.last - request.submitted,
                "request_queue_time_seconds": request.started - request.submitted,
                "request_prefill_time_seconds": request.first - request.started,
                "request_decode_time_seconds": request.last - request.first,
            }
            for name, seconds in times.items():
                self.histograms[name].observe(seconds)


def text(models: Mapping[str, ModelMetrics], gauges: Mapping[str, Mapping[str, float]]) -> str:
    """All models' metrics as text; `gauges`: current values by model and name."""
    lines: list[str] = []
    for name, about in GAUGES.items():
        lines += _lines(name, "gauge", about, ((model, f"{now[name]:g}") for model, now in gauges.items()))
    for name, about in COUNTERS.items():
        lines += _lines(name, "counter", about, ((model, str(m.totals[name])) for model, m in models.items()))
    lines += _head("request_success_total", "counter", "Requests by finish reason.")
    for model, each in models.items():
        for reason, count in sorted(each.finished.items()):
            lines.append(f'vllm:request_success_total{{finished_reason="{reason}",{_label(model)}}} {count}')
    for name, (_, about) in HISTOGRAMS.items():
        lines += _head(name, "histogram", about)
        for model, each in models.items():
            lines += each.histograms[name].lines(f"vllm:{name}", _label(model))
    return "\n".join(lines) + "\n"


def _lines(name: str, kind: str, about: str, values: Iterable[tuple[str, str]]) -> list[str]:
    return [*_head(name, kind, about), *(f"vllm:{name}{{{_label(model)}}} {value}" for model, value in values)]


def _head(name: str, kind: str, about: str) -> list[str]:
    return [f"# HELP vllm:{name} {about}", f"# TYPE vllm:{name} {kind}"]


def _label(model: str) -> str:
    escaped = model.replace("\\", "\\\\").replace('"', '\\"').replace("\n", " ")
    return f'model_name="{escaped}"'
