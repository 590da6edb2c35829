"""The health of the routers: who gets how many tokens, how the biases answer, and whether an expert is left out."""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from torch import Tensor

from finback.model.moe import Router, max_violation
from finback.parallel.mesh import World

LOADS = 4096  # experts times layers up to which records hold every number


@dataclass(frozen=True)
class Health:
    """One step's loads (layers, experts) over all ranks, padding left out, before the biases answered."""

    # the worst layer's (max load - mean load) / mean load (2408.15664); 0 for a dense model
    violation: float
    # experts of any layer without a token
    idle: int
    loads: list[Tensor]

    @property
    def shares(self) -> list[list[float]]:
        """Each expert's share of its layer's load; nothing for models with too many of them for a log."""
        if sum(map(len, self.loads)) > LOADS:
            return []
        return [[round(x, 4) for x in (load / load.sum().clamp(min=1)).tolist()] for load in self.loads]


def balance(routers: Sequence[Router], world: World, speed: float) -> Health:
    """Sum the routers' loads over ranks, move the biases by `speed` (V3 2.1.2), and forget the loads.

    Every router is treated alike and alone: one without tokens keeps none of the others from being balanced.
    """
    loads = []
    for router in routers:
        loads.append(world.sum_(router.load).clone())
        router.update_bias(speed)
    violation = max((max_violation(load) for load in loads), default=0.0)
    return Health(violation, sum(int((load == 0).sum()) for load in loads), loads)


def forget(routers: Sequence[Router]) -> None:
    """Drop what has been counted, of a step that is not learnt from for one."""
    for router in routers:
        router.load.zero_()


def describe(health: Health, biases: Sequence[Tensor]) -> dict[str, Any]:
    """A line for router.jsonl: each layer's violation, shares of its load and biases (of large models no shares)."""
    shares = health.shares
    return {
        "max_violation": [round(max_violation(load), 4) for load in health.loads],
        "idle": [int((load == 0).sum()) for load in health.loads],
        "bias_spread": [round(float(b.max() - b.min()), 5) for b in biases],
        "load": shares,
        "bias": [[round(x, 5) for x in bias.tolist()] for bias in biases] if shares else [],
    }
