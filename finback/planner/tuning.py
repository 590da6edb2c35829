"""Memory of fine-tuning and RL on one device: the whole model learnt, or an adapter on a frozen base. No torch here.

Bytes per parameter: learnt ones have fp32 weights, gradients and AdamW's two moments, 16 in all. A frozen base has what its
format takes, and nothing else. Of activations each policy of memory.py keeps its part.
"""

import dataclasses
from dataclasses import dataclass
from typing import Any

from finback.model.config import ModelConfig
from finback.model.count import adaptable, adapter_size, cache_bytes, parameters
from finback.planner.hardware import Fact
from finback.planner.memory import layer_activation
from finback.planner.planned_stage import PlannedStage
from finback.planner.workload import Precision, Recompute

# bytes of a weight of the blocks' matrices in a frozen base, factors included
WIDTHS = {"fp32": 4.0, "bf16": 2.0, "int8": 1.0, "nf4": 0.5 + 4 / 64}
ROWS = 256  # of logits at a time, and of an engine's batch
ADAPTER = {"rank": 16, "targets": ("attention", "mlp", "experts"), "base": "bf16"}
# what takes less memory, mildest first, as knobs of the stage
STEPS: tuple[tuple[str, dict[str, Any]], ...] = (
    ('recompute="block"', {"recompute": "block"}),
    ('compute="bf16"', {"compute": "bf16"}),
    ("adapter=LoRA()", {"adapter": ADAPTER, "recompute": None}),
    ('adapter=LoRA(base="nf4")', {"adapter": ADAPTER | {"base": "nf4"}}),
    ("one row at a time", {"batch_size": 1, "micro_tokens": 1}),
)


@dataclass(frozen=True)
class TuningMemory:
    """Bytes at the fullest moment."""

    weights: float
    gradients: float
    optimizer: float
    # a copy of the policy that does not learn
    reference: float
    activations: float
    # logits, one layer made again, one matrix dequantized
    working: float
    # of the answers that are sampled at a time
    cache: float
    reserve: float

    @property
    def total(self) -> float:
        """All of it."""
        return sum(getattr(self, field.name) for field in dataclasses.fields(self))


def is_tuned(stage: PlannedStage) -> bool:
    """Whether a stage learns from where another one stopped, by all weights or by an adapter."""
    return "adapter" in stage.knobs and stage.model is not None


def memory(c: ModelConfig, knobs: dict[str, Any], reserve: float) -> TuningMemory:
    """What a stage with these knobs takes of a device that holds it alone."""
    adapter, precision = knobs.get("adapter"), knobs.get("compute", "fp32")
    whole, width = parameters(c), 4 if precision == "fp32" else 2
    policy: Recompute = knobs.get("recompute") or ("block" if adapter else "none")
    every = [found for n in range(c.num_hidden_layers) for found in adaptable(c, n)]
    in_blocks = sum(number * rows * columns for _, _, number, rows, columns in every)
    largest = max(rows * columns for *_, rows, columns in every)
    logits = ROWS * c.vocab_size * (4 + 2 * width)
    if adapter:
        learnt, base = adapter_size(c, adapter["rank"], adapter["targets"]), adapter.get("base", "bf16")
        rest = WIDTHS["fp32" if base == "fp32" else "bf16"] * (whole - in_blocks)
        weights = WIDTHS[base] * in_blocks + rest + 4.0 * learnt
        # a matrix in the dtype of the arithmetic, and on the way there in fp32
        working: float = logits + (0 if base == precision else (4 + width) * largest)
    else:
        learnt, weights = whole, 4.0 * whole
        working = logits + 4.0 * c.vocab_size * c.hidden_size
    beta = (knobs.get("objective") or {}).get("beta", 0)
    tokens = _tokens(knobs)
    activations, again = _activations(c, precision, policy)
    return TuningMemory(
        weights=weights,
        gradients=4.0 * learnt,
        optimizer=8.0 * learnt,
        reference=4.0 * whole if beta and not adapter else 0.0,
        activations=tokens * activations,
        working=working + tokens * again,
        cache=_cache(c, knobs, width),
        reserve=reserve,
    )


def _tokens(knobs: dict[str, Any]) -> int:
    """Of one backward pass."""
    if "micro_tokens" in knobs:  # an answer is never cut
        return max(int(knobs["micro_tokens"]), int(knobs.get("max_tokens") or 0))
    return int(knobs.get("batch_size") or knobs.get("prompts_per_step") or 1) * int(knobs.get("seq_len") or 1)


def _activations(c: ModelConfig, precision: Precision, policy: Recompute) -> tuple[float, float]:
    """Bytes per token that all layers keep, and that the largest layer takes while it is made again."""
    some, every = (
        [layer_activation(c, c.is_moe(n), precision, p, 0.0) for n in range(c.num_hidden_layers)]
        for p in (policy, "none")
    )
    return sum(some), max(e - s for e, s in zip(every, some, strict=True))


def _cache(c: ModelConfig, knobs: dict[str, Any], width: int) -> float:
    if "num_generations" not in knobs:
        return 0.0
    rows = min(ROWS, int(knobs["prompts_per_step"]) * int(knobs["num_generations"]))
    return rows * int(knobs["max_tokens"]) * cache_bytes(c, width)


def judged(stage: PlannedStage, device: float, reserve: float, known: dict[str, Fact]) -> dict[str, Any]:
    """A stage's memory on a device of so many bytes, whether it fits, and what would make it fit."""
    assert stage.model is not None, "a stage that trains has a model"
    found, room = memory(stage.model, stage.knobs, reserve), device * (1 - known["margin"].value)
    values: dict[str, Any] = {
        "memory": dataclasses.asdict(found) | {"total": found.total},
        "memory_bytes": found.total,
        "fits": found.total <= room,
    }
    if values["fits"]:
        return values
    problem = f"takes {found.total / 1e9:,.1f} GB, and {room / 1e9:,.1f} of {device / 1e9:,.0f} may be used"
    return values | {"change": f"{problem}: {_change(stage, room, reserve)}"}


def _change(stage: PlannedStage, room: float, reserve: float) -> str:
    """The fewest of STEPS that make a stage fit, in their order."""
    assert stage.model is not None, "a stage that trains has a model"
    knobs, taken = dict(stage.knobs), list[str]()
    for text, changed in STEPS:
        changed = {k: v for k, v in changed.items() if k in knobs and not (k == "adapter" and _is_smaller(knobs[k], v))}
        if not changed or all(knobs[k] == v for k, v in changed.items()):
            continue
        if "adapter" in changed:  # in the place of what was tried before
            taken = [t for t in taken if not t.startswith(("adapter", "recompute"))]
        knobs, taken = knobs | changed, [*taken, text]
        total = memory(stage.model, knobs, reserve).total
        if total <= room:
            return f"with {', '.join(taken)} it takes {total / 1e9:,.1f} GB"
    return f"with {', '.join(taken)} it still takes {memory(stage.model, knobs, reserve).total / 1e9:,.1f} GB; take a larger device"


def _is_smaller(adapter: dict[str, Any] | None, other: dict[str, Any]) -> bool:
    """Whether the base of an adapter takes no more than that of another one."""
    return adapter is not None and WIDTHS[adapter.get("base", "bf16")] <= WIDTHS[other["base"]]
