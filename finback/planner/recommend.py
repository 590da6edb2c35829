"""Recommends a layout: enumerates candidates, keeps those that fit, and takes the fastest. Does not import torch."""

import dataclasses
import itertools
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any

from finback.config import UserError
from finback.model.config import ModelConfig
from finback.parallel.layout import Sharding, split_layers
from finback.parallel.schedules import ScheduleName
from finback.planner import cost, memory, traffic
from finback.planner.hardware import Fact, Machine, Site
from finback.planner.memory import Memory
from finback.planner.workload import Recompute, Workload


@dataclass(frozen=True)
class JudgedWorkload:
    """A step, the memory of each pipeline rank, and whether it fits with the margin."""

    work: Workload
    ranks: tuple[Memory, ...]
    fits: bool

    @property
    def worst(self) -> Memory:
        """Memory of the fullest rank."""
        return max(self.ranks, key=lambda rank: rank.total)


def judge(c: ModelConfig, work: Workload, machine: Machine, known: dict[str, Fact]) -> JudgedWorkload:
    """Whether a step fits on the machine."""
    ranks = tuple(memory.rank_memory(c, work, known))
    room = machine.memory.value * (1 - known["margin"].value)
    return JudgedWorkload(work, ranks, max(rank.total for rank in ranks) <= room)


@dataclass(frozen=True)
class Search:
    """A search for a layout: a step that is known except for its layout, and the hardware."""

    work: Workload
    site: Site
    # fields that stay as in `work`: fields of the layout, and recompute
    fixed: frozenset[str]
    # sequences per micro-batch
    micro_rows: int
    efficiency: float


def recommend(c: ModelConfig, search: Search) -> JudgedWorkload:
    """The fastest layout that fits and that training supports; if none fits, the one that needs least memory."""
    fitting: list[tuple[float, JudgedWorkload]] = []
    least: JudgedWorkload | None = None
    refused: UserError | None = None
    for start, change in candidates(c, search):
        try:
            work = with_layout(c, start, change, search.site.machine, search.micro_rows)
        except UserError as error:
            refused = refused or error
            continue
        judged = judge(c, work, search.site.machine, search.site.known)
        if least is None or judged.worst.total < least.worst.total:
            least = judged
        if judged.fits:
            fitting.append((estimate(c, work, search), judged))
    if least is None:
        mesh = search.work.layout.mesh()
        raise refused or UserError("--mesh", mesh, "no layout is possible", "Change --on or --rows.")
    if not fitting:
        return least
    # among layouts within one percent of the fastest, the plainest: they come first
    best = min(seconds for seconds, _ in fitting)
    return next(judged for seconds, judged in fitting if seconds <= 1.01 * best)


def candidates(c: ModelConfig, search: Search) -> Iterator[tuple[Workload, dict[str, Any]]]:
    """Steps with changed layouts: all for this number of devices that keep the fixed fields, plain ones first."""
    start, devices, fixed = search.work, search.site.devices, search.fixed
    cp = start.layout.cp  # as given, or 1
    slots = c.num_hidden_layers + c.num_nextn_predict_layers
    powers = [2**n for n in range(12)]
    pps = [start.layout.pp] if "pp" in fixed else [p for p in powers if devices % (p * cp) == 0 and p <= slots]
    eps = [p for p in powers if c.n_routed_experts and c.n_routed_experts % p == 0] or [1]
    eps = [start.layout.ep] if "ep" in fixed else eps
    recomputes: Sequence[Recompute] = ("none", "attention", "block")
    if start.compiled:
        recomputes = ("none", "block")
    if start.layout.schedule == "dualpipe":  # V3's schedule is for planning only, with V3's recomputation
        recomputes = ("none", "selective", "block")
    shardings: Sequence[Sharding] = ("zero1", "fsdp")
    schedules: Sequence[ScheduleName] = ("1f1b", "zb1p", "interleaved", "zbv", "dualpipev")
    recomputes = (start.recompute,) if "recompute" in fixed else recomputes
    shardings = (start.layout.sharding,) if "sharding" in fixed else shardings
    schedules = (start.layout.schedule,) if "schedule" in fixed else schedules
    for pp, ep, recompute, sharding, schedule in itertools.product(pps, eps, recomputes, shardings, schedules):
        dp = devices // (pp * cp)
        if not dp or (dp * cp) % ep or (pp == 1 and schedule != schedules[0]):
            continue
        if sharding == "fsdp" and (pp > 1 or dp * cp == 1) and "sharding" not in fixed:
            continue
        change = {"pp": pp, "dp": dp, "ep": ep, "sharding": sharding, "schedule": schedule}
        yield dataclasses.replace(start, recompute=recompute), change


def with_layout(c: ModelConfig, work: Workload, change: dict[str, Any], machine: Machine, micro_rows: int) -> Workload:
    """A step with another mesh and what follows from it: nodes, micro-batches, the dtype of gathered weights.

    UserError if it is impossible.
    """
    sizes = dataclasses.replace(work.layout, micro_batches=1, nodes=1, gather="fp32", **change)
    at_once = sizes.dp * micro_rows
    if work.rows % at_once:
        problem = f"does not divide among dp = {sizes.dp} ranks of {micro_rows} at a time"
        raise UserError("rows", work.rows, problem, f"Use a multiple of {at_once}.")
    layout = dataclasses.replace(
        sizes,
        micro_batches=work.rows // at_once,
        nodes=max(1, sizes.ep // traffic.per_node(machine)),
        gather="bf16" if sizes.sharding == "fsdp" and work.precision != "fp32" else "fp32",
    )
    found = dataclasses.replace(work, layout=layout)
    found.check(c)
    return found


def estimate(c: ModelConfig, work: Workload, search: Search) -> float:
    """Seconds of a step without simulation: V3's bubble formula, with the slowest stage for all."""
    layout, machine, known = work.layout, search.site.machine, search.site.known
    sent = traffic.of(c, work, machine)
    every = [cost.stage_flops(c, stage, work, known["imbalance"].value) for stage in split_layers(c, layout.stages)]
    per_flop = work.micro_tokens / (machine.peak(work.precision) * search.efficiency)
    d, compute = cost.durations_of(every, per_flop, work, sent, known)
    pair = d.f + d.b if d.both is None else d.both
    scales = [[d.scale[stage] for stage in layout.stages_of(rank)] for rank in range(layout.pp)]
    slowest = max(sum(each) / len(each) for each in scales)
    seconds = slowest * work.passes * pair + layout.pipeline.bubble(layout.stages, d.f, d.b, d.w, pair)
    return seconds + max(sent.exchange_seconds - (compute * work.passes if layout.sharding == "fsdp" else 0.0), 0.0)
