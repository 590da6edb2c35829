"""Runs a schedule's table with given durations: when everything happens, what is idle, and whether it can run at all.

No torch here.
"""

from dataclasses import dataclass

from finback.parallel.pipeline_tables import Op, Slot, Table, operations


@dataclass(frozen=True)
class Durations:
    """Seconds (or any unit) of one stage's operations on one micro-batch."""

    # forward
    f: float = 1.0
    # whole backward
    b: float = 2.0
    # the weight part of it
    w: float = 1.0
    # F overlapped with B; None: nothing gained, f + b
    both: float | None = None
    # from one rank to the next
    send: float = 0.0
    # of each stage's operations, where stages are of unequal size
    scale: tuple[float, ...] = ()

    def of(self, slot: Slot) -> float:
        """How long a slot takes."""
        taken = 0.0
        for op in slot:
            alone = {"F": self.f, "B": self.b, "I": self.b - self.w, "W": self.w}[op.kind]
            taken += alone * self.scale[op.stage] if self.scale else alone
        if len(slot) == 2 and self.both is not None:
            return taken * self.both / (self.f + self.b)
        return taken


@dataclass(frozen=True)
class Timeline:
    """When each rank does each slot: (start, end, slot), in order."""

    ranks: tuple[tuple[tuple[float, float, Slot], ...], ...]

    @property
    def makespan(self) -> float:
        """From the first start to the last end."""
        return max(slots[-1][1] for slots in self.ranks if slots)

    def idle(self, rank: int) -> float:
        """Time of the whole in which a rank does nothing."""
        return self.makespan - sum(end - start for start, end, _ in self.ranks[rank])

    @property
    def bubble(self) -> float:
        """Idle time of the rank that has most of it: V3's table 2 exactly, where input and forward pass cost the same."""
        return max(self.idle(rank) for rank in range(len(self.ranks)))


def simulate(table: Table, durations: Durations) -> Timeline:
    """Run every rank's slots in order, each as soon as what it needs is there; ValueError where that never comes."""
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
            raise ValueError(f"deadlock: rank {rank} waits for ever before {slots[len(done[rank])]}")
    return Timeline(tuple(tuple(slots) for slots in done))


def _ready(
    slot: Slot, rank: int, last: int, ends: dict[Op, float], where: dict[tuple[int, int], int], send: float
) -> float | None:
    """When all that a slot needs has come, or None while something has not."""
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
    """What must be over before an operation starts; of each tuple one suffices (a backward may be whole or split)."""
    batch, stage = op.micro_batch, op.stage
    if op.kind == "F":
        return [(Op("F", batch, stage - 1),)] if stage else []
    if op.kind == "W":
        return [(Op("I", batch, stage),)]
    before: list[tuple[Op, ...]] = [(Op("F", batch, stage),)]
    if stage < last:
        before.append((Op("B", batch, stage + 1), Op("I", batch, stage + 1)))
    return before
