"""Who is compared: what all contestants have, and what their answers cost. No torch here."""

import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any, Protocol

from finback.comparison.answer_store import Answer, Failure
from finback.comparison.protocol import EvalRequest, SamplingProtocol
from finback.config import UserError


@dataclass(frozen=True)
class Price:
    """Dollars, and where the figure is from; None where it is unknown, which is not 0."""

    # of the machine, for a model that runs here
    per_hour: float | None = None
    # of a million prompt tokens, for an endpoint
    per_input: float | None = None
    per_output: float | None = None
    basis: str = "NOT PROVIDED"

    def of(self, answer: Answer) -> float | None:
        """What an answer has cost. Tries that failed are not in it: no server says what it charges for them."""
        if self.per_hour is not None:
            return answer.busy * self.per_hour / 3600
        if None in (self.per_input, self.per_output, answer.prompt_tokens, answer.tokens):
            return None
        assert self.per_input is not None and self.per_output is not None
        assert answer.prompt_tokens is not None and answer.tokens is not None
        return (answer.prompt_tokens * self.per_input + answer.tokens * self.per_output) / 1e6


class Contestant(Protocol):
    """A model that can be asked."""

    name: str
    price: Price

    @property
    def identity(self) -> dict[str, Any]:
        """All that its answers depend on, as plain JSON; answers are stored under a digest of it."""
        ...

    def answers(self, asks: Sequence[EvalRequest], rules: SamplingProtocol) -> Iterator[Answer | Failure]:
        """An answer or a failure for each ask, in any order, as they come; closing the iterator ends the work."""
        ...


def prices(given: Sequence[str], option: str, names: Sequence[str]) -> dict[str, float]:
    """Prices of --price-in and --price-out by the names of contestants: "0.55" for all, "NAME=0.55" for one."""
    found: dict[str, float] = {}
    for text in sorted(given, key=lambda t: "=" in t):
        name, _, value = text.rpartition("=")
        price = _dollars(value, option, text)
        if name and name not in names:
            raise UserError(option, text, "no such endpoint", f"Known: {', '.join(names) or 'none'}.")
        found |= dict.fromkeys([name] if name else names, price)
    return found


def _dollars(text: str, option: str, given: str) -> float:
    try:
        value = float(text)
    except ValueError:
        value = math.nan
    if not (math.isfinite(value) and value >= 0):
        raise UserError(option, given, "not a price", "Write dollars per million tokens: 0.55, or NAME=0.55.")
    return value


def distinct(names: Sequence[str]) -> list[str]:
    """Names for a table: of two that are alike the second is "name (2)"."""
    seen: dict[str, int] = {}
    found = []
    for name in names:
        seen[name] = seen.get(name, 0) + 1
        found.append(name if seen[name] == 1 else f"{name} ({seen[name]})")
    return found
