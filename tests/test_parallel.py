"""How a model is distributed over ranks: impossible layouts, and expert parallelism."""

import dataclasses
import subprocess
import sys
from typing import Any

import pytest
import torch
import torch.distributed as dist
from torch import Tensor
from torch.distributed.tensor import DTensor

from finback.config import UserError
from finback.kernels import reference
from finback.model.config import V3
from finback.model.moe import Router
from finback.parallel import launch
from finback.parallel.experts import Exchange, copies
from finback.parallel.layout import Layout
from finback.parallel.mesh import Mesh
from finback.stages.pretrain import Pretrain
from finback.train.rates import ramp, ramp_sizes
from tests.many import MANY, on_ranks


@pytest.mark.parametrize(
    ("layout", "rows", "ranks", "field"),
    [
        (Layout(dp=4, ep=2), 8, 2, "layout.dp"),
        (Layout(dp=2, micro_batches=2), 6, 2, "rows"),
        (Layout(dp=3, ep=3), 6, 3, "layout.ep"),
        (Layout(dp=6, ep=4), 6, 6, "layout.ep"),
        (Layout(dp=3), 6, 3, "layout.dp"),
        (Layout(pp=8, micro_batches=8), 8, 8, "layout.pp"),
        (Layout(pp=4, micro_batches=8, schedule="zbv"), 8, 4, "layout.pp"),
        (Layout(pp=4, micro_batches=2), 2, 4, "layout.micro_batches"),
        (Layout(pp=2, micro_batches=5, schedule="interleaved"), 5, 2, "layout.micro_batches"),
    ],
)
def test_a_layout_that_cannot_be_is_refused_by_name(layout: Layout, rows: int, ranks: int, field: str) -> None:
    with pytest.raises(UserError) as told:
        layout.check_trainable(MANY, rows, ranks)
    assert told.value.field == field


def test_layouts_that_can_be() -> None:
    Layout(pp=2, dp=8, ep=4, nodes=2, micro_batches=4, schedule="zbv").check_trainable(MANY, 32, 16)
    Layout(dp=16).check_trainable(MANY, 16, 16)  # fewer experts than ranks: each expert is sharded
    with pytest.raises(UserError, match=r"layout\.pp = 0: not above 0"):
        Layout(pp=0)
    with pytest.raises(UserError, match=r"layout\.nodes = 3: does not divide ep = 4"):
        Layout(dp=4, ep=4, nodes=3)
    with pytest.raises(UserError, match=r"layout\.ep = 4: does not divide 0 experts"):
        Layout(dp=4, ep=4).check_trainable(dataclasses.replace(MANY, n_routed_experts=0), 8, 4)
    tied = dataclasses.replace(MANY, tie_word_embeddings=True)
    Layout(pp=2, micro_batches=4, schedule="zbv").check_trainable(tied, 4, 2)
    for planned in (Layout(pp=2, micro_batches=4, schedule="dualpipe"), Layout(dp=2, sharding="ddp")):
        planned.check(MANY, 8)
        with pytest.raises(UserError, match="can be planned, not trained"):
            planned.check_trainable(MANY, 8, 2)
    with pytest.raises(UserError, match="only sharded weights are gathered"):
        Layout(sharding="zero1", gather="bf16")
    with pytest.raises(UserError, match=r'layout\.offload = True: sharding="zero1" computes with the weights where'):
        Layout(sharding="zero1", offload=True)
    with pytest.raises(UserError, match=r"base\.layout\.offload = True: is supported in fine-tuning and RL only"):
        Pretrain(
            name="base",
            data="prepare",
            model=MANY,
            max_tokens=1,
            decay_tokens=0,
            mixture={},
            layout=Layout(dp=2, offload=True),
        )


def test_small_steps_have_fewer_micro_batches_or_smaller_ones() -> None:
    """V3's ramp on 128 data ranks, 3,072 rows to 15,360: 24 of 120 micro-batches fill 16 pipeline ranks with ZB-V."""
    v3 = Layout(pp=8, dp=128, ep=64, schedule="zb1p", micro_batches=120)
    assert v3.at(3072, 15360).micro_batches == 24 and v3.at(15360, 15360) == v3
    deep = dataclasses.replace(v3, pp=16, schedule="dualpipev")
    assert deep.at(3072, 15360) == dataclasses.replace(deep, schedule="zbv", micro_batches=24)
    deep.check_steps(V3, ramp_sizes(3072, 15360), 15360)
    with pytest.raises(UserError, match="rows = 3000: does not divide among dp = 128 ranks with 120 micro-batches"):
        deep.check_steps(V3, [3000], 15360)
    v3.check_steps(V3, ramp_sizes(3072, 15360), 15360)
    assert Layout(dp=2, micro_batches=2).at(6, 8).micro_batches == 2, "a micro-batch has at least one row"
    assert ramp_sizes(3072, 15360) == [3072, 6144, 9216, 12288, 15360] and ramp_sizes(0, 8) == [8]
    assert {ramp(tokens, 4, 10, 1000) for tokens in range(0, 1200, 7)} == set(ramp_sizes(4, 10))


