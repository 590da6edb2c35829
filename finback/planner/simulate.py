"""Simulates a schedule's table with given durations: timeline, idle time, and deadlocks.

Does not import torch.
"""

from dataclasses import dataclass

from finback.parallel.pipeline_tables import Op, Slot, Table, operations


@dataclass(frozen=True)
class Durations:
    """Seconds (or any unit) of one stage's operations on one micro-batch."""

    # forward
    f: float = 1.0
    # full backward
    b: float = 2.0
    # the weight-gradient part of the backward
    w: float = 1.0
    # overlapped F and B; None: no gain, f + b
    both: float | None = None
    # transfer from one rank to the next
    send: float = 0.0
    # factor of each stage's operations, if stages differ in size
    scale: tuple[float, ...] = ()

    def of(self, slot: Slot) -> float:
        """Duration of a slot."""
        taken = 0.0
        for op in slot:
            alone = {"F": self.f, "B": self.b, "I": self.b - self.w, "W": self.w}[op.kind]
            taken += alone * self.scale[op.stage] if self.scale else alone
        if len(slot) == 2 and self.both is not None:
            return taken * self.both / (self.f + self.b)
        return taken


@dataclass(frozen=True)
class Timeline:
    """Per rank, (start, end, slot) in order."""

    ranks: tuple[tuple[tuple[float, float, Slot], ...], ...]

    @property
    def makespan(self) -> float:
        """Time from the first start to the last end."""
        return max(slots[-1][1] for slots in self.ranks if slots)

    def idle(self, rank: int) -> float:
        """Time in which a rank is idle."""
        return self.makespan - sum(end - start for start, end, _ in self.ranks[rank])

    @property
    def bubble(self) -> float:
        """Largest idle time of any rank: exactly V3's table 2 if input gradients cost as much as forward passes."""
        return max(self.idle(rank) for rank in range(len(self.ranks)))


def simulate(table: Table, durations: Durations) -> Timeline:
    """Runs every rank's slots in order, each as soon as its inputs are ready; ValueError for a deadlock."""
    where = {(op.micro_batch, op.stage): rank for rank, slots in enumerate(table) for op in operations(slots)}
    last = max(op.stage for slots in table for op in operations(slots))
    ends: dict[Op, float] = {}
    done: list[list[tuple[float, float, Slot]]] = [[] for _ in table]
    moved = True
    while moved:
        moved = False
        for rank, slots in enumerate(table):
            while len(done[rank]) < len(slots):
                slot = slots[len(done[rank])]
                ready = _ready(slot, rank, last, ends, where, durations.send)
                if ready is None:
                    break
                start = max(ready, done[rank][-1][1] if done[rank] else 0.0)
                end = start + durations.of(slot)
                done[rank].append((start, end, slot))
                ends.update(dict.fromkeys(slot, end))
                moved = True
    for rank, slots in enumerate(table):
        if len(done[rank]) < len(slots):
            raise ValueError(f"deadlock: rank {rank} waits forever before {slots[len(done[rank])]}")
    return Timeline(tuple(tuple(slots) for slots in done))


def _ready(
    slot: Slot, rank: int, last: int, ends: dict[Op, float], where: dict[tuple[int, int], int], send: float
) -> float | None:
    """The time at which all inputs of a slot are ready, None if some are not."""
    ready = 0.0
    for op in slot:
        for group in needs(op, last):
            for found in group:
                if (end := ends.get(found)) is not None:
                    break
            else:
                return None
            away = where[found.micro_batch, found.stage] != rank
            ready = max(ready, end + send if away else end)
    return ready


def needs(op: Op, last: int) -> list[tuple[Op, ...]]:
    """The operations that must finish before one starts; of each tuple one suffices (a backward may be whole or split)."""
    batch, stage = op.micro_batch, op.stage
    if op.kind == "F":
        return [(Op("F", batch, stage - 1),)] if stage else []
    if op.kind == "W":
        return [(Op("I", batch, stage),)]
    before: list[tuple[Op, ...]] = [(Op("F", batch, stage),)]
    if stage < last:
        before.append((Op("B", batch, stage + 1), Op("I", batch, stage + 1)))
    return before
