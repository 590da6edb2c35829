"""benchmarks/layouts.py: the margins of a router's choices, and tokens that are routed differently by name."""

import dataclasses
import importlib.util
import sys
from typing import Any

import pytest
import torch

from finback.model.moe import Router
from tests.many import MANY
from tests.toy import ROOT


@pytest.fixture(scope="module")
def layouts() -> Any:
    spec = importlib.util.spec_from_file_location("layouts_table", ROOT / "benchmarks/layouts.py")
    assert spec is not None and spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    before = list(sys.path)
    sys.path.insert(0, str(ROOT / "benchmarks"))
    sys.modules["layouts_table"] = module  # dataclasses look up their module here
    spec.loader.exec_module(module)
    sys.path[:] = before
    return module


def test_the_margin_of_a_choice_by_hand(layouts: Any) -> None:
    """Two groups of four experts, one group open, two experts chosen; then with all groups open."""
    router = Router(dataclasses.replace(MANY, num_experts_per_tok=2))
    router.bias[3] = 0.25
    affinity = torch.tensor([[0.5, 0.4, 0.3, 0.0, 0.45, 0.375, 0.1, 0.1], [0.9, 0.8, 0.1, 0.5, 0.2, 0.2, 0.2, 0.2]])
    index = router.select(affinity)
    assert index.sort().values.tolist() == [[0, 1], [0, 1]]
    # the groups' top two: 0.9 to 0.825; the second expert 0.4 to 0.3. Then 1.7 to 0.4, and 0.8 to 0.5 + 0.25
    torch.testing.assert_close(layouts.won_by(router, affinity, index), torch.tensor([0.075, 0.05]))
    free = Router(dataclasses.replace(MANY, n_group=1, num_experts_per_tok=2))
    index = free.select(affinity)
    torch.testing.assert_close(layouts.won_by(free, affinity, index), torch.tensor([0.05, 0.3]))


def test_tokens_that_went_elsewhere_are_named(layouts: Any) -> None:
    """Of four rows of three tokens the second of two data ranks has rows 1 and 3."""
    whole = torch.tensor([0, 1]).expand(4, 3, 2)
    here = whole[1::2].clone()
    here[1, 2] = torch.tensor([0, 5])
    margin = torch.full((4, 3), 0.5)
    margin[3, 2] = 1e-8
    one = [{"blocks.1.router": (whole, margin)}] * 2
    same = {"blocks.1.router": whole[1::2]}
    [tie] = layouts.ties(one, [((1, 0), [same, {"blocks.1.router": here}], {})], 2)
    assert tie == {
        "step": 2,
        "layer": "blocks.1.router",
        "row": 3,
        "token": 2,
        "experts": [0, 5],
        "on_one_rank": [0, 1],
        "won_by": pytest.approx(1e-8),
    }


def test_the_table_has_every_schedule_and_both_precisions(layouts: Any) -> None:
    cases = list(layouts.table())
    assert len(cases) >= 40 and len({case.name for case in cases}) == len(cases)
    for schedule in layouts.PIPELINES:
        mine = [case for case in cases if case.layout.schedule == schedule and case.layout.pp > 1]
        assert {case.layout.sharding for case in mine} == {"fsdp", "zero1"} and any(case.way.packed for case in mine)
    assert {case.way.compute for case in cases} == {"fp32", "fp8"}
