"""Pipeline schedules by name: where their stages lie, what they ask of micro-batches, what they leave idle. Does not import torch."""

from collections.abc import Callable
from functools import lru_cache
from typing import Literal, NamedTuple

from finback.config import UserError, did_you_mean
from finback.parallel import pipeline_tables as tables
from finback.parallel.pipeline_tables import Slot, Table, operations


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
    # what steps with too few micro-batches for it run on the same stages; DualPipe's, one way
    small: "ScheduleName"

    def table(self, ranks: int, micro_batches: int) -> Table:
        """Every rank's slots; UserError where the schedule cannot run so."""
        self.check(ranks, micro_batches)
        return self.write(ranks, micro_batches)

    def check(self, ranks: int, micro_batches: int) -> None:
        """UserError unless so many micro-batches can go through so many ranks."""
        refusal = self.refusal(ranks, micro_batches)
        if refusal is not None:
            raise refusal

    def refusal(self, ranks: int, micro_batches: int) -> UserError | None:
        """What `check` raises, None where the schedule can run so."""
        if self.placement == "both ways":
            for field, value in (("layout.pp", ranks), ("layout.micro_batches", micro_batches)):
                if value % 2:
                    return UserError(field, value, "DualPipe needs an even number", "Use an even one, or zb1p.")
        least = 2 * ranks if self.overlaps else 1
        rounds = max(1, micro_batches // ranks) if self.placement == "loop" else 1
        problem, remedy = "", ""
        if micro_batches < least:
            problem = f"{self.title} on {ranks} ranks needs at least {least} per step"
            remedy = "Raise the rows, or use fewer pipeline ranks or 1f1b."
        elif micro_batches % rounds:
            problem, remedy = f"interleaved runs them in {rounds} equal rounds", f"Use a multiple of {ranks}."
        return UserError("layout.micro_batches", micro_batches, problem, remedy) if problem else None

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

        The table leaves two out: interleaved 1F1B waits as 1F1B does, for stages of half the size, and ZB-V until
        the first micro-batch has come down, longer where w cannot fill the waits for the input's backward.
        """
        if self.overlaps:
            return (stages / 2 - 1) * (both + b - 3 * w)
        hops = stages - 1 if self.placement == "line" else stages / 2 - 1
        if self.placement == "fold":
            return hops * max(b - w, 2 * (b - 2 * w))
        return hops * (f + b - 2 * w if self.splits else f + b)


ScheduleName = Literal["1f1b", "zb1p", "interleaved", "zbv", "dualpipev", "dualpipe"]
SCHEDULES: dict[str, Schedule] = {
    "1f1b": Schedule("1F1B", tables.one_f_one_b, "line", False, False, "1f1b"),
    "zb1p": Schedule("ZB1P", tables.zb1p, "line", True, False, "zb1p"),
    "interleaved": Schedule("Interleaved 1F1B", tables.interleaved, "loop", False, False, "interleaved"),
    "zbv": Schedule("ZB-V", tables.zb_v, "fold", True, False, "zbv"),
    "dualpipev": Schedule("DualPipeV", tables.dualpipe_v, "fold", True, True, "zbv"),
    "dualpipe": Schedule("DualPipe", tables.dualpipe, "both ways", True, True, "zb1p"),
}


def find(name: str) -> Schedule:
    """A schedule by name; UserError with the nearest one otherwise."""
    if name.lower() not in SCHEDULES:
        raise UserError("--schedule", name, "unknown schedule", did_you_mean(name.lower(), SCHEDULES))
    return SCHEDULES[name.lower()]


@lru_cache(maxsize=256)
def in_flight(name: str, ranks: int, micro_batches: int) -> tuple[tuple[tuple[tuple[int, int], ...], ...], ...]:
    """For each rank the moments at which it holds most: activations per stage, as (stage, how many) pairs.

    An activation is alive from F until B, or until I and W are done. A moment at which no stage has more of them than at
    another is left out.
    """
    schedule = find(name)
    each = micro_batches // max(1, micro_batches // ranks) if schedule.placement == "loop" else ranks
    enough = 4 * each + (0 if schedule.placement == "loop" else micro_batches % 2)
    table = schedule.table(ranks, min(micro_batches, enough))  # more changes nothing
    return tuple(_moments(slots) for slots in table)


def _moments(slots: list[Slot]) -> tuple[tuple[tuple[int, int], ...], ...]:
    alive = dict.fromkeys((op.stage for op in operations(slots)), 0)
    seen = set()
    for op in operations(slots):  # the forward of an overlapped pair comes first: for a while both are alive
        if op.kind == "F":
            alive[op.stage] += 1
            seen.add(tuple(alive.items()))
        elif op.kind in "BW":
            alive[op.stage] -= 1
    return tuple(
        m for m in seen if not any(o != m and all(a[1] <= b[1] for a, b in zip(m, o, strict=True)) for o in seen)
    )
