"""Memory of fine-tuning and RL on a device, for the whole model or an adapter on a frozen base. Does not import torch.

Bytes per parameter: trained ones need fp32 weights, gradients and AdamW's two moments, 16 in total. A frozen base needs only
what its format takes. Activations follow the policies of memory.py.

A layout shards all of these except an adapter: each rank holds the adapter without the experts of other ranks. With
`offload` the shards, their gradients and moments are in host memory. In addition: the parameters that FSDP gathers for a
pass (both ends of the model throughout, and two layers at a time), and the full copy for generation. ZeRO-1 shards moments.
"""

import dataclasses
import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from finback.model.adaptable import adaptable, adapter_size, in_blocks
from finback.model.config import ModelConfig
from finback.model.count import cache_bytes, choice_bytes, layer_parameters, parameters
from finback.parallel.layout import Layout
from finback.planner.hardware import Fact
from finback.planner.memory import layer_activation, rank_stages
from finback.planner.planned_stage import PlannedStage
from finback.planner.workload import Precision, Recompute

# bytes per weight of the blocks' matrices in a frozen base, scales included
WIDTHS = {"fp32": 4.0, "bf16": 2.0, "int8": 1.0, "nf4": 0.5 + 4 / 64}
# bytes per value of both moments on the device (train/lean_adam.py), with one scale per at most 256 of a row
MOMENTS = {"fp32": 8.0, "int8": 2 + 2 * 4 / 256, "host": 0.0}
ROWS = 256  # rows of logits at a time, and of an engine's batch
ADAPTER = {"rank": 16, "targets": ("attention", "mlp", "experts"), "base": "bf16"}
# changes that need less memory, mildest first, as knobs of the stage
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
    """Peak bytes by part."""

    weights: float
    gradients: float
    optimizer: float
    # a frozen reference model, or teachers
    reference: float
    activations: float
    # logits, one recomputed layer, one dequantized matrix
    working: float
    # cache of the answers sampled at a time: a whole batch, or as many as half of the remaining memory holds
    cache: float
    reserve: float
    # with a layout: parameters gathered for a pass with their gradients, and a full copy for generation
    gathered: float = 0.0
    served: float = 0.0

    @property
    def total(self) -> float:
        """Sum of all parts."""
        return sum(getattr(self, field.name) for field in dataclasses.fields(self))


def is_tuned(stage: PlannedStage) -> bool:
    """Whether a stage fine-tunes or queries an existing model."""
    return not {"adapter", "dtype"}.isdisjoint(stage.knobs) and stage.model is not None


