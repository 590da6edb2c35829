"""What a request has cost: tokens as OpenAI and DeepSeek count them, times as llama.cpp reports them. No torch here."""

from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from finback.engine.request import Request
    from finback.serve.worker import ChoiceInput


def usage(requests: Sequence["Request"], orders: Sequence["ChoiceInput"]) -> dict[str, Any]:
    """Tokens of all choices; a prompt counts once, however many choices it has."""
    first = [r for r, order in zip(requests, orders, strict=True) if order.leader is None]
    prompt, cached = sum(len(r.prompt) for r in first), sum(r.cached for r in first)
    made = sum(len(r.tokens) for r in requests)
    return {
        "prompt_tokens": prompt,
        "completion_tokens": made,
        "total_tokens": prompt + made,
        "prompt_cache_hit_tokens": cached,
        "prompt_cache_miss_tokens": prompt - cached,
        "prompt_tokens_details": {"cached_tokens": cached},
        "completion_tokens_details": {"reasoning_tokens": sum(r.thinking_tokens for r in requests)},
    }


def timings(requests: Sequence["Request"], orders: Sequence["ChoiceInput"]) -> dict[str, Any]:
    """Times in milliseconds: waiting, reading what was not cached, and from the first token to the last."""
    first = [r for r, order in zip(requests, orders, strict=True) if order.leader is None]
    read = sum(len(r.prompt) - r.cached for r in first)
    made = sum(len(r.tokens) for r in requests)
    began = min((r.started for r in requests if r.started), default=0.0)
    heard = min((r.first for r in requests if r.first), default=began)
    last = max((r.last for r in requests), default=heard)
    queued, reading = began - min(r.submitted for r in requests) if began else 0.0, heard - began
    saying = max(0.0, last - heard)
    return {
        "cache_n": sum(r.cached for r in first),
        "queue_ms": _ms(queued),
        "prompt_n": read,
        "prompt_ms": _ms(reading),
        "prompt_per_second": _rate(read, reading),
        # the first token belongs to the prompt: it is made by reading it
        "predicted_n": made,
        "predicted_ms": _ms(saying),
        "predicted_per_second": _rate(max(0, made - 1), saying),
        "draft_n": sum(r.drafted for r in requests),
        "draft_n_accepted": sum(r.accepted for r in requests),
    }


def _ms(seconds: float) -> float:
    return round(seconds * 1000, 3)


def _rate(number: int, seconds: float) -> float:
    return round(number / seconds, 3) if seconds > 0 else 0.0
