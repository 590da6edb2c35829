"""Pipeline schedules as pure tables: the operations of each rank in order. Does not import torch.

parallel/pipeline.py runs these tables, and the planner simulates them.

A table has one list of slots per rank. A slot is one operation, or two that overlap. An operation is (kind, micro-batch,
stage): F forward, B whole backward, I backward for the inputs only, W for the weights only. Stages are numbered along a
micro-batch's path, so that stage 0 embeds and the last stage has the head, whatever ranks they are on.

  1F1B         Narayanan 2021: forwards and backwards alternate
  interleaved  1F1B with two stages per rank: a micro-batch passes all ranks twice
  ZB1P         Qi 2024 (ZB-H1): backward is split into I and W, and W fills idle time
  ZB-V         Qi 2024, section 6: ZB1P with two stages per rank; a micro-batch goes down the ranks and up again
  DualPipe     V3 3.2.1: micro-batches enter at both ends, each rank holds two stages
  DualPipeV    one half of DualPipe, with stages placed as in ZB-V
"""

from collections.abc import Iterator
from typing import Literal, NamedTuple

Kind = Literal["F", "B", "I", "W"]
KINDS: tuple[Kind, ...] = ("F", "B", "I", "W")


class Op(NamedTuple):
    """One operation of one micro-batch at one stage."""

    kind: Kind
    micro_batch: int
    stage: int


Slot = tuple[Op, ...]
Table = list[list[Slot]]


def _in_turn(forwards: list[Op], backwards: list[Op], ahead: int, put_off: int | None = None) -> list[Slot]:
    """`ahead` forwards, then forwards and backwards alternate; with split backwards, W comes `put_off` backwards later."""
    slots: list[Slot] = [(op,) for op in forwards[:ahead]]
    weights = [] if put_off is None else [op._replace(kind="W") for op in backwards]
    for number, backward in enumerate(backwards):
        slots += [(op,) for op in forwards[ahead + number : ahead + number + 1]]
        slots.append((backward,))
        if put_off is not None and number >= put_off:
            slots.append((weights.pop(0),))
    return slots + [(op,) for op in weights]


def _all(kind: Kind, micro_batches: int, stage: int) -> list[Op]:
    return [Op(kind, batch, stage) for batch in range(micro_batches)]


def one_f_one_b(ranks: int, micro_batches: int) -> Table:
    """Each rank starts with as many forwards as there are ranks after it; then forwards and backwards alternate."""
    return [
        _in_turn(_all("F", micro_batches, rank), _all("B", micro_batches, rank), ranks - 1 - rank)
        for rank in range(ranks)
    ]


def zb1p(ranks: int, micro_batches: int) -> Table:
    """1F1B with split backwards; rank r delays W by r backwards, so that no rank has more in flight than rank 0 of 1F1B."""
    return [
        _in_turn(_all("F", micro_batches, rank), _all("I", micro_batches, rank), ranks - 1 - rank, rank)
        for rank in range(ranks)
    ]


def interleaved(ranks: int, micro_batches: int) -> Table:
    """1F1B with stages r and ranks + r on rank r; micro-batches pass the two in rounds, as in torch."""
    each = micro_batches // max(1, micro_batches // ranks)
    # (micro-batch, 0 for the first of a rank's two stages or 1)
    steps = [(step // (2 * each) * each + step % each, step // each % 2) for step in range(2 * micro_batches)]
    table: Table = []
    for rank in range(ranks):
        forwards = [Op("F", batch, rank + second * ranks) for batch, second in steps]
        backwards = [Op("B", batch, rank + (1 - second) * ranks) for batch, second in steps]
        table.append(_in_turn(forwards, backwards, each + 2 * (ranks - 1 - rank)))
    return table


class _Rank:
    """Writes one rank's slots of DualPipe and ZB-V. Micro-batches pass it in two directions: 0 from the nearer end, 1 from the other."""

    def __init__(self, stages: tuple[int, int], micro_batches: tuple[range, range]) -> None:
        self.stages, self.batches = stages, micro_batches
        self.forwards, self.backwards = [0, 0], [0, 0]
        self.waiting: list[Op] = []  # delayed W operations
        self.slots: list[Slot] = []

    def _next(self, counts: list[int], kind: Kind, way: int) -> Op:
        op = Op(kind, self.batches[way][counts[way]], self.stages[way])
        counts[way] += 1
        return op

    def forward(self, way: int) -> None:
        """Adds F."""
        self.slots.append((self._next(self.forwards, "F", way),))

    def backward(self, way: int, split: bool) -> None:
        """Adds B, or I and delays its W."""
        op = self._next(self.backwards, "I" if split else "B", way)
        self.slots.append((op,))
        if split:
            self.waiting.append(op._replace(kind="W"))

    def weight(self, way: int | None = None) -> None:
        """Adds the W that has waited longest, of one way or of any."""
        op = next(op for op in self.waiting if way is None or op.stage == self.stages[way])
        self.waiting.remove(op)
        self.slots.append((op,))

    def pass_and_return(self, way: int) -> None:
        """Adds F, I and W."""
        self.forward(way)
        self.backward(way, split=True)
        self.weight()

    def both(self, forward: int, backward: int) -> None:
        """Adds F of one way, overlapped with B of the other."""
        self.slots.append((self._next(self.forwards, "F", forward), self._next(self.backwards, "B", backward)))

    def write(self, behind: int, before: int, middle: int, fused_first: bool) -> list[Slot]:
        """The eight phases. `behind` ranks are between this one and the turning point; `before` is the distance from the end.

        `fused_first` is False at the turning point, where the first round of the main phase has nothing to overlap.
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
        for number in range(2 * before):  # the second half of these delays W
            self.backward(1 - number % 2, split=number >= before)
        for _ in range(behind):
            self.weight()
            self.backward(0, split=True)
        while self.waiting:
            self.weight()
        return self.slots


def dualpipe(ranks: int, micro_batches: int) -> Table:
    """Half of the micro-batches enter at rank 0, half at the last rank; rank r holds stages r and ranks - 1 - r."""
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
    """ZB-V as in torch, for F, I and W of equal duration; without idle time from 2·ranks - 1 micro-batches on."""
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


def operations(slots: list[Slot]) -> Iterator[Op]:
    """The operations of one rank in order."""
    for slot in slots:
        yield from slot