def memory(
    c: ModelConfig,
    knobs: dict[str, Any],
    reserve: float,
    room: float = math.inf,
    teachers: Sequence[ModelConfig] = (),
    layout: Layout | None = None,
) -> TuningMemory:
    """Memory of a stage with these knobs (and teachers) on each device of a layout, or on one device, with `room` bytes."""
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
        held, learnt = 0.0, on_rank(c, layout)
        working = logits + 4.0 * c.vocab_size * c.hidden_size
    beta = (knobs.get("objective") or {}).get("beta", 0)
    beside = (4.0 * whole if beta and not adapter else 0.0) + 4.0 * sum(map(parameters, teachers))
    tokens = pass_tokens(knobs, layout)
    stored = 0.0 if layout is not None and layout.offload else 1.0
    trained = 1.0 if adapter else stored  # an adapter is not sharded, and stays on the device
    activations, again = _activations(c, precision, policy)
    found = TuningMemory(
        weights=stored * held + trained * 4.0 * learnt - (2.0 * in_blocks(c) if knobs.get("weights") == "bf16" else 0),
        gradients=trained * (6.0 if layout and layout.reduce == "bf16" else 4.0) * learnt,  # with a rounded copy
        optimizer=trained * MOMENTS[knobs.get("moments", "fp32")] * (learnt if adapter else whole / holders),
        reference=stored * beside / holders,
        activations=tokens * activations,
        working=working + tokens * again,
        cache=0.0,
        reserve=reserve,
        gathered=0.0 if layout is None else _gathered(c, layout, adapter, bool(beside)),
        served=_served(c, knobs, layout) if layout is not None and copies(knobs, layout) else 0.0,
    )
    replayed = choice_bytes(c, bool(knobs.get("routing_replay")), bool(knobs.get("indexer_replay")))
    each = int(knobs.get("max_tokens") or 0) * (cache_bytes(c, width) + replayed)
    states = found.total - activations * tokens
    answers = -(-_answers(knobs) // (layout.ranks if layout else 1))
    return dataclasses.replace(found, cache=_cache(answers, each, room - states + found.working))


def on_rank(c: ModelConfig, layout: Layout | None) -> float:
    """Number of trained values that a rank holds."""
    if layout is None or layout.sharding == "fsdp":
        return parameters(c) / (layout.holders if layout else 1)
    mine = rank_stages(c, layout)[0]
    return mine.plain + mine.routed


def learnt_numbers(c: ModelConfig, adapter: dict[str, Any], ep: int = 1) -> float:
    """Trained values of an adapter; a rank holds 1 / `ep` of its experts."""
    size = adapter_size(c, adapter["rank"], adapter["targets"], bool(adapter.get("dora")))
    return size - _of_experts(c, adapter) * (1 - 1 / ep)


def _of_experts(c: ModelConfig, adapter: dict[str, Any]) -> int:
    """Values of an adapter that belong to routed experts."""
    return adapter_size(c, adapter["rank"], {"experts"} & set(adapter["targets"]))


def frozen_bytes(c: ModelConfig, adapter: dict[str, Any]) -> float:
    """Bytes of an adapter's frozen base; embedding, head and norms are not quantized."""
    base = adapter.get("base", "bf16")
    ends = WIDTHS["fp32" if base == "fp32" else "bf16"] * (parameters(c) - in_blocks(c))
    return WIDTHS[base] * in_blocks(c) + ends


def _dequantized(c: ModelConfig, adapter: dict[str, Any], precision: Precision) -> float:
    """Bytes of one matrix in the compute dtype plus its fp32 intermediate; or of the head. DoRA also sums W + s B A."""
    base, width = adapter.get("base", "bf16"), 4 if precision == "fp32" else 2
    largest = max(rows * columns for *_, rows, columns in _matrices(c))
    head = 0 if ("fp32" if base == "fp32" else "bf16") == precision else width * c.vocab_size * c.hidden_size
    matrix = 12 * largest if adapter.get("dora") else 0 if base == precision else (4 + width) * largest
    return float(max(matrix, head))


def _matrices(c: ModelConfig) -> list[tuple[str, str, int, int, int]]:
    return [found for n in range(c.num_hidden_layers) for found in adaptable(c, n)]


def gathered_width(layout: Layout, adapter: dict[str, Any] | None) -> float:
    """Bytes per weight that is gathered for a pass."""
    return 2.0 if layout.gather == "bf16" else WIDTHS[adapter.get("base", "bf16") if adapter else "fp32"]


def _gathered(c: ModelConfig, layout: Layout, adapter: dict[str, Any] | None, beside: bool) -> float:
    """Bytes of the parameters that FSDP gathers on a rank at a time, and of their gradients before reduction.

    Embedding and head are not quantized. With ZeRO-1 only frozen models of this shape are gathered, if there are any (`beside`).
    """
    if layout.sharding != "fsdp" and not beside:
        return 0.0
    ends = c.vocab_size * c.hidden_size * (1 if c.tie_word_embeddings else 2)
    largest = 0.0
    for n in range(c.num_hidden_layers):
        routed = c.is_moe(n) * c.n_routed_experts * 3 * c.hidden_size * c.moe_intermediate_size
        largest = max(largest, layer_parameters(c, n, active=False) - routed + routed / layout.ep)
    width, gradients = gathered_width(layout, adapter), 0 if adapter or layout.sharding != "fsdp" else 4
    unpacked = max(width, WIDTHS["bf16"])
    return (unpacked + gradients) * ends + 2 * (width + gradients) * largest


def generates(knobs: dict[str, Any]) -> bool:
    """Whether a stage's own model generates while it learns."""
    return bool(knobs.get("task") or knobs.get("validation"))


def copies(knobs: dict[str, Any], layout: Layout) -> bool:
    """Whether ranks of a layout gather a full copy to generate with."""
    return generates(knobs) and (not layout.is_whole or knobs.get("qat", "none") != "none")


def copy_bytes(c: ModelConfig, knobs: dict[str, Any]) -> float:
    """Bytes of the full copy that a rank of a layout generates with: in the compute dtype, or a base as stored."""
    if adapter := knobs.get("adapter"):
        return frozen_bytes(c, adapter)
    return parameters(c) * (4.0 if knobs.get("compute", "fp32") == "fp32" else 2.0)


def _served(c: ModelConfig, knobs: dict[str, Any], layout: Layout) -> float:
    """Bytes of the full copy, plus fp32 adapters of all experts if a rank trains only some of them."""
    adapter = knobs.get("adapter")
    return copy_bytes(c, knobs) + (4.0 * _of_experts(c, adapter) if adapter and layout.ep > 1 else 0.0)


def _answering(c: ModelConfig, knobs: dict[str, Any], reserve: float, room: float) -> TuningMemory:
    """Memory of a stage that only queries a model in one dtype."""
    width = 4 if knobs["dtype"] == "fp32" else 2
    longest = max([int(exam["max_tokens"]) for exam in knobs.get("exams") or ()] or [int(knobs.get("max_tokens") or 0)])
    weights = float(width * parameters(c))
    cache = _cache(ROWS, longest * cache_bytes(c, width), room - weights - reserve)
    working = ROWS * c.vocab_size * (4.0 + width)
    return TuningMemory(weights, 0.0, 0.0, 0.0, 0.0, working, cache, reserve)


def _cache(rows: int, each: float, free: float) -> float:
    """Cache bytes of `rows` answers: all of them, or as many as half of the free memory holds, at least one."""
    return min(rows * each, max(each, free / 2)) if rows else 0.0


def pass_tokens(knobs: dict[str, Any], layout: Layout | None) -> int:
    """Tokens per backward pass of a rank."""
    cp, readers = (layout.cp, layout.dp * layout.micro_batches) if layout else (1, 1)
    if "micro_tokens" in knobs:  # an answer is only ever split along cp
        return -(-max(int(knobs["micro_tokens"]), int(knobs.get("max_tokens") or 0)) // cp)
    if knobs.get("task"):  # a student's own answers
        rows, length = int(knobs["prompts_per_step"]), int(knobs["max_tokens"])
    else:
        rows = int(knobs.get("batch_size") or knobs.get("prompts_per_step") or 1)
        length = int(knobs.get("seq_len") or 1)
    return -(-rows // readers) * -(-length // cp)


def _activations(c: ModelConfig, precision: Precision, policy: Recompute) -> tuple[float, float]:
    """Bytes per token that all layers store, and that the largest layer needs while it is recomputed."""
    some, every = (
        [layer_activation(c, c.is_moe(n), precision, p, 0.0) for n in range(c.num_hidden_layers)]
        for p in (policy, "none")
    )
    return sum(some), max(e - s for e, s in zip(every, some, strict=True))


def _answers(knobs: dict[str, Any]) -> int:
    """Maximal number of answers of a step that an engine generates at a time."""
    if not knobs.get("task") or "prompts_per_step" not in knobs:
        return 0
    return min(ROWS, int(knobs["prompts_per_step"]) * int(knobs.get("num_generations") or 1))


def judged(stage: PlannedStage, device: float, reserve: float, known: dict[str, Fact]) -> dict[str, Any]:
    """A stage's memory per device, whether it fits into `device` bytes, and what would make it fit."""
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
    with_them = f"with {', '.join(taken)} it" if taken else "no knob lowers this: it"
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
    """The fewest of STEPS, in order, that make a stage fit, or all of them; and the bytes it then needs."""
    knobs, taken = dict(knobs), list[str]()
    total = memory(c, knobs, reserve, room, teachers, layout).total
    if layout is not None and layout.sharding != "fsdp" and total > room:
        layout, taken = layout.sharded(), ['sharding="fsdp"']
        total = memory(c, knobs, reserve, room, teachers, layout).total
    for text, changed in STEPS:
        changed = {k: v for k, v in changed.items() if k in knobs and not (k == "adapter" and _is_smaller(knobs[k], v))}
        less = memory(c, knobs | changed, reserve, room, teachers, layout).total
        if total <= room or less >= total:
            continue
        if "adapter" in changed:  # replaces what was tried before
            taken = [t for t in taken if not t.startswith(("adapter", "recompute", "moments"))]
        if "moments" in changed:
            taken = [t for t in taken if not t.startswith("moments")]
        knobs, taken, total = knobs | changed, [*taken, text], less
    return taken, total


def _is_smaller(adapter: dict[str, Any] | None, other: dict[str, Any]) -> bool:
    """Whether the base of an adapter needs no more memory than another's."""
    return adapter is not None and WIDTHS[adapter.get("base", "bf16")] <= WIDTHS[other["base"]]
