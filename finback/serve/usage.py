"""What a request has cost: tokens as OpenAI and DeepSeek count them, times as llama.cpp reports them. No torch here."""

from collections.abc import Sequence as List
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from finback.engine.request import Sequence
    from finback.serve.worker import Order


def usage(sequences: List["Sequence"], orders: List["Order"]) -> dict[str, Any]:
    """Tokens of all choices; a prompt counts once, however many choices it has."""
    first = [s for s, order in zip(sequences, orders, strict=True) if order.leader is None]
    prompt, cached = sum(len(s.prompt) for s in first), sum(s.cached for s in first)
    made = sum(len(s.tokens) for s in sequences)
    return {
        "prompt_tokens": prompt,
        "completion_tokens": made,
        "total_tokens": prompt + made,
        "prompt_cache_hit_tokens": cached,
        "prompt_cache_miss_tokens": prompt - cached,
        "prompt_tokens_details": {"cached_tokens": cached},
        "completion_tokens_details": {"reasoning_tokens": sum(s.thought for s in sequences)},
    }


def timings(sequences: List["Sequence"], orders: List["Order"]) -> dict[str, Any]:
    """Times in milliseconds: waiting, reading what was not cached, and from the first token to the last."""
    first = [s for s, order in zip(sequences, orders, strict=True) if order.leader is None]
    read = sum(len(s.prompt) - s.cached for s in first)
    made = sum(len(s.tokens) for s in sequences)
    began = min((s.started for s in sequences if s.started), default=0.0)
    heard = min((s.first for s in sequences if s.first), default=began)
    last = max((s.last for s in sequences), default=heard)
    queued, reading = began - min(s.submitted for s in sequences) if began else 0.0, heard - began
    saying = max(0.0, last - heard)
    return {
        "cache_n": sum(s.cached for s in first),
        "queue_ms": _ms(queued),
        "prompt_n": read,
        "prompt_ms": _ms(reading),
        "prompt_per_second": _rate(read, reading),
        # the first token belongs to the prompt: it is made by reading it
        "predicted_n": made,
        "predicted_ms": _ms(saying),
        "predicted_per_second": _rate(max(0, made - 1), saying),
        "draft_n": sum(s.drafted for s in sequences),
        "draft_n_accepted": sum(s.accepted for s in sequences),
    }


def _ms(seconds: float) -> float:
    return round(seconds * 1000, 3)


def _rate(number: int, seconds: float) -> float:
    return round(number / seconds, 3) if seconds > 0 else 0.0
