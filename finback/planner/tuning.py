"""Memory of fine-tuning and RL on a device: the whole model learnt, or an adapter on a frozen base. No torch here.

Bytes per parameter: learnt ones have fp32 weights, gradients and AdamW's two moments, 16 in all. A frozen base has what its
format takes, and nothing else. Of activations each policy of memory.py keeps its part.

Under a layout all of it is shared out among its ranks but an adapter, of which each has all but other ranks' experts'. On top come what FSDP puts together
for a pass, both ends of the model as long as it lasts and two layers at a time, and the whole copy to generate with.
"""

import dataclasses
import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from finback.model.adaptable import adaptable, adapter_size
from finback.model.config import ModelConfig
from finback.model.count import cache_bytes, layer_parameters, parameters
from finback.parallel.layout import Layout
from finback.planner.hardware import Fact
from finback.planner.memory import layer_activation
from finback.planner.planned_stage import PlannedStage
from finback.planner.workload import Precision, Recompute

# bytes of a weight of the blocks' matrices in a frozen base, factors included
WIDTHS = {"fp32": 4.0, "bf16": 2.0, "int8": 1.0, "nf4": 0.5 + 4 / 64}
# bytes of both moments of a number on the device (train/lean_adam.py), with a factor for 256 of a row at most
MOMENTS = {"fp32": 8.0, "int8": 2 + 2 * 4 / 256, "host": 0.0}
ROWS = 256  # of logits at a time, and of an engine's batch
ADAPTER = {"rank": 16, "targets": ("attention", "mlp", "experts"), "base": "bf16"}
# what takes less memory, mildest first, as knobs of the stage
STEPS: tuple[tuple[str, dict[str, Any]], ...] = (
    ('recompute="block"', {"recompute": "block"}),
    ('compute="bf16"', {"compute": "bf16"}),
    ('dtype="bf16"', {"dtype": "bf16"}),
    ('moments="int8"', {"moments": "int8"}),
    ('moments="host"', {"moments": "host"}),
    ("adapter=LoRA()", {"adapter": ADAPTER, "recompute": None, "moments": "fp32"}),
    ('adapter=LoRA(base="nf4")', {"adapter": ADAPTER | {"base": "nf4"}}),
    ("one row at a time", {"batch_size": 1, "micro_tokens": 1}),
)


@dataclass(frozen=True)
class TuningMemory:
    """Bytes at the fullest moment."""

    weights: float
    gradients: float
    optimizer: float
    # a copy of the policy that does not learn, or teachers
    reference: float
    activations: float
    # logits, one layer made again, one matrix dequantized
    working: float
    # of the answers that are sampled at a time: all of a batch, or as many as half of the room that states leave holds
    cache: float
    reserve: float
    # under a layout: what is put together for a pass, with its gradients, and a whole copy to generate with
    gathered: float = 0.0
    served: float = 0.0

    @property
    def total(self) -> float:
        """All of it."""
        return sum(getattr(self, field.name) for field in dataclasses.fields(self))


def is_tuned(stage: PlannedStage) -> bool:
    """Whether a stage learns from where another one stopped, by all weights or by an adapter, or has its model answer."""
    return not {"adapter", "dtype"}.isdisjoint(stage.knobs) and stage.model is not None