def test_a_token_goes_to_a_group_once() -> None:
    """Three tokens, four members of two experts each: chosen (0, 1), (1, 6), (none, 7)."""
    member, token = copies(torch.tensor([[0, 1], [1, 6], [-1, 7]]), members=4, per_member=2)
    assert list(zip(member.tolist(), token.tolist(), strict=True)) == [(0, 0), (0, 1), (3, 1), (3, 2)]


def test_node_limited_routing_sends_a_token_to_few_nodes() -> None:
    """With 8 experts in 4 groups, 2 groups per token: a token goes to at most 2 of 4 nodes, even with 3 experts."""
    config = dataclasses.replace(MANY, n_group=4, topk_group=2, num_experts_per_tok=3)
    index = Router(config).select(torch.rand(200, 8, generator=torch.Generator().manual_seed(0)))
    _, token = copies(index, members=4, per_member=2)
    assert token.bincount().max() == 2
    free = dataclasses.replace(config, topk_group=4)
    _, token = copies(Router(free).select(torch.rand(200, 8)), members=4, per_member=2)
    assert token.bincount().max() == 3


def _routed(tokens: int, seed: int) -> dict[str, Any]:
    generator = torch.Generator().manual_seed(seed)

    def make(*shape: int) -> Tensor:
        return torch.randn(*shape, generator=generator, dtype=torch.float64)

    index = torch.rand(tokens, 8, generator=generator).topk(3, dim=1).indices
    return {
        "x": make(tokens, 6),
        "index": index,
        "weight": make(tokens, 3),
        "up": make(8, 10, 6),
        "down": make(8, 6, 5),
    }


def _exchange(nodes: int, everyone_to_the_first: bool) -> None:
    rank, ranks = dist.get_rank(), dist.get_world_size()
    mesh = Mesh.of(Layout(dp=ranks, ep=ranks, nodes=nodes), "cpu")
    axes = [axis.get_group() for axis in (mesh.node, mesh.local) if axis.size() > 1]
    data = _routed(12, 0)
    if everyone_to_the_first:
        data["index"] = torch.arange(3).expand(12, 3)
    share, held = 12 // ranks, 8 // ranks
    mine, experts = slice(rank * share, (rank + 1) * share), slice(rank * held, (rank + 1) * held)
    whole = {n: t.clone().requires_grad_(t.is_floating_point()) for n, t in data.items()}
    expected = reference.routed_experts(*whole.values())
    (expected * expected).sum().backward()
    parts = {n: data[n][mine].clone().requires_grad_(n != "index") for n in ("x", "index", "weight")}
    parts |= {n: data[n][experts].clone().requires_grad_() for n in ("up", "down")}
    up = DTensor.from_local(parts["up"], mesh.ep)
    y = Exchange(axes, 8)(parts["x"], parts["index"], parts["weight"], up, parts["down"])
    (y * y).sum().backward()
    torch.testing.assert_close(y, expected[mine])
    for name, rows in (("x", mine), ("weight", mine), ("up", experts), ("down", experts)):
        torch.testing.assert_close(parts[name].grad, whole[name].grad[rows], msg=lambda m, n=name: f"{n}: {m}")


@pytest.mark.parametrize("lonely", [False, True], ids=["spread", "all to one rank"])
def test_experts_on_two_ranks_answer_like_experts_on_one(lonely: bool) -> None:
    on_ranks(2, _exchange, 1, lonely)


@pytest.mark.slow
@pytest.mark.parametrize(("nodes", "lonely"), [(1, False), (2, False), (2, True)])
def test_experts_on_four_ranks_answer_like_experts_on_one(nodes: int, lonely: bool) -> None:
    on_ranks(4, _exchange, nodes, lonely)


@pytest.mark.parametrize(("late", "failed"), [(130, None), (0, None), (2, 1)])
def test_a_rank_at_its_safe_point_does_not_end_the_one_that_still_writes(late: int, failed: int | None) -> None:
    programs = ("raise SystemExit(130)", f"import time; time.sleep(1); raise SystemExit({late})")
    children = [subprocess.Popen([sys.executable, "-c", program]) for program in programs]
    assert launch.wait(children) == failed
    assert [child.wait(10) for child in children] == [130, late]
