"""Learning rates, batch sizes and weights as functions of tokens, so that batch size and number of ranks do not change the
shape of a run."""

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal, TypeVar

from finback.config import UserError, check_fields, check_not_negative, check_positive

Level = float | tuple[tuple[int, float], ...]  # one value, or (first token, value) pairs in order
Steps = int | tuple[tuple[int, int], ...]  # the same for counts
N = TypeVar("N", int, float)


@dataclass(frozen=True)
class Phase:
    """A part of a schedule, `tokens` long, from the factor `start` to the factor `end` of the peak rate.

    V3 (4.2): Phase(warm, 0, 1), Phase(10T, 1, 1), Phase(4.3T, 1, 0.1, "cosine"), Phase(333B, 0.1, 0.1),
    Phase(167B, 0.0332, 0.0332).
    """

    # length in tokens
    tokens: int
    # factor at its first token
    start: float = 1.0
    # factor at its last token
    end: float = 1.0
    # curve between the two
    shape: Literal["linear", "cosine"] = "linear"

    def __post_init__(self) -> None:
        check_fields(self, "phase")
        check_positive(self, "phase", "tokens")
        check_not_negative(self, "phase", "start", "end")


def along(phases: Sequence[Phase], tokens: int) -> float:
    """The factor after `tokens` tokens of a list of phases; after the last phase, its end."""
    before = 0
    for phase in phases:
        if tokens <= before + phase.tokens:
            done = (tokens - before) / phase.tokens
            if phase.shape == "cosine":
                done = (1 - math.cos(math.pi * done)) / 2
            return phase.start + (phase.end - phase.start) * done
        before += phase.tokens
    return phases[-1].end


def pairs_of(value: N | tuple[tuple[int, N], ...]) -> tuple[tuple[int, N], ...]:
    """(first token, value) pairs, one for a constant."""
    return value if isinstance(value, tuple) else ((0, value),)


def level(value: N | tuple[tuple[int, N], ...], tokens: int) -> N:
    """The value in effect after `tokens` tokens."""
    return [v for start, v in pairs_of(value) if start <= tokens][-1]


def check_levels(config: object, where: str, *names: str) -> None:
    """Raises UserError for the first named field that is negative, or whose pairs are not in order from token 0."""
    for name in names:
        if min(_ordered(config, where, name)) < 0:
            raise UserError(f"{where}.{name}", getattr(config, name), "negative", "Use 0 or more.")


def check_steps(config: object, where: str, *names: str) -> None:
    """As check_levels, for counts, which must be above 0."""
    for name in names:
        if min(_ordered(config, where, name)) <= 0:
            raise UserError(f"{where}.{name}", getattr(config, name), "not above 0", "Use 1 or more.")


def _ordered(config: object, where: str, name: str) -> list[float]:
    """The values of a Level, after checking the order of its pairs."""
    value = getattr(config, name)
    starts = [start for start, _ in pairs_of(value)]
    if not starts or starts[0] != 0 or starts != sorted(set(starts)):
        problem = "pairs of (token, value) must start at token 0 and ascend"
        raise UserError(f"{where}.{name}", value, problem, "Order them.")
    return [v for _, v in pairs_of(value)]


def ramp(tokens: int, first: int, last: int, over: int) -> int:
    """Rows per step after `tokens` tokens: linear from `first` to `last` over `over` tokens, in multiples of `first`.

    V3 went from 3,072 to 15,360 rows over 469B tokens; the curve between them is not published.
    """
    if tokens >= over:
        return last
    return min(last, int((first + (last - first) * tokens / over) // first) * first)


def ramp_sizes(first: int, last: int) -> list[int]:
    """All batch sizes that `ramp` takes; with first = 0 there is no ramp."""
    return [*range(first, last, first), last] if first else [last]


def warmup(tokens: int, warmup_tokens: int) -> float:
    """Factor of a linear warm-up to 1 over warmup_tokens."""
    return min(1.0, tokens / warmup_tokens) if warmup_tokens > 0 else 1.0


def decay(tokens: int, start: int | None, length: int, floor: float) -> float:
    """Factor of a linear decay from 1 at token `start` to `floor` over `length` tokens; 1 before, and while start is None."""
    if start is None or tokens <= start:
        return 1.0
    done = min(1.0, (tokens - start) / length) if length > 0 else 1.0
    return 1.0 - (1.0 - floor) * done


def cosine(done: float, warmup: float, floor: float) -> float:
    """Factor after a share `done` of a run: linear to 1 over the first `warmup` of it, then a cosine down to `floor`."""
    if done < warmup:
        return done / warmup
    along = (done - warmup) / (1 - warmup) if warmup < 1 else 1.0
    return floor + (1 - floor) * (1 + math.cos(math.pi * min(1.0, along))) / 2