def memory(
    c: ModelConfig,
    knobs: dict[str, Any],
    reserve: float,
    room: float = math.inf,
    teachers: Sequence[ModelConfig] = (),
    layout: Layout | None = None,
) -> TuningMemory:
    """What a stage with these knobs, and perhaps teachers, takes of each device of a layout, or of one, with so much room."""
    if "dtype" in knobs:
        return _answering(c, knobs, reserve, room)
    adapter, precision = knobs.get("adapter"), knobs.get("compute", "fp32")
    whole, width, holders = parameters(c), 4 if precision == "fp32" else 2, layout.holders if layout else 1
    policy: Recompute = knobs.get("recompute") or ("block" if adapter else "none")
    logits = ROWS * c.vocab_size * (4 + 2 * width)
    if adapter:
        held, learnt = frozen_bytes(c, adapter) / holders, learnt_numbers(c, adapter, layout.ep if layout else 1)
        working = logits + _dequantized(c, adapter, precision)
    else:
        held, learnt = 0.0, whole / holders
        working = logits + 4.0 * c.vocab_size * c.hidden_size
    beta = (knobs.get("objective") or {}).get("beta", 0)
    beside = (4.0 * whole if beta and not adapter else 0.0) + 4.0 * sum(map(parameters, teachers))
    tokens = pass_tokens(knobs, layout)
    activations, again = _activations(c, precision, policy)
    found = TuningMemory(
        weights=held + 4.0 * learnt,
        gradients=4.0 * learnt,
        optimizer=MOMENTS[knobs.get("moments", "fp32")] * learnt,
        reference=beside / holders,
        activations=tokens * activations,
        working=working + tokens * again,
        cache=0.0,
        reserve=reserve,
        gathered=0.0 if layout is None else _gathered(c, layout, adapter),
        served=_served(c, knobs, layout) if layout is not None and generates(knobs) else 0.0,
    )
    each, states = int(knobs.get("max_tokens") or 0) * cache_bytes(c, width), found.total - activations * tokens
    answers = -(-_answers(knobs) // (layout.ranks if layout else 1))
    return dataclasses.replace(found, cache=_cache(answers, each, room - states + found.working))


def learnt_numbers(c: ModelConfig, adapter: dict[str, Any], ep: int = 1) -> float:
    """Those of an adapter, of whose experts a rank has one in `ep`."""
    size = adapter_size(c, adapter["rank"], adapter["targets"], bool(adapter.get("dora")))
    return size - _of_experts(c, adapter) * (1 - 1 / ep)


def _of_experts(c: ModelConfig, adapter: dict[str, Any]) -> int:
    """Numbers of an adapter that are of routed experts."""
    return adapter_size(c, adapter["rank"], {"experts"} & set(adapter["targets"]))


def frozen_bytes(c: ModelConfig, adapter: dict[str, Any]) -> float:
    """Of the base of an adapter; embedding, head and norms are not quantized."""
    base = adapter.get("base", "bf16")
    in_blocks = sum(number * rows * columns for _, _, number, rows, columns in _matrices(c))
    return WIDTHS[base] * in_blocks + WIDTHS["fp32" if base == "fp32" else "bf16"] * (parameters(c) - in_blocks)


def _dequantized(c: ModelConfig, adapter: dict[str, Any], precision: Precision) -> float:
    """A matrix in the dtype of the arithmetic, and on the way there in fp32; or the head in it. DoRA sums up W + s B A."""
    base, width = adapter.get("base", "bf16"), 4 if precision == "fp32" else 2
    largest = max(rows * columns for *_, rows, columns in _matrices(c))
    head = 0 if ("fp32" if base == "fp32" else "bf16") == precision else width * c.vocab_size * c.hidden_size
    matrix = 12 * largest if adapter.get("dora") else 0 if base == precision else (4 + width) * largest
    return float(max(matrix, head))


def _matrices(c: ModelConfig) -> list[tuple[str, str, int, int, int]]:
    return [found for n in range(c.num_hidden_layers) for found in adaptable(c, n)]


def gathered_width(layout: Layout, adapter: dict[str, Any] | None) -> float:
    """Bytes of a weight that is put together for a pass."""
    return 2.0 if layout.gather == "bf16" else WIDTHS[adapter.get("base", "bf16") if adapter else "fp32"]


def _gathered(c: ModelConfig, layout: Layout, adapter: dict[str, Any] | None) -> float:
    """Bytes of the parameters that FSDP puts together on a rank at a time, and of their gradients before they are summed.

    Both ends of the model are not quantized.
    """
    ends = c.vocab_size * c.hidden_size * (1 if c.tie_word_embeddings else 2)
    largest = 0.0
    for n in range(c.num_hidden_layers):
        routed = c.is_moe(n) * c.n_routed_experts * 3 * c.hidden_size * c.moe_intermediate_size
        largest = max(largest, layer_parameters(c, n, active=False) - routed + routed / layout.ep)
    width, gradients = gathered_width(layout, adapter), 0 if adapter else 4
    unpacked = max(width, WIDTHS["bf16"])
    return (unpacked + gradients) * ends + 2 * (width + gradients) * largest


def generates(knobs: dict[str, Any]) -> bool:
    """Whether a stage's own model answers while it learns."""
    return bool(knobs.get("task") or knobs.get("validation"))


def copy_bytes(c: ModelConfig, knobs: dict[str, Any]) -> float:
    """Of the whole copy that a rank of a layout generates with: in the dtype of the arithmetic, a base as it is stored."""
    if adapter := knobs.get("adapter"):
        return frozen_bytes(c, adapter)
    return parameters(c) * (4.0 if knobs.get("compute", "fp32") == "fp32" else 2.0)


def _served(c: ModelConfig, knobs: dict[str, Any], layout: Layout) -> float:
    """Of such a copy, and of the adapters of all experts in fp32 where a rank trains some of them."""
    adapter = knobs.get("adapter")
    return copy_bytes(c, knobs) + (4.0 * _of_experts(c, adapter) if adapter and layout.ep > 1 else 0.0)


def _answering(c: ModelConfig, knobs: dict[str, Any], reserve: float, room: float) -> TuningMemory:
    """Of a stage that reads a model in one dtype and asks it."""
    width = 4 if knobs["dtype"] == "fp32" else 2
    longest = max([int(exam["max_tokens"]) for exam in knobs.get("exams") or ()] or [int(knobs.get("max_tokens") or 0)])
    weights = float(width * parameters(c))
    cache = _cache(ROWS, longest * cache_bytes(c, width), room - weights - reserve)
    working = ROWS * c.vocab_size * (4.0 + width)
    return TuningMemory(weights, 0.0, 0.0, 0.0, 0.0, working, cache, reserve)


def _cache(rows: int, each: float, free: float) -> float:
    """Of so many answers of so many bytes: all of them, or as many as half of what is free holds, one at least."""
    return min(rows * each, max(each, free / 2)) if rows else 0.0


def pass_tokens(knobs: dict[str, Any], layout: Layout | None) -> int:
    """Of one backward pass of a rank."""
    cp, readers = (layout.cp, layout.dp * layout.micro_batches) if layout else (1, 1)
    if "micro_tokens" in knobs:  # an answer is never cut but along cp
        return -(-max(int(knobs["micro_tokens"]), int(knobs.get("max_tokens") or 0)) // cp)
    if knobs.get("task"):  # a student's own answers
        rows, length = int(knobs["prompts_per_step"]), int(knobs["max_tokens"])
    else:
        rows = int(knobs.get("batch_size") or knobs.get("prompts_per_step") or 1)
        length = int(knobs.get("seq_len") or 1)
    return -(-rows // readers) * -(-length // cp)


def _activations(c: ModelConfig, precision: Precision, policy: Recompute) -> tuple[float, float]:
    """Bytes per token that all layers keep, and that the largest layer takes while it is made again."""
    some, every = (
        [layer_activation(c, c.is_moe(n), precision, p, 0.0) for n in range(c.num_hidden_layers)]
        for p in (policy, "none")
    )
    return sum(some), max(e - s for e, s in zip(every, some, strict=True))


def _answers(knobs: dict[str, Any]) -> int:
    """Those of a step that an engine makes at a time at most."""
    if not knobs.get("task") or "prompts_per_step" not in knobs:
        return 0
    return min(ROWS, int(knobs["prompts_per_step"]) * int(knobs.get("num_generations") or 1))


def judged(stage: PlannedStage, device: float, reserve: float, known: dict[str, Fact]) -> dict[str, Any]:
    """A stage's memory on each device of so many bytes, whether it fits, and what would make it fit."""
    assert stage.model is not None, "a stage that trains has a model"
    room = device * (1 - known["margin"].value)
    found = memory(stage.model, stage.knobs, reserve, room, stage.teachers, stage.layout)
    values: dict[str, Any] = {
        "memory": dataclasses.asdict(found) | {"total": found.total},
        "memory_bytes": found.total,
        "fits": found.total <= room,
    }
    if values["fits"]:
        return values
    taken, least = changes(stage.model, stage.knobs, reserve, room, stage.teachers, stage.layout)
    with_them = f"with {', '.join(taken)} it" if taken else "no knob of it takes less: it"
    change = f"{with_them} {'takes' if least <= room else 'still takes'} {least / 1e9:,.1f} GB"
    if least > room:
        more = "a layout of more ranks, or " if stage.layout else ""
        change += f"; take {more}a device of {least / 1e9 / (1 - known['margin'].value):,.0f} GB or more"
    problem = f"takes {found.total / 1e9:,.1f} GB, and {room / 1e9:,.1f} of {device / 1e9:,.0f} may be used"
    return values | {"change": f"{problem}: {change}"}


def changes(
    c: ModelConfig,
    knobs: dict[str, Any],
    reserve: float,
    room: float,
    teachers: Sequence[ModelConfig] = (),
    layout: Layout | None = None,
) -> tuple[list[str], float]:
    """The fewest of STEPS, in their order, that make a stage fit, or all of them; and the bytes that it then takes."""
    knobs, taken = dict(knobs), list[str]()
    total = memory(c, knobs, reserve, room, teachers, layout).total
    for text, changed in STEPS:
        changed = {k: v for k, v in changed.items() if k in knobs and not (k == "adapter" and _is_smaller(knobs[k], v))}
        less = memory(c, knobs | changed, reserve, room, teachers, layout).total
        if total <= room or less >= total:
            continue
        if "adapter" in changed:  # in the place of what was tried before
            taken = [t for t in taken if not t.startswith(("adapter", "recompute", "moments"))]
        if "moments" in changed:
            taken = [t for t in taken if not t.startswith("moments")]
        knobs, taken, total = knobs | changed, [*taken, text], less
    return taken, total


def _is_smaller(adapter: dict[str, Any] | None, other: dict[str, Any]) -> bool:
    """Whether the base of an adapter takes no more than that of another one."""
    return adapter is not None and WIDTHS[adapter.get("base", "bf16")] <= WIDTHS[other["base"]]
