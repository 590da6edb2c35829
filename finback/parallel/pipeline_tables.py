"""Pipeline schedules as pure tables of instructions: who does what in which order. No torch here.

parallel/pipeline.py runs these tables, and the planner simulates them.

A table is a list with one list of slots per rank. A slot is one operation, or two that are overlapped. An operation is
(op, micro-batch, stage): F forward, B whole backward, I backward for the input alone, W for the weights alone. Stages
count along the micro-batch's own way, so that stage 0 embeds and the last one has the head, on whatever rank they lie.

  1F1B         Narayanan 2021: one forward, one backward in turn
  interleaved  the same with two stages on each rank: a micro-batch goes around the ranks twice
  ZB1P         Qi 2024 (ZB-H1): backward split in I and W, W fills what would be idle
  ZB-V         Qi 2024, section 6: the same, a micro-batch goes down the ranks and up again
  DualPipe     V3 3.2.1: micro-batches enter at both ends, each rank holds two stages
  DualPipeV    DualPipe cut in half, as ZB-V is laid out
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


def interleaved(ranks: int, micro_batches: int) -> Table:
    """1F1B with stages r and ranks + r on rank r; micro-batches pass each of the two in rounds, as torch has it."""
    rounds = max(1, micro_batches // ranks)
    each, total = micro_batches // rounds, 2 * micro_batches
    table: Table = []
    for rank in range(ranks):
        ahead = min(each + 2 * (ranks - 1 - rank), total)
        passes = [
            (
                step // (2 * each) * each + step % each,
                rank + step // each % 2 * ranks,
                rank + (1 - step // each % 2) * ranks,
            )
            for step in range(total)
        ]
        slots: list[Slot] = [(Op("F", batch, stage),) for batch, stage, _ in passes[:ahead]]
        for step, (batch, _, stage) in enumerate(passes):
            if step + ahead < total:
                slots.append((Op("F", *passes[step + ahead][:2]),))
            slots.append((Op("B", batch, stage),))
        table.append(slots)
    return table


class _Rank:
    """Writes one rank's slots of DualPipe and ZB-V: two ways (0 its near end's, 1 the other), each with a stage and a counter."""

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

    def weight(self, way: int | None = None) -> None:
        """The W that has waited longest, of one way or of both."""
        op = next(op for op in self.waiting if way is None or op.stage == self.stages[way])
        self.waiting.remove(op)
        self.slots.append((op,))

    def pass_and_return(self, way: int) -> None:
        """F, I and W one after the other."""
        self.forward(way)
        self.backward(way, split=True)
        self.weight()

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


def zb_v(ranks: int, micro_batches: int) -> Table:
    """ZB-V as torch has it, for F, I and W of equal length; nothing waits from 2·ranks - 1 micro-batches on."""
    every = range(max(2 * ranks - 1, micro_batches))
    table: Table = []
    for rank in range(ranks):
        writer = _Rank((rank, 2 * ranks - 1 - rank), (every, every))
        for _ in range(2 * (ranks - rank) - 1):
            writer.forward(0)
        for _ in range(rank):
            writer.forward(1)
            writer.forward(0)
        for _ in range(ranks - rank):
            writer.pass_and_return(1)
        while writer.forwards[1] < len(every):
            if writer.forwards[0] < len(every):
                writer.forward(0)
            writer.backward(0, split=True)
            writer.weight()
            writer.pass_and_return(1)
        for _ in range(rank):
            writer.backward(0, split=True)
            writer.backward(1, split=True)
        for _ in range(ranks - rank):
            writer.backward(0, split=True)
            writer.weight(0)
        writer.waiting.sort(key=lambda op: -op.stage)
        while writer.waiting:
            writer.weight()
        table.append([slot for slot in writer.slots if slot[0].micro_batch < micro_batches])
    return table


class Schedule(NamedTuple):
    """A schedule's name, its table maker, and what it asks of a rank."""

    title: str
    write: Callable[[int, int], Table]
    # where stages lie: one a rank; two, around the ranks; two, down and up again; or both ways through the same stages
    placement: Literal["line", "loop", "fold", "both ways"]
    # whether W runs apart from I
    splits: bool
    # whether F and B of two micro-batches hide each other's communication
    overlaps: bool

    def table(self, ranks: int, micro_batches: int) -> Table:
        """Every rank's slots; UserError where the schedule cannot run so."""
        self.check(ranks, micro_batches)
        return self.write(ranks, micro_batches)

    def check(self, ranks: int, micro_batches: int) -> None:
        """UserError unless so many micro-batches can go through so many ranks."""
        if self.placement == "both ways":
            for field, value in (("layout.pp", ranks), ("layout.micro_batches", micro_batches)):
                if value % 2:
                    raise UserError(field, value, "DualPipe needs an even number", "Use an even one, or zb1p.")
        least = 2 * ranks if self.overlaps else 1
        rounds = max(1, micro_batches // ranks) if self.placement == "loop" else 1
        problem, remedy = "", ""
        if micro_batches < least:
            problem = f"{self.title} on {ranks} ranks needs at least {least} per step"
            remedy = "Raise the rows, or use fewer pipeline ranks or 1f1b."
        elif micro_batches % rounds:
            problem, remedy = f"interleaved runs them in {rounds} equal rounds", f"Use a multiple of {ranks}."
        if problem:
            raise UserError("layout.micro_batches", micro_batches, problem, remedy)

    def stages(self, ranks: int) -> int:
        """Stages a micro-batch passes."""
        return 2 * ranks if self.placement in ("loop", "fold") else ranks

    def stages_of(self, rank: int, ranks: int) -> tuple[int, ...]:
        """The stages whose weights a rank holds."""
        stages = self.stages(ranks)
        second = {"loop": rank + ranks, "fold": stages - 1 - rank, "both ways": stages - 1 - rank}
        return (rank,) if self.placement == "line" else (rank, second[self.placement])

    @property
    def copies(self) -> int:
        """Ranks of a pipeline that hold the same stage."""
        return 2 if self.placement == "both ways" else 1

    def bubble(self, stages: int, f: float, b: float, w: float, both: float) -> float:
        """Idle time per step by V3's table 2: f forward, b whole backward, w weight part, both F and B overlapped.

        The table leaves two out: interleaved 1F1B waits as 1F1B does, for stages of half the size, and ZB-V only until
        the first micro-batch has come down.
        """
        if self.overlaps:
            return (stages / 2 - 1) * (both + b - 3 * w)
        hops = stages - 1 if self.placement == "line" else stages / 2 - 1
        if self.placement == "fold":
            return hops * (b - w)
        return hops * (f + b - 2 * w if self.splits else f + b)


ScheduleName = Literal["1f1b", "zb1p", "interleaved", "zbv", "dualpipev", "dualpipe"]
SCHEDULES: dict[str, Schedule] = {
    "1f1b": Schedule("1F1B", one_f_one_b, "line", False, False),
    "zb1p": Schedule("ZB1P", zb1p, "line", True, False),
    "interleaved": Schedule("Interleaved 1F1B", interleaved, "loop", False, False),
    "zbv": Schedule("ZB-V", zb_v, "fold", True, False),
    "dualpipev": Schedule("DualPipeV", dualpipe_v, "fold", True, True),
    "dualpipe": Schedule("DualPipe", dualpipe, "both ways", True, True),
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
    schedule = find(name)
    each = micro_batches // max(1, micro_batches // ranks) if schedule.placement == "loop" else ranks
    enough = 4 * each + (0 if schedule.placement == "loop" else micro_batches % 2)
    table = schedule.table(ranks, min(micro_batches, enough))  # more changes nothing
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
