"""Pipeline schedules: V3's formulas for bubbles and memory, hand-worked orders, and tables that cannot run."""

import itertools
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from torch.distributed.pipelining.schedules import ScheduleDualPipeV, ScheduleInterleaved1F1B, ScheduleZBVZeroBubble

from finback.config import UserError
from finback.parallel.pipeline import action
from finback.parallel.pipeline_tables import KINDS, Op, Table, operations
from finback.parallel.schedules import SCHEDULES, find, in_flight
from finback.planner.simulate import Durations, Timeline, simulate

NAMES = sorted(SCHEDULES)


def ranks_of(name: str, stages: int) -> int:
    return stages // find(name).stages(1)


def check(table: Table, stages: int, micro_batches: int) -> None:
    """Raises ValueError unless every micro-batch passes every stage once each way on one rank and the table can run."""
    seen: dict[Op, int] = {}
    for rank, slots in enumerate(table):
        for op in operations(slots):
            if op in seen:
                raise ValueError(f"{op} is done twice, on ranks {seen[op]} and {rank}")
            seen[op] = rank
    for batch in range(micro_batches):
        for stage in range(stages):
            kinds = {k for k in KINDS if Op(k, batch, stage) in seen}
            if kinds not in ({"F", "B"}, {"F", "I", "W"}):
                raise ValueError(f"micro-batch {batch} at stage {stage} has {sorted(kinds)}, not F and B or F, I, W")
            if len({seen[Op(k, batch, stage)] for k in kinds}) > 1:
                raise ValueError(f"micro-batch {batch} at stage {stage} is spread over ranks")
    if len(seen) != sum(len(list(operations(slots))) for slots in table) or any(
        op.micro_batch >= micro_batches or op.stage >= stages for op in seen
    ):
        raise ValueError("the table holds operations of micro-batches or stages that do not exist")
    simulate(table, Durations())


@settings(max_examples=60)
@given(
    st.sampled_from(NAMES),
    st.sampled_from([2, 4, 6, 8, 12, 16]),
    st.integers(0, 12),
    st.floats(0.5, 2.0),
    st.floats(0.2, 1.0),
    st.floats(0.0, 1.0),
)
def test_bubbles_are_those_of_v3s_table(
    name: str, stages: int, more: int, f: float, share: float, hidden: float
) -> None:
    # the table's formulas assume that the input's backward pass costs as much as a forward pass
    w = share * f
    b = f + w
    both = max(f, b) + hidden * min(f, b)
    ranks, schedule = ranks_of(name, stages), find(name)
    timeline = simulate(
        schedule.table(ranks, 2 * stages + (ranks if name == "interleaved" else 2) * more), Durations(f, b, w, both)
    )
    formula = {
        "1f1b": (stages - 1) * (f + b),
        "interleaved": (stages / 2 - 1) * (f + b),
        "zbv": (stages / 2 - 1) * max(f, 2 * (f - w)),
        "zb1p": (stages - 1) * (f + b - 2 * w),
        "dualpipe": (stages / 2 - 1) * (both + b - 3 * w),
        "dualpipev": (stages / 2 - 1) * (both + b - 3 * w),
    }[name]
    assert timeline.bubble == pytest.approx(formula, abs=1e-6)
    assert schedule.bubble(stages, f, b, w, both) == pytest.approx(formula)


@pytest.mark.parametrize("name", NAMES)
@pytest.mark.parametrize("stages", [2, 4, 8, 16])
def test_activations_in_flight_are_those_of_v3s_table(name: str, stages: int) -> None:
    moments = in_flight(name, ranks_of(name, stages), 3 * stages)
    most = [max(sum(count for _, count in moment) for moment in rank) for rank in moments]
    assert max(most) == {"dualpipe": stages + 1, "dualpipev": stages + 1, "interleaved": 3 * stages // 2 - 1}.get(
        name, stages
    )
    if name == "1f1b":
        assert most == list(range(stages, 0, -1))  # each rank has one for every stage from its own to the last


@pytest.mark.parametrize("name", NAMES)
def test_more_micro_batches_hold_no_more(name: str) -> None:
    few, many = (in_flight(name, 4, n) for n in (16, 200))
    assert few == many


@pytest.mark.parametrize("name", NAMES)
@pytest.mark.parametrize("ranks", [2, 4, 8])
@pytest.mark.parametrize("micro_batches", [16, 18, 40])
def test_every_table_is_whole_and_can_run(name: str, ranks: int, micro_batches: int) -> None:
    schedule = find(name)
    micro_batches -= micro_batches % ranks if name == "interleaved" else 0
    check(schedule.table(ranks, micro_batches), schedule.stages(ranks), micro_batches)


def words(table: Table) -> list[str]:
    return [" ".join("&".join(f"{op.kind}{op.micro_batch}" for op in slot) for slot in rank) for rank in table]


def test_tables_by_hand() -> None:
    assert words(SCHEDULES["1f1b"].table(3, 3)) == ["F0 F1 F2 B0 B1 B2", "F0 F1 B0 F2 B1 B2", "F0 B0 F1 B1 F2 B2"]
    assert words(SCHEDULES["zb1p"].table(2, 3)) == ["F0 F1 I0 W0 F2 I1 W1 I2 W2", "F0 I0 F1 I1 W0 F2 I2 W1 W2"]
    # two ranks, four micro-batches, two from each end: no idle time
    assert words(SCHEDULES["dualpipe"].table(2, 4)) == ["F0 F2 F1 B2 F3&B0 B3 I1 W1", "F2 F0 F3 B0 F1&B2 B1 I3 W3"]


