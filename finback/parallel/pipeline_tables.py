"""Pipeline schedules as pure tables of instructions: who does what in which order. No torch here.

parallel/pipeline.py runs these tables, and the planner simulates them.

A table is a list with one list of slots per rank. A slot is one operation, or two that are overlapped. An operation is
(op, micro-batch, stage): F forward, B whole backward, I backward for the input alone, W for the weights alone. Stages
count along the micro-batch's own way, so that stage 0 embeds and the last one scores, on whatever rank they lie.

  1F1B       Narayanan 2021: one forward, one backward in turn
  ZB1P       Qi 2024 (ZB-H1): backward split in I and W, W fills what would be idle
  DualPipe   V3 3.2.1: micro-batches enter at both ends, each rank holds two stages
  DualPipeV  DualPipe cut in half: a micro-batch goes down the ranks and up again
"""

from collections.abc import Callable, Iterator
from functools import lru_cache
from typing import Literal, NamedTuple

from finback.config import UserError, did_you_mean

Kind = Literal["F", "B", "I", "W"]
KINDS: tuple[Kind, ...] = ("F", "B", "I", "W")


class Op(NamedTuple):
    """One operation of one micro-batch at one stage."""

    kind: Kind
    micro_batch: int
    stage: int


Slot = tuple[Op, ...]
Table = list[list[Slot]]


def one_f_one_b(ranks: int, micro_batches: int) -> Table:
    """As many forwards first as there are ranks behind, then one backward for each forward."""
    table: Table = []
    for rank in range(ranks):
        ahead = min(ranks - 1 - rank, micro_batches)
        slots: list[Slot] = [(Op("F", m, rank),) for m in range(ahead)]
        for m in range(micro_batches):
            if m + ahead < micro_batches:
                slots.append((Op("F", m + ahead, rank),))
            slots.append((Op("B", m, rank),))
        table.append(slots)
    return table


def zb1p(ranks: int, micro_batches: int) -> Table:
    """1F1B whose backward is split; rank r puts off r weight steps, so that no rank holds more than 1F1B's first."""
    table: Table = []
    for rank in range(ranks):
        ahead = min(ranks - 1 - rank, micro_batches)
        slots: list[Slot] = [(Op("F", m, rank),) for m in range(ahead)]
        late = 0  # the next micro-batch whose W is due
        for m in range(micro_batches):
            if m + ahead < micro_batches:
                slots.append((Op("F", m + ahead, rank),))
            slots.append((Op("I", m, rank),))
            if m - late >= rank:
                slots.append((Op("W", late, rank),))
                late += 1
        slots += [(Op("W", m, rank),) for m in range(late, micro_batches)]
        table.append(slots)
    return table


class _Rank:
    """Writes one rank's slots of DualPipe: two ways (0 its near end's, 1 the other), each with a stage and a counter."""

    def __init__(self, stages: tuple[int, int], micro_batches: tuple[range, range]) -> None:
        self.stages, self.batches = stages, micro_batches
        self.forwards, self.backwards = [0, 0], [0, 0]
        self.waiting: list[Op] = []  # weight steps put off
        self.slots: list[Slot] = []

    def _next(self, counts: list[int], kind: Kind, way: int) -> Op:
        op = Op(kind, self.batches[way][counts[way]], self.stages[way])
        counts[way] += 1
        return op

    def forward(self, way: int) -> None:
        """F."""
        self.slots.append((self._next(self.forwards, "F", way),))

    def backward(self, way: int, split: bool) -> None:
        """B, or I with its W put off."""
        op = self._next(self.backwards, "I" if split else "B", way)
        self.slots.append((op,))
        if split:
            self.waiting.append(op._replace(kind="W"))

    def weight(self) -> None:
        """The W that has waited longest."""
        self.slots.append((self.waiting.pop(0),))

    def both(self, forward: int, backward: int) -> None:
        """F of one way overlapped with B of the other."""
        self.slots.append((self._next(self.forwards, "F", forward), self._next(self.backwards, "B", backward)))

    def write(self, behind: int, before: int, middle: int, fused_first: bool) -> list[Slot]:
        """The eight phases; `behind` ranks lie between this one and the turning point, `before` counts from the end.

        `fused_first` is False where nothing overlaps yet in the first round of the main phase (the turning point).
        """
        for _ in range(2 * behind):
            self.forward(0)
        for _ in range(before):
            self.forward(0)
            self.forward(1)
        for _ in range(behind):
            self.backward(1, split=True)
            self.weight()
            self.forward(1)
        for round_ in range(middle):
            if round_ == 0 and not fused_first:
                self.forward(0)
                self.backward(1, split=False)
            else:
                self.both(0, 1)
            self.both(1, 0)
        for _ in range(behind):
            self.backward(1, split=False)
            self.both(1, 0)
        for number in range(2 * before):  # the second half of these puts its weight steps off
            self.backward(1 - number % 2, split=number >= before)
        for _ in range(behind):
            self.weight()
            self.backward(0, split=True)
        while self.waiting:
            self.weight()
        return self.slots


