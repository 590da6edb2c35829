"""External engines, which work for a stage outside its ranks: their tokens, time and price. Does not import torch.

Unknown amounts are named in the ledger (`unknown`), not recorded as 0.
"""

import threading
import time
from dataclasses import dataclass
from typing import Any

from finback.config import UserError
from finback.runs.ledger import DOLLARS_PER_CORE_HOUR, WATTS_PER_CORE


@dataclass(frozen=True)
class EnginePrice:
    """What an engine costs, or its hardware; None is unknown. Either time has a price, or tokens do."""

    # dollars per million prompt tokens, and per million generated ones
    price_in: float | None = None
    price_out: float | None = None
    # dollars per hour
    price_hour: float | None = None
    # CPU cores, priced and powered as the ranks' are if there is no other price
    num_cpus: float | None = None
    num_gpus: float = 0.0
    # runs on the machine of rank 0, whose meters include it
    is_here: bool = False

    def check(self, field: str) -> None:
        """Raises UserError if only one kind of token has a price, or time has a price as well."""
        for has, lacks in (("price_in", "price_out"), ("price_out", "price_in")):
            if getattr(self, has) is not None and getattr(self, lacks) is None:
                raise UserError(
                    f"{field}.{lacks}", None, f"missing, although {has} is given", "Give both; 0 is a price."
                )
        if self.price_in is not None and self.price_hour is not None:
            problem = "tokens have a price as well"
            raise UserError(f"{field}.price_hour", self.price_hour, problem, "Give the one that is charged.")

    def dollars(self, seconds: float, prompt: int, generated: int) -> float | None:
        """The price of `seconds` of engine time in which these tokens were read and generated; None if it is unknown."""
        if self.price_in is not None and self.price_out is not None:
            return (prompt * self.price_in + generated * self.price_out) / 1e6
        if self.price_hour is not None:
            return seconds * self.price_hour / 3600
        if self.num_cpus is not None and not self.num_gpus:
            return seconds * self.num_cpus * DOLLARS_PER_CORE_HOUR / 3600
        return None


class TokenCount:
    """Tokens that one engine has read and generated for this rank; several threads may add to it."""

    def __init__(self) -> None:
        self._lock = threading.Lock()
        self._prompt = self._generated = 0

    def add(self, prompt: int, generated: int) -> None:
        """Adds the tokens of a reply, whether it is used or not."""
        with self._lock:
            self._prompt, self._generated = self._prompt + prompt, self._generated + generated

    def take(self) -> tuple[int, int]:
        """Prompt and generated tokens since the last call."""
        with self._lock:
            found = self._prompt, self._generated
            self._prompt = self._generated = 0
        return found


class ExternalEngines:
    """The engines of one knob from now until `leave`, as a stage's ledger counts them."""

    def __init__(self, name: str, price: EnginePrice, counts: list[TokenCount], knows_flops: bool) -> None:
        """name: the knob, such as rl.rollouts. counts: one for each engine. knows_flops: the stage counts their FLOPs."""
        self.name, self.price, self.counts, self.knows_flops = name, price, counts, knows_flops
        # tokens of all ranks that are not in the ledger yet
        self.prompt = self.generated = 0
        self._mark, self._end = time.perf_counter(), float("inf")

    def leave(self) -> None:
        """The stage no longer uses them."""
        self._end = min(self._end, time.perf_counter())

    def take(self) -> tuple[int, int]:
        """Tokens for this rank since the last call."""
        found = [count.take() for count in self.counts]
        return sum(prompt for prompt, _ in found), sum(generated for _, generated in found)

    def add(self, prompt: int, generated: int) -> None:
        """Adds a rank's tokens to those that the next bill has."""
        self.prompt, self.generated = self.prompt + prompt, self.generated + generated

    def bill(self, metered: bool) -> dict[str, Any]:
        """A ledger's entries since the last call. metered: the meters of rank 0's machine were read meanwhile."""
        now = min(time.perf_counter(), self._end)
        seconds, self._mark = max(0.0, now - self._mark) * len(self.counts), max(now, self._mark)
        prompt, generated, p = self.prompt, self.generated, self.price
        self.prompt = self.generated = 0
        bill: dict[str, Any] = {
            "external_seconds": seconds,
            "tokens_external_prompt": prompt,
            "tokens_external_generated": generated,
        }
        unknown = [] if self.knows_flops else [f"FLOPs of {self.name}"]
        if (dollars := p.dollars(seconds, prompt, generated)) is None:
            unknown.append(f"money of {self.name}")
        else:
            bill["external_usd"] = dollars
        if p.num_cpus is not None:
            bill["external_core_seconds"] = seconds * p.num_cpus
        if p.num_cpus is not None and not p.num_gpus:
            bill["external_joules"] = 0.0 if metered and p.is_here else seconds * p.num_cpus * WATTS_PER_CORE
        elif not (metered and p.is_here):
            unknown.append(f"energy of {self.name}")
        return bill | ({"unknown": unknown} if unknown else {})


def billed(engines: list[ExternalEngines], metered: bool) -> dict[str, Any]:
    """The bills of all engines as one: sums, and the list of what is unknown; {} without engines."""
    total: dict[str, Any] = {}
    for bill in (each.bill(metered) for each in engines):
        for key, value in bill.items():
            total[key] = total[key] + value if key in total else value
    return total
