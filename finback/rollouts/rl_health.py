"""Whether RL is sound: how far trainer and engine may be apart, which steps teach nothing and why. No torch here."""

from collections.abc import Mapping
from typing import Any

NOTICED = 5  # steps in a row that teach nothing after which it is said
_MAX_GAP = {"fp32": 1e-2, "bf16": 0.2}  # nats per token; sound runs differ by 1e-5 and by 0.03 to 0.06


def max_gap(asked: float | None, compute: Any) -> float:
    """How far trainer and engine may disagree, in nats per token on average; by the precision where nothing is asked."""
    return asked if asked is not None else _MAX_GAP.get(compute, max(_MAX_GAP.values()))


def cause(metrics: Mapping[str, float]) -> str:
    """Why a step of GRPO taught nothing, with what to do about it, from the metrics of the step; "" where it taught something."""
    if metrics["truncated"] >= 1:
        return "every answer was cut off: raise max_tokens, or start from a model that ends its answers"
    if metrics["groups_with_gradient"] > 0:
        return ""
    if metrics["accuracy"] >= 1:
        return "every answer is right: ask harder questions"
    if metrics["well_formed"] <= 0:
        return (
            "no answer has the form that is asked for: teach it by SFT first, put an `instruction` behind the questions, or "
            "look at the answers with `finback show RUN --samples`"
        )
    if metrics["accuracy"] <= 0:
        return "no answer is right: ask easier questions, start from a better model, or check the golds and the checker"
    return "all answers to a question earn the same: raise num_generations or the temperature, or ask questions of another difficulty"
