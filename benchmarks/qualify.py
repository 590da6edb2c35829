"""A short trial for many settings, which selects those that race."""

from collections.abc import Callable, Collection, Sequence
from typing import Any

import driver
from driver import Contestant, Field

KEPT = 0.8  # share of the best trial's speed that a setting must reach to race
HOPELESS = 3.0  # times the fastest warm step: excluded from the trial


def trial(contestants: Sequence[Contestant], turns: int, command: Any) -> None:
    """Times some turns of every contestant that is not hopelessly slow; records raw seconds, also of those that do not race."""

    def take(contestant: Contestant, seconds: float, replies: list[Any]) -> None:
        contestant.record.setdefault("trial_seconds", []).append(seconds)

    _send_hopeless(contestants, contestants)
    driver.turns(contestants, turns, command, take)


def one_by_one(
    field: Field, contestants: Sequence[Contestant], kind: Callable[[Contestant], str], turns: int, command: Any
) -> list[Contestant]:
    """A trial in which each starts alone, and of each kind only the fastest so far goes on; bounds memory and load.

    Returns all whose names the field accepts.
    """
    entered: list[Contestant] = []
    for contestant in contestants:
        entered += field.enter([contestant])
        alive = [c for c in entered if c.alive]
        if contestant not in alive:
            continue
        _send_hopeless([contestant], alive)
        trial([contestant], turns, command)
        rivals = [c for c in alive if c.alive and c.record.get("trial_seconds") and kind(c) == kind(contestant)]
        for rival in rivals:
            if rival is not best(rivals):
                _send_home(rival, "another of its kind was faster in the trial")
    return entered


def _send_hopeless(contestants: Sequence[Contestant], field: Sequence[Contestant]) -> None:
    """Takes out contestants that warmed up far more slowly than the fastest of the field."""
    limit = HOPELESS * min((c.record["warm_step_seconds"] for c in field if c.alive), default=0.0)
    for contestant in contestants:
        if contestant.alive and contestant.record["warm_step_seconds"] > limit:
            _send_home(contestant, f"{HOPELESS:g} times slower than the fastest when warming up")


def best(contestants: Sequence[Contestant]) -> Contestant | None:
    """The fastest in the trial."""
    return min((c for c in contestants if c.record.get("trial_seconds")), key=seconds, default=None)


def seconds(contestant: Contestant) -> float:
    """A contestant's better turn."""
    return float(min(contestant.record["trial_seconds"]))


def retire(contestants: Sequence[Contestant], kept: Collection[Contestant | None] = ()) -> None:
    """Takes out those that were clearly slow, except those in `kept`."""
    ran = [c for c in contestants if c.alive and c.record.get("trial_seconds")]
    for contestant in ran:
        slow = seconds(contestant) > min(map(seconds, ran)) / KEPT
        if slow and not any(contestant is other for other in kept):
            _send_home(contestant, f"slower than {KEPT:g} of the best in the trial")


def _send_home(contestant: Contestant, reason: str) -> None:
    contestant.stop()
    contestant.record["not_raced"] = reason
    driver.say(f"{contestant.name}: does not race, {reason}")
