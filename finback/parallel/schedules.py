"""Pipeline schedules by name: the placement of stages, requirements on micro-batches, idle time. Does not import torch."""

from collections.abc import Callable
from functools import lru_cache
from typing import Literal, NamedTuple

from finback.config import UserError, did_you_mean
from finback.parallel import pipeline_tables as tables
from finback.parallel.pipeline_tables import Slot, Table, operations


class Schedule(NamedTuple):
    """A schedule's name, the function that writes its table, and its properties."""

    title: str
    write: Callable[[int, int], Table]
    # stages per rank: one; two, around the ranks; two, down the ranks and up again; the same stages in both directions
    placement: Literal["line", "loop", "fold", "both ways"]
    # whether W runs separately from I
    splits: bool
    # whether F and B of two micro-batches hide each other's communication
    overlaps: bool
    # the schedule on the same stages for steps with too few micro-batches; DualPipe's uses one direction
    small: "ScheduleName"

    def table(self, ranks: int, micro_batches: int) -> Table:
        """Every rank's slots; UserError if the schedule cannot run with these numbers."""
        self.check(ranks, micro_batches)
        return self.write(ranks, micro_batches)

    def check(self, ranks: int, micro_batches: int) -> None:
        """Raises UserError unless the schedule can run these micro-batches on these ranks."""
        refusal = self.refusal(ranks, micro_batches)
        if refusal is not None:
            raise refusal

    def refusal(self, ranks: int, micro_batches: int) -> UserError | None:
        """The error that `check` raises; None if the schedule can run."""
        if self.placement == "both ways":
            for field, value in (("layout.pp", ranks), ("layout.micro_batches", micro_batches)):
                if value % 2:
                    return UserError(field, value, "DualPipe needs an even number", "Use an even one, or zb1p.")
        least = 2 * ranks if self.overlaps else 1
        rounds = max(1, micro_batches // ranks) if self.placement == "loop" else 1
        problem, remedy = "", ""
        if micro_batches < least:
            problem = f"{self.title} on {ranks} ranks needs at least {least} per step"
            remedy = "Use more rows, fewer pipeline ranks, or 1f1b."
        elif micro_batches % rounds:
            problem, remedy = f"interleaved runs them in {rounds} equal rounds", f"Use a multiple of {ranks}."
        return UserError("layout.micro_batches", micro_batches, problem, remedy) if problem else None

    def stages(self, ranks: int) -> int:
        """The number of stages that a micro-batch passes."""
        return 2 * ranks if self.placement in ("loop", "fold") else ranks

    def stages_of(self, rank: int, ranks: int) -> tuple[int, ...]:
        """The stages whose weights a rank holds."""
        stages = self.stages(ranks)
        second = {"loop": rank + ranks, "fold": stages - 1 - rank, "both ways": stages - 1 - rank}
        return (rank,) if self.placement == "line" else (rank, second[self.placement])

    @property
    def copies(self) -> int:
        """The number of ranks of a pipeline that hold the same stage."""
        return 2 if self.placement == "both ways" else 1

    def bubble(self, stages: int, f: float, b: float, w: float, both: float) -> float:
        """Idle time per step by V3's table 2, from the durations f of F, b of B, w of W, and both of F and B overlapped.

        Two schedules are not in the table: interleaved 1F1B idles like 1F1B with stages of half the size; ZB-V idles until
        the first micro-batch has come down, longer if w is too short to fill the waits for I.
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
    """A schedule by name; UserError, which suggests the nearest name, if there is none."""
    if name.lower() not in SCHEDULES:
        raise UserError("--schedule", name, "unknown schedule", did_you_mean(name.lower(), SCHEDULES))
    return SCHEDULES[name.lower()]


@lru_cache(maxsize=256)
def in_flight(name: str, ranks: int, micro_batches: int) -> tuple[tuple[tuple[tuple[int, int], ...], ...], ...]:
    """For each rank, the moments at which it holds most activations, each as (stage, number of activations) pairs.

    An activation is alive from F until B, or until I and W are done. A moment is left out if at another one every stage
    holds at least as many.
    """
    schedule = find(name)
    each = micro_batches // max(1, micro_batches // ranks) if schedule.placement == "loop" else ranks
    enough = 4 * each + (0 if schedule.placement == "loop" else micro_batches % 2)
    table = schedule.table(ranks, min(micro_batches, enough))  # the maximum is reached by then
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