def dualpipe(ranks: int, micro_batches: int) -> Table:
    """Half of the micro-batches enter at rank 0, half at the last; rank r holds stage r of the one and of the other way."""
    half, table = micro_batches // 2, []
    ways = (range(half), range(half, micro_batches))
    for rank in range(ranks):
        near = min(rank, ranks - 1 - rank)
        second = rank >= ranks // 2
        stages = (ranks - 1 - rank, rank) if second else (rank, ranks - 1 - rank)
        writer = _Rank(stages, (ways[1], ways[0]) if second else ways)
        behind = ranks // 2 - 1 - near
        table.append(writer.write(behind, near + 1, half - ranks + near + 1, behind > 0))
    return table


def dualpipe_v(ranks: int, micro_batches: int) -> Table:
    """Twice as many stages as ranks: rank r holds stage r on the way down and stage 2·ranks - 1 - r on the way up."""
    table = []
    for rank in range(ranks):
        every = range(micro_batches)
        writer = _Rank((rank, 2 * ranks - 1 - rank), (every, every))
        behind = ranks - 1 - rank
        table.append(writer.write(behind, rank + 1, micro_batches - 2 * ranks + rank + 1, behind > 0))
    return table


class Schedule(NamedTuple):
    """A schedule's name, its table maker, and what it asks of a rank."""

    title: str
    write: Callable[[int, int], Table]
    copies: int  # stages whose weights a rank holds
    split: bool  # whether W runs apart from I
    overlaps: bool  # whether F and B of two micro-batches hide each other's communication

    def table(self, ranks: int, micro_batches: int) -> Table:
        """Every rank's slots; UserError where the schedule cannot run so."""
        self.check(ranks, micro_batches)
        return self.write(ranks, micro_batches)

    def check(self, ranks: int, micro_batches: int) -> None:
        """UserError unless so many micro-batches can go through so many ranks."""
        if self.title == "DualPipe":  # it feeds both ends
            for field, value in (("--mesh pp", ranks), ("micro-batches", micro_batches)):
                if value % 2:
                    raise UserError(field, value, "DualPipe needs an even number", "Use an even one, or zb1p.")
        least = 2 * ranks if self.overlaps else 1
        if micro_batches < least:
            raise UserError(
                "micro-batches",
                micro_batches,
                f"{self.title} on {ranks} ranks needs at least {least} per step",
                "Raise --rows, or use fewer pipeline ranks or 1f1b.",
            )

    def stages(self, ranks: int) -> int:
        """Stages a micro-batch passes."""
        return 2 * ranks if self.title == "DualPipeV" else ranks

    def bubble(self, stages: int, f: float, b: float, w: float, both: float) -> float:
        """Idle time per step by V3's table 2: f forward, b whole backward, w weight part, both F and B overlapped."""
        if self.overlaps:
            return (stages / 2 - 1) * (both + b - 3 * w)
        return (stages - 1) * (f + b - 2 * w if self.split else f + b)


SCHEDULES = {
    "1f1b": Schedule("1F1B", one_f_one_b, 1, False, False),
    "zb1p": Schedule("ZB1P", zb1p, 1, True, False),
    "dualpipe": Schedule("DualPipe", dualpipe, 2, True, True),
    "dualpipev": Schedule("DualPipeV", dualpipe_v, 2, True, True),
}


def find(name: str) -> Schedule:
    """A schedule by name; UserError with the nearest one otherwise."""
    if name.lower() not in SCHEDULES:
        raise UserError("--schedule", name, "unknown schedule", did_you_mean(name.lower(), SCHEDULES))
    return SCHEDULES[name.lower()]


def operations(slots: list[Slot]) -> Iterator[Op]:
    """The operations of one rank in order."""
    for slot in slots:
        yield from slot


@lru_cache(maxsize=256)
def in_flight(name: str, ranks: int, micro_batches: int) -> tuple[tuple[tuple[tuple[int, int], ...], ...], ...]:
    """For each rank the moments at which it holds most: activations per stage, as (stage, how many) pairs.

    An activation is held from F until B, or until I and W are done. A moment at which no stage has more of them than at
    another is left out.
    """
    table = find(name).table(ranks, min(micro_batches, 4 * ranks + micro_batches % 2))  # more changes nothing
    return tuple(_moments(slots) for slots in table)


def _moments(slots: list[Slot]) -> tuple[tuple[tuple[int, int], ...], ...]:
    held = dict.fromkeys((op.stage for op in operations(slots)), 0)
    seen = set()
    for op in operations(slots):  # the forward of an overlapped pair comes first: for a while both are alive
        if op.kind == "F":
            held[op.stage] += 1
            seen.add(tuple(held.items()))
        elif op.kind in "BW":
            held[op.stage] -= 1
    return tuple(
        m for m in seen if not any(o != m and all(a[1] <= b[1] for a, b in zip(m, o, strict=True)) for o in seen)
    )