def test_two_ranks_on_a_clock() -> None:
    # 1F1B, two ranks, two micro-batches, forward 1, backward 2, sending takes no time
    timeline = simulate(SCHEDULES["1f1b"].table(2, 2), Durations(1, 2, 1))
    times = [[(start, end) for start, end, _ in rank] for rank in timeline.ranks]
    assert times == [[(0, 1), (1, 2), (4, 6), (7, 9)], [(1, 2), (2, 4), (4, 5), (5, 7)]]
    assert timeline.makespan == 9 and [timeline.idle(r) for r in (0, 1)] == [3, 3]


def test_sending_delays_what_comes_from_another_rank() -> None:
    table = SCHEDULES["1f1b"].table(2, 1)
    assert simulate(table, Durations(1, 2, 1)).makespan == 6
    assert simulate(table, Durations(1, 2, 1, send=0.5)).makespan == 7


def test_stages_of_unequal_size() -> None:
    table = SCHEDULES["1f1b"].table(2, 1)
    assert simulate(table, Durations(1, 2, 1, scale=(0.5, 1.5))).makespan == 6
    assert simulate(table, Durations(1, 2, 1, scale=(1.0, 3.0))).makespan == 12


def test_overlap_shortens_the_step() -> None:
    table = SCHEDULES["dualpipe"].table(4, 16)
    apart, together = (simulate(table, Durations(1, 2, 1, both)) for both in (None, 2.2))
    assert together.makespan < apart.makespan


def broken(change: str) -> Table:
    table = SCHEDULES["1f1b"].table(2, 2)
    if change == "missing":
        table[0].pop()
    elif change == "twice":
        table[0].append((Op("F", 0, 0),))
    elif change == "backward first":
        table[1][:2] = table[1][1::-1]
    elif change == "elsewhere":
        table[0].append(table[1].pop())
    elif change == "unknown":
        table[0] += [(Op("F", 9, 0),), (Op("B", 9, 0),)]
    else:  # each rank waits for the other
        table[0][:] = [table[0][i] for i in (0, 2, 1, 3)]
        table[1][:] = [table[1][i] for i in (0, 2, 1, 3)]
    return table


@pytest.mark.parametrize(
    ("change", "said"),
    [
        ("missing", "not F and B"),
        ("twice", "twice"),
        ("backward first", "deadlock"),
        ("elsewhere", "spread"),
        ("unknown", "do not exist"),
        ("circle", "deadlock"),
    ],
)
def test_a_table_that_cannot_be_right_is_refused(change: str, said: str) -> None:
    with pytest.raises(ValueError, match=said):
        check(broken(change), 2, 2)


@pytest.mark.parametrize(
    ("name", "ranks", "micro_batches", "word"),
    [
        ("dualpipe", 3, 12, "even"),
        ("dualpipe", 4, 9, "even"),
        ("dualpipe", 4, 6, "at least 8"),
        ("dualpipev", 4, 7, "at least 8"),
    ],
)
def test_what_dualpipe_cannot_do(name: str, ranks: int, micro_batches: int, word: str) -> None:
    with pytest.raises(UserError, match=word):
        find(name).table(ranks, micro_batches)


def test_an_unknown_schedule() -> None:
    with pytest.raises(UserError, match="Did you mean 'dualpipe'"):
        find("dualpip")


def test_a_timeline_adds_up() -> None:
    timeline = simulate(SCHEDULES["zb1p"].table(4, 8), Durations(1, 2, 1))
    assert isinstance(timeline, Timeline)
    for rank, slots in enumerate(timeline.ranks):
        assert all(a[1] <= b[0] for a, b in itertools.pairwise(slots)), "slots of a rank overlap"
        assert timeline.idle(rank) + 8 * 3 == pytest.approx(timeline.makespan)


@pytest.mark.parametrize(
    ("name", "schedule"),
    [("dualpipev", ScheduleDualPipeV), ("zbv", ScheduleZBVZeroBubble), ("interleaved", ScheduleInterleaved1F1B)],
)
@pytest.mark.parametrize(
    ("ranks", "micro_batches"), [(1, 3), (2, 3), (2, 4), (2, 9), (4, 5), (4, 8), (4, 10), (4, 13), (8, 16)]
)
def test_tables_are_what_torch_runs(name: str, schedule: Any, ranks: int, micro_batches: int) -> None:
    try:
        table = find(name).table(ranks, micro_batches)
    except UserError:  # torch also refuses these
        assert name == "dualpipev" or micro_batches % (micro_batches // ranks)
        return
    torchs = schedule.__new__(schedule)  # writing a table needs no processes
    torchs.pp_group_size, torchs._n_microbatches = ranks, micro_batches
    torchs.num_stages = torchs._num_stages = 2 * ranks
    torchs.n_local_stages, torchs.number_of_rounds = 2, max(1, micro_batches // ranks)
    torchs.microbatches_per_round = micro_batches // torchs.number_of_rounds
    for rank, slots in enumerate(table):
        theirs = [str(a) for a in torchs._calculate_single_rank_operations(rank) if a is not None]
        assert [str(action(slot)) for slot in slots] == theirs
