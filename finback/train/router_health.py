"""Router health: load per expert, bias updates, and idle experts."""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from torch import Tensor

from finback.model.moe import Router, max_violation
from finback.parallel.mesh import World

LOADS = 4096  # experts times layers up to which records hold all shares


@dataclass(frozen=True)
class Health:
    """Expert loads of one step (layers, experts) over all ranks, without padding, before the bias update."""

    # largest (max load - mean load) / mean load of any layer (2408.15664); 0 for a dense model
    violation: float
    # number of experts, over all layers, without a token
    idle: int
    loads: list[Tensor]

    @property
    def shares(self) -> list[list[float]]:
        """Each expert's share of its layer's load; empty for models with too many experts to log."""
        if sum(map(len, self.loads)) > LOADS:
            return []
        return [[round(x, 4) for x in (load / load.sum().clamp(min=1)).tolist()] for load in self.loads]


def balance(routers: Sequence[Router], world: World, speed: float) -> Health:
    """Sums the routers' loads over ranks, moves the biases by `speed` (V3 2.1.2), and resets the loads.

    Each router is balanced on its own: one without tokens does not keep the others from being balanced.
    """
    loads = []
    for router in routers:
        loads.append(world.sum_(router.load).clone())
        router.update_bias(speed)
    violation = max((max_violation(load) for load in loads), default=0.0)
    return Health(violation, sum(int((load == 0).sum()) for load in loads), loads)


def forget(routers: Sequence[Router]) -> None:
    """Resets the loads, for example after a step that is skipped."""
    for router in routers:
        router.load.zero_()


def describe(health: Health, biases: Sequence[Tensor]) -> dict[str, Any]:
    """A row for router.jsonl: each layer's violation, load shares and biases (no shares for large models)."""
    shares = health.shares
    return {
        "max_violation": [round(max_violation(load), 4) for load in health.loads],
        "idle": [int((load == 0).sum()) for load in health.loads],
        "bias_spread": [round(float(b.max() - b.min()), 5) for b in biases],
        "load": shares,
        "bias": [[round(x, 5) for x in bias.tolist()] for bias in biases] if shares else [],
    }
