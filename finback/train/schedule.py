"""Learning rates as functions of tokens, so that batch size and rank count do not change a run's shape."""

import math


def warmup(tokens: int, warmup_tokens: int) -> float:
    """Factor that rises linearly to 1 over warmup_tokens."""
    return min(1.0, tokens / warmup_tokens) if warmup_tokens > 0 else 1.0


def decay(tokens: int, start: int | None, length: int, floor: float) -> float:
    """Factor that falls linearly from 1 at token `start` to `floor` over `length` tokens; 1 before, and while start is None."""
    if start is None or tokens <= start:
        return 1.0
    done = min(1.0, (tokens - start) / length) if length > 0 else 1.0
    return 1.0 - (1.0 - floor) * done


def cosine(done: float, warmup: float, floor: float) -> float:
    """Factor after a share `done` of a run: up to 1 over the first `warmup` of it, then along a cosine to `floor`."""
    if done < warmup:
        return done / warmup
    along = (done - warmup) / (1 - warmup) if warmup < 1 else 1.0
    return floor + (1 - floor) * (1 + math.cos(math.pi * min(1.0, along))) / 2
