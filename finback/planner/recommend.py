"""Which layout to use: all that could be, those that fit, the fastest of them. No torch here."""

import dataclasses
import itertools
from collections.abc import Iterator
from dataclasses import dataclass

from finback.config import UserError
from finback.model.config import ModelConfig
from finback.parallel.pipeline_tables import SCHEDULES
from finback.planner import cost, memory, traffic
from finback.planner.hardware import Fact, Machine
from finback.planner.layout import Layout, check, parts
from finback.planner.memory import Memory


@dataclass(frozen=True)
class Choice:
    """A layout, its memory on each pipeline rank, and whether it fits with the margin asked for."""

    layout: Layout
    ranks: tuple[Memory, ...]
    fits: bool

    @property
    def worst(self) -> Memory:
        """The fullest rank's."""
        return max(self.ranks, key=lambda rank: rank.total)


def judge(c: ModelConfig, layout: Layout, machine: Machine, known: dict[str, Fact]) -> Choice:
    """Whether a layout fits on the machine."""
    ranks = tuple(memory.ranks(c, layout, known))
    room = machine.memory.value * (1 - known["margin"].value)
    return Choice(layout, ranks, max(rank.total for rank in ranks) <= room)


def recommend(
    c: ModelConfig,
    start: Layout,
    devices: int,
    fixed: set[str],
    machine: Machine,
    known: dict[str, Fact],
    efficiency: float,
) -> Choice:
    """The fastest layout that fits, with the `fixed` fields as in `start`; where none fits the one that needs least."""
    fitting: list[tuple[float, Choice]] = []
    least: Choice | None = None
    refused: UserError | None = None
    for layout in candidates(c, start, devices, fixed):
        try:
            check(c, layout)
        except UserError as error:
            refused = refused or error
            continue
        choice = judge(c, layout, machine, known)
        if least is None or choice.worst.total < least.worst.total:
            least = choice
        if choice.fits:
            fitting.append((estimate(c, layout, machine, known, efficiency), choice))
    if least is None:
        raise refused or UserError("--mesh", start.mesh(), "no layout is possible", "Change --on or --rows.")
    if not fitting:
        return least
    # of those that are as fast within a hundredth the plainest: they come first
    best = min(seconds for seconds, _ in fitting)
    return next(choice for seconds, choice in fitting if seconds <= 1.01 * best)


def candidates(c: ModelConfig, start: Layout, devices: int, fixed: set[str]) -> Iterator[Layout]:
    """Every layout of so many devices that leaves the fixed fields alone, plain ones first."""
    slots = c.num_hidden_layers + c.num_nextn_predict_layers
    powers = [2**n for n in range(12)]
    pps = [start.pp] if "pp" in fixed else [p for p in powers if devices % p == 0 and p <= slots]
    eps = [p for p in powers if c.n_routed_experts and c.n_routed_experts % p == 0] or [1]
    eps = [start.ep] if "ep" in fixed else eps
    recomputes = (start.recompute,) if "recompute" in fixed else ("none", "selective", "full")
    zeros = (start.zero,) if "zero" in fixed else (1, 3)
    schedules = (start.schedule,) if "schedule" in fixed else tuple(SCHEDULES)
    for pp, ep, recompute, zero, schedule in itertools.product(pps, eps, recomputes, zeros, schedules):
        dp = devices // pp
        if dp % ep or (pp == 1 and schedule != schedules[0]) or (zero == 3 and pp > 1 and "zero" not in fixed):
            continue
        if dp == 1 and zero == 3 and "zero" not in fixed:
            continue
        yield dataclasses.replace(start, pp=pp, dp=dp, ep=ep, recompute=recompute, zero=zero, schedule=schedule)


def estimate(c: ModelConfig, layout: Layout, machine: Machine, known: dict[str, Fact], efficiency: float) -> float:
    """Seconds of a step without simulating it: V3's bubble formula, and the slowest stage for all."""
    sent = traffic.of(c, layout, machine)
    every = [cost.stage_flops(c, part, layout, known["imbalance"].value) for part in parts(c, layout.stages)]
    per_flop = layout.micro_rows * layout.length / (machine.peak(layout.precision) * efficiency)
    d, compute = cost.durations_of(every, per_flop, layout, sent, known)
    pair = d.f + d.b if d.both is None else d.both
    held = [[d.scale[stage] for stage in layout.held(rank)] for rank in range(layout.pp)]
    slowest = max(sum(scales) / len(scales) for scales in held)
    seconds = slowest * layout.operations * pair + layout.plan.bubble(layout.stages, d.f, d.b, d.w, pair)
    return seconds + max(sent.exchange_seconds - (compute * layout.operations if layout.zero == 3 else 0.0), 0.0)
