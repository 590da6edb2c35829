"""EPLB against the published placement, and invariants of every placement."""

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from finback.config import UserError
from finback.parallel.eplb import place, replicate
from finback.parallel.layout import pack

LOAD = torch.tensor(
    [[90, 132, 40, 61, 104, 165, 39, 4, 73, 56, 183, 86], [20, 107, 104, 64, 19, 197, 187, 157, 172, 86, 16, 27]]
)


def test_the_published_placement() -> None:
    """The example of DeepSeek's EPLB: two layers, 12 experts in 4 groups, 16 slots on 8 GPUs of 2 nodes."""
    found = place(LOAD, slots=16, groups=4, nodes=2, gpus=8)
    assert found.expert.tolist() == [
        [5, 6, 5, 7, 8, 4, 3, 4, 10, 9, 10, 2, 0, 1, 11, 1],
        [7, 10, 6, 8, 6, 11, 8, 9, 2, 4, 5, 1, 5, 0, 3, 1],
    ]
    assert found.copies[0].tolist() == [1, 2, 1, 1, 2, 2, 1, 1, 1, 1, 2, 1]
    assert found.slots[0, 5].tolist() == [0, 2] and found.slots[0, 6].tolist() == [1, -1]


def test_packing_and_copying_by_hand() -> None:
    assert pack([5, 1, 4, 2], 2, 2) == [[0, 1], [2, 3]]
    assert pack([9, 1, 1, 1], 2, 2) == [[0, 3], [1, 2]], "a full bin takes no more, however light the item"
    assert replicate([6, 3, 1], 6) == [0, 1, 2, 0, 0, 1], "6 is halved, then 3.0 ties with 3 and comes first"


def test_what_cannot_be_placed_is_refused() -> None:
    for name, wrong in (
        ("slots", {"slots": 8}),
        ("gpus", {"gpus": 3}),
        ("nodes", {"nodes": 3}),
        ("groups", {"groups": 5}),
    ):
        with pytest.raises(UserError, match=rf"placement\.{name} = {wrong[name]}"):
            place(LOAD, **{"slots": 16, "groups": 4, "nodes": 2, "gpus": 8} | wrong)


@settings(max_examples=150)
@given(data=st.data())
def test_every_placement_is_whole_and_balanced(data: st.DataObject) -> None:
    """All experts are placed, the maps agree both ways, groups stay on one node, and no GPU exceeds the greedy bound.

    Longest-first packing never exceeds the mean plus the heaviest item on any bin.
    """
    nodes, per_node, groups_per_node, size = (data.draw(st.integers(1, n)) for n in (3, 3, 2, 4))
    groups, gpus = nodes * groups_per_node, nodes * per_node
    experts = groups * size
    slots = gpus * (-(-experts // gpus) + data.draw(st.integers(0, 2)))
    row = st.lists(st.integers(0, 200), min_size=experts, max_size=experts)
    load = torch.tensor([data.draw(row)])
    hierarchical = data.draw(st.booleans())
    found = place(load, slots, groups if hierarchical else 1, nodes, gpus)
    assert set(found.expert[0].tolist()) == set(range(experts))
    assert int(found.copies.sum()) == slots
    for expert in range(experts):
        held = [s for s in found.slots[0, expert].tolist() if s >= 0]
        assert len(held) == found.copies[0, expert] and (found.expert[0, held] == expert).all()
    weight = load[0, found.expert[0]] / found.copies[0, found.expert[0]]
    spans = [slice(0, slots)]
    if hierarchical:
        spans = [slice(n * slots // nodes, (n + 1) * slots // nodes) for n in range(nodes)]
        for span in spans:
            assert len({e // size for e in found.expert[0, span].tolist()}) == groups_per_node
    for span in spans:
        here = weight[span].view(-1, slots // gpus).sum(dim=1)
        assert here.max() <= here.mean() + weight[span].max() + 1e-9


def test_copies_bring_the_busiest_gpu_down() -> None:
    plain, more = (place(LOAD, slots, groups=1, nodes=1, gpus=4) for slots in (12, 16))
    worst = [
        (LOAD[0, p.expert[0]] / p.copies[0, p.expert[0]]).view(4, -1).sum(dim=1).max().item() for p in (plain, more)
    ]
    assert worst == [277.0, 275.5], "the mean is 258.25"
