"""Health of RL: allowed mismatch of trainer and engine, and why steps teach nothing. Does not import torch."""

import math
import statistics
from collections.abc import Mapping, Sequence
from typing import Any

NOTICED = 5  # consecutive steps without a gradient before a warning
_ASKED = 64  # minimum of questions for comparing accuracies
_MAX_GAP = {"fp32": 1e-2, "bf16": 0.2}  # nats per token; sound runs differ by 1e-5 and by 0.03 to 0.06


def max_gap(asked: float | None, compute: Any) -> float:
    """Allowed difference between trainer and engine, in nats per token on average; by precision unless `asked` is given."""
    return asked if asked is not None else _MAX_GAP.get(compute, max(_MAX_GAP.values()))


def cause(metrics: Mapping[str, float]) -> str:
    """Why a GRPO step taught nothing and what to do about it, from the step's metrics; "" if it taught something."""
    if metrics["truncated"] >= 1:
        return "every answer was cut off: raise max_tokens, or start from a model that ends its answers"
    if metrics["groups_with_gradient"] > 0:
        return ""
    if metrics["accuracy"] >= 1:
        return "every answer is right: ask harder questions"
    if metrics["well_formed"] <= 0:
        return (
            "no answer has the required form: teach it by SFT first, append an `instruction` to the questions, or "
            "look at the answers with `finback show RUN --samples`"
        )
    if metrics["accuracy"] <= 0:
        return "no answer is right: ask easier questions, start from a better model, or check the gold answers and the checker"
    return "all answers to a question get the same reward: raise num_generations or the temperature, or ask questions of another difficulty"


def lost(rows: Sequence[Mapping[str, float]], num_generations: int) -> str:
    """A warning if RL has reduced accuracy, comparing its first and last tenth of steps; "" if that is not certain.

    Each step asks new questions. A tenth must ask at least 64, and the loss must exceed twice its standard error, which
    counts all answers to a question as one.
    """
    steps = [row for row in rows if "accuracy" in row]
    tenth = len(steps) // 10
    if not tenth:
        return ""
    first, last = (_accuracy(part) for part in (steps[:tenth], steps[-tenth:]))
    asked = sum(row["answers"] for row in steps[-tenth:]) / num_generations
    error = math.sqrt((first * (1 - first) + last * (1 - last)) / asked)
    if asked < _ASKED or first - last <= 2 * error:
        return ""
    return f"accuracy has fallen: {first:.1%} right in the first {tenth} steps, {last:.1%} in the last"


def overlap(rows: Sequence[Mapping[str, Any]]) -> dict[str, float]:
    """Statistics of asynchronous rollouts over a run's steps: mean age of tokens, idle shares, and the ratio of generation
    time to learning time (`generating`), which is the number of engines that keep the trainer busy."""
    steps = [row for row in rows if "staleness" in row]
    if not steps:
        return {}
    generating, learning = (sum(row[name] for row in steps) for name in ("generating_seconds", "update_seconds"))
    names = "staleness", "mismatch_kl", "mismatch_chi2", "trainer_idle", "engines_idle"
    found = {name: statistics.fmean(row[name] for row in steps) for name in names}
    return found | {"staleness_max": max(row["staleness_max"] for row in steps), "generating": generating / learning}


def overlap_text(stage: str, found: Mapping[str, float], engines: int) -> str:
    """These statistics as a sentence; `engines`: number of engines in a fleet, 0 if unknown."""
    text = (
        f"'{stage}' learned from tokens that were {found['staleness']:.1f} updates old ({found['staleness_max']:.0f} at most), at a mismatch KL of "
        f"{found['mismatch_kl']:.2g} and chi-square of {found['mismatch_chi2']:.2g}. The trainer waited {found['trainer_idle']:.0%} of the time, "
        f"the engines {found['engines_idle']:.0%}; generation takes {found['generating']:.2g} times as long as learning"
    )
    wanted = max(1, math.ceil(engines * found["generating"] - 0.1))
    return f"{text}: {wanted} engines keep the trainer busy." if engines else f"{text}."


def _accuracy(rows: Sequence[Mapping[str, float]]) -> float:
    """The share of right answers."""
    return sum(row["accuracy"] * row["answers"] for row in rows) / sum(row["answers"] for row in rows)
