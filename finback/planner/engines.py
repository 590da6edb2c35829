"""How many engines a trainer needs so that neither waits for the other. Does not import torch.

Generating a step's answers takes tokens / (engines x rate) seconds. If answers are generated ahead, while the trainer
learns from earlier ones, a step takes the longer of both times. The rate is measured (`--measured RUN`), or DeepSeek's
published one, scaled.
"""

import math
import statistics
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from finback.config import UserError
from finback.model.config import V3, ModelConfig
from finback.model.count import parameters
from finback.planner.hardware import Machine
from finback.planner.planned_stage import PlannedStage
from finback.runs import reader
from finback.runs.files import METRICS, read_lines
from finback.runs.ledger import spent

# decoding speed of a node of eight H800 at V3's size (DeepSeek-V3/R1 Inference System Overview, March 2025)
PUBLISHED = 14_800 / 8
PUBLISHED_BANDWIDTH = 3.35e12  # bytes per second of an H800
SHOWN = 8  # steps in a picture
SPARE = 0.1  # fraction of an engine that does not justify one more


@dataclass(frozen=True)
class MeasuredStep:
    """A typical step of an RL stage, from its log."""

    # tokens per step, seconds of learning from them, and tokens per second of one engine
    tokens: float
    learning: float
    rate: float


@dataclass(frozen=True)
class OverlappedStep:
    """Start and end of generating and learning of one step, in seconds since the run began."""

    asked: float
    answered: float
    begun: float
    learnt: float


def overlapped(generating: float, learning: float, max_staleness: int, steps: int) -> list[OverlappedStep]:
    """A timeline of steps: generation starts when the previous answers are done and the weights are new enough (GRPO's max_staleness)."""
    found: list[OverlappedStep] = []
    for number in range(steps):
        before = found[-1] if found else OverlappedStep(0.0, 0.0, 0.0, 0.0)
        newest = found[number - 1 - max_staleness].learnt if number > max_staleness else 0.0
        asked = max(before.answered, newest)
        answered = asked + generating
        begun = max(answered, before.learnt)
        found.append(OverlappedStep(asked, answered, begun, begun + learning))
    return found


def wanted(tokens: float, learning: float, rate: float) -> int:
    """Number of engines that generate a step's tokens while the trainer learns from an earlier step's."""
    return max(1, math.ceil(tokens / (rate * learning) - SPARE))


def balance(tokens: float, learning: float, rate: float, engines: int, max_staleness: int) -> dict[str, float]:
    """A step with `engines` engines: seconds of generating and of the step, and idle shares of trainer and engines."""
    generating = tokens / (rate * engines)
    steps = overlapped(generating, learning, max_staleness, 50)
    each = (steps[-1].learnt - steps[-26].learnt) / 25  # after the start-up phase
    waits = {"trainer_idle": max(0.0, 1 - learning / each), "engines_idle": max(0.0, 1 - generating / each)}  # rounding
    return {"engines": engines, "generating": generating, "step": each, **waits}


def measured(root: Path) -> dict[str, MeasuredStep]:
    """The RL stages of a run folder, by name; UserError if none has logged a step."""
    found = {}
    for stage in reader.stages(root):
        rows = [row for row in read_lines(stage.folder / METRICS) if row.get("generating_seconds")]
        if not rows or stage.kind != "reinforcement learning":
            continue
        rollouts = stage.config.get("rollouts")
        fleet = rollouts if isinstance(rollouts, dict) else {}
        engines = fleet.get("n") or len(fleet.get("urls") or ()) or _ranks(stage.folder)
        seconds = [row["generating_seconds"] for row in rows]
        made = [row["generated_per_second"] * row["generating_seconds"] for row in rows]
        learning = statistics.median(row["update_seconds"] for row in rows)
        found[stage.name] = MeasuredStep(statistics.fmean(made), learning, sum(made) / sum(seconds) / engines)
    if not found:
        raise UserError("--measured", str(root), "no RL stage has logged a step there", "Give the folder of a run.")
    return found


def _ranks(folder: Path) -> int:
    """Number of ranks that have their own engines."""
    total = spent(folder)
    return max(1, round(total["core_seconds"] / total["seconds"])) if total["seconds"] else 1


def published(model: ModelConfig, machine: Machine) -> tuple[float, str]:
    """Tokens per second of an engine on one device, and the source: V3's, scaled by active parameters and memory bandwidth."""
    share = parameters(V3, active=True, mtp=False) / parameters(model, active=True, mtp=False)
    bandwidth = machine.memory_bandwidth.value / PUBLISHED_BANDWIDTH if machine.memory_bandwidth else 1.0
    text = "14,800 tokens/s of a node of H800 with V3 (DeepSeek, March 2025), by active parameters and memory bandwidth"
    return PUBLISHED * share * bandwidth, text


def planned(
    stage: PlannedStage, seconds: float | None, machine: Machine | None, known: dict[str, MeasuredStep]
) -> dict[str, Any]:
    """The engines of an RL stage; {} if nothing is known. seconds: total time of learning."""
    knobs, steps = stage.knobs, int(stage.knobs.get("steps") or 0)
    if not (stage.work.tokens_trained and stage.work.tokens_generated and steps and stage.model is not None):
        return {}
    staleness = int(knobs.get("max_staleness") or 0)
    met = known.get(stage.name) or (next(iter(known.values())) if len(known) == 1 else None)
    if met is not None:
        tokens, learning, rate, source = met.tokens, met.learning, met.rate, "measured"
    elif machine is not None and seconds:
        tokens, learning = stage.work.tokens_generated / steps, seconds / steps
        rate, source = published(stage.model, machine)
    else:
        return {}
    best = wanted(tokens, learning, rate)
    rollouts = knobs.get("rollouts")
    own = rollouts.get("n") if isinstance(rollouts, dict) and rollouts.get("type") == "Fleet" else None
    about = {"tokens": tokens, "learning": learning, "rate": rate, "source": source, "max_staleness": staleness}
    found = {**about, "wanted": balance(tokens, learning, rate, best, max(1, staleness))}
    return found | ({"given": balance(tokens, learning, rate, own, staleness)} if own else {})


def text(found: dict[str, Any]) -> str:
    """The result as a sentence."""
    best, given = found["wanted"], found.get("given")
    said = (
        f"a step learns for {found['learning']:,.2g} s from {found['tokens']:,.0f} tokens, and an engine generates {found['rate']:,.0f} per second "
        f"({found['source']}): with max_staleness of 1 or more, {best['engines']} {_engines(best['engines'])} busy "
        f"(trainer idle {best['trainer_idle']:.0%}, engines {best['engines_idle']:.0%})"
    )
    if given is None:
        return said
    waits = f"trainer idle {given['trainer_idle']:.0%}, engines {given['engines_idle']:.0%}"
    return f"{said}; the recipe's {given['engines']} with max_staleness={found['max_staleness']}: {waits}"


def _engines(n: int) -> str:
    return "engine keeps the trainer" if n == 1 else "engines keep the trainer"


def of_plan(stages: dict[str, Any]) -> Iterable[tuple[str, dict[str, Any]]]:
    """The stages of a plan whose engines are known, each with the values of its engines."""
    return ((name, values["engines"]) for name, values in stages.items() if "engines" in values)
