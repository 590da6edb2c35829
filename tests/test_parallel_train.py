"""One rank = many: losses of 20 steps, router biases and checkpoints under every way to split a model."""

import dataclasses
import json
import math
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist
from torch import Tensor

from finback.checkpoint import models
from finback.config import UserError
from finback.model.config import V3, ModelConfig
from finback.model.transformer import Transformer
from finback.parallel.build import blank
from finback.parallel.layout import Layout, pack, share, split_layers
from finback.parallel.owners import Owners
from finback.parallel.pipeline import PipelineStage, cut
from finback.parallel.shard import local
from finback.train import sharded_optim
from finback.train.sharded_options import ShardedOptions
from finback.train.sharded_trainer import ShardedTrainer
from tests.many import (
    MANY,
    ROWS,
    SPARSE_MANY,
    V4_MANY,
    Numbers,
    Way,
    agrees,
    batches,
    continued,
    on_many,
    on_one,
    on_ranks,
    one_rank,
    pipeline,
    step,
    trained,
)

TIED = dataclasses.replace(MANY, tie_word_embeddings=True)
TIED_PLAIN = dataclasses.replace(TIED, num_nextn_predict_layers=0)
PLAIN = dataclasses.replace(MANY, num_nextn_predict_layers=0, n_shared_experts=0)
# not divisible by two ranks. With 5 experts Muon amplifies rounding to 1e-5 by step 14, in any order of rows on
# one rank, and at step 18 that changes the expert of a token whose margin is 3e-5
FEW = dataclasses.replace(MANY, n_routed_experts=7, n_group=1)


@pytest.fixture(scope="module")
def one() -> dict[Way, tuple[Numbers, dict[str, Tensor]]]:
    """One rank's results over 20 steps, computed on first use."""
    return {}


def name_of(layout: Layout) -> str:
    changed = {k: v for k, v in dataclasses.asdict(layout).items() if v != getattr(Layout(), k)}
    return ",".join(f"{name}={value}" for name, value in changed.items())


FAST = [Layout(dp=2, ep=2, sharding="zero1"), pipeline("1f1b", sharding="zero1")]
TWO = [
    Layout(dp=2),
    Layout(dp=2, ep=2),
    Layout(dp=2, sharding="zero1", micro_batches=2),
    Layout(dp=2, micro_batches=4),
    *(pipeline(s) for s in ("1f1b", "zb1p", "interleaved", "zbv", "dualpipev")),
    *(pipeline(s, sharding="zero1") for s in ("zb1p", "interleaved", "zbv", "dualpipev")),
]
FOUR = [
    Layout(dp=4),
    Layout(dp=4, ep=4),
    Layout(dp=4, ep=4, nodes=2),
    Layout(dp=4, ep=2),
    Layout(dp=4, ep=2, sharding="zero1"),
    *(pipeline(s, dp=2) for s in ("interleaved", "zbv", "dualpipev")),
    pipeline("1f1b", dp=2, micro_batches=2),
    *(pipeline(s, dp=2, ep=2) for s in ("interleaved", "zbv", "dualpipev")),
    pipeline("1f1b", dp=2, ep=2, micro_batches=2),
    pipeline("dualpipev", dp=2, ep=2, sharding="zero1"),
    *(pipeline(s, pp=4, micro_batches=8) for s in ("1f1b", "zb1p")),
]


@pytest.mark.parametrize("layout", FAST, ids=name_of)
def test_two_ranks_train_like_one(one: dict[Any, Any], layout: Layout, tmp_path: Path) -> None:
    agrees(one, layout, tmp_path)


PACKED = Way(optimizer="adamw", seed=10, rows=(4, 4, 8), packed=True, ema_decay=0.5, looks=(6, 19))
FEWER = dataclasses.replace(PACKED, rows=(2, 4, 8))  # the first steps have too few rows to fill a pipeline


@pytest.mark.parametrize(
    ("layout", "way"),
    [
        (Layout(dp=2, ep=2, micro_batches=2), PACKED),
        (pipeline("dualpipev"), FEWER),
        *(pytest.param(pipeline(s), FEWER, marks=pytest.mark.slow) for s in ("1f1b", "zb1p", "interleaved", "zbv")),
        *(
            pytest.param(layout, PACKED, marks=pytest.mark.slow)
            for layout in (
                pipeline("zbv"),
                Layout(dp=2, sharding="zero1", micro_batches=2),
                *(pipeline(s) for s in ("1f1b", "zb1p", "interleaved", "dualpipev")),
                pipeline("zbv", micro_batches=8),
                pipeline("1f1b", dp=2, ep=2, sharding="zero1", micro_batches=2),
            )
        ),
    ],
    ids=lambda value: name_of(value) if isinstance(value, Layout) else "-".join(map(str, value.rows)),
)
def test_packed_rows_a_ramp_adamw_and_looks_do_too(
    one: dict[Any, Any], layout: Layout, way: Way, tmp_path: Path
) -> None:
    """Steps of 2, 4 and 8 rows, an average of the weights, and evaluation in between: in small steps some pipelines
    have fewer micro-batches, some smaller ones, and DualPipeV's stages run ZB-V if only one is left."""
    agrees(one, layout, tmp_path, way)


def test_small_steps_go_through_v3s_pipeline() -> None:
    """3,072 rows are 24 for each of 128 pipelines: too few for DualPipe on 16 ranks, which needs 32 micro-batches."""
    large = Layout(pp=16, dp=128, ep=64, schedule="dualpipe", micro_batches=120, sharding="zero1")
    for rows, micro_batches, schedule in ((3072, 24, "zb1p"), (6144, 48, "dualpipe"), (15360, 120, "dualpipe")):
        assert large.at(rows, 15360) == dataclasses.replace(large, micro_batches=micro_batches, schedule=schedule)
    folded = dataclasses.replace(large, schedule="dualpipev")
    assert folded.at(3072, 15360) == dataclasses.replace(folded, micro_batches=24, schedule="zbv")
    for layout in (large, folded):
        layout.check_steps(V3, [3072, 6144, 9216, 12288, 15360], 15360)
    with pytest.raises(UserError, match=r"layout\.micro_batches = 24: DualPipe on 16 ranks needs at least 32"):
        dataclasses.replace(large, micro_batches=24).check(V3, 3072)
    with pytest.raises(UserError, match="rows = 64: does not divide among dp = 128"):  # half a row per pipeline
        large.check_steps(V3, [64, 15360], 15360)


# setups whose backward pass cannot be split
AGAIN, TIES, DEPTHS = Way(recompute="block"), Way(TIED), Way(dataclasses.replace(MANY, num_nextn_predict_layers=2))
ATTENTION = Way(recompute="attention")
WHOLE = {AGAIN: "block", TIES: "tied", DEPTHS: "two-mtp", ATTENTION: "attention"}


@pytest.mark.slow
@pytest.mark.parametrize(
    ("layout", "way"),
    [
        (Layout(dp=2, ep=2), AGAIN),
        *((pipeline(s), way) for s in ("zb1p", "zbv", "dualpipev") for way in (AGAIN, TIES, DEPTHS)),
        (pipeline("zbv", sharding="zero1"), ATTENTION),
    ],
    ids=lambda value: name_of(value) if isinstance(value, Layout) else WHOLE[value],
)
def test_a_backward_pass_that_cannot_be_split_is_not(layout: Layout, way: Way, tmp_path: Path) -> None:
    agrees({}, layout, tmp_path, way)


@pytest.mark.parametrize(
    ("way", "splits"), [(Way(), True), (Way(TIED_PLAIN), True), (TIES, False), (DEPTHS, False), (AGAIN, False)]
)
def test_the_last_stage_splits_its_backward_pass_where_it_uses_the_embedding_once(way: Way, splits: bool) -> None:
    models = [cut(way.options.put_on(blank(way.config, torch.float32)), number, 4) for number in range(4)]
    stages = [PipelineStage(model, number, 4, lambda *_: None) for number, model in enumerate(models)]
    assert stages[3].splits == splits and stages[0].splits == (way is not AGAIN)


@pytest.mark.slow
@pytest.mark.parametrize("layout", [Layout(dp=2, ep=2), Layout(dp=2, sharding="zero1"), pipeline("zbv")], ids=name_of)
def test_compiled_blocks_do_too(one: dict[Any, Any], layout: Layout, tmp_path: Path) -> None:
    """Against one uncompiled rank; torch's compiler calls functions that torch has deprecated."""
    agrees({Way(compile=True): on_one(Way())}, layout, tmp_path, Way(compile=True))


@pytest.fixture(scope="module")
def fp8() -> tuple[Numbers, Tensor]:
    """One rank's numbers in FP8, and how much they change with another order of rows, and so other tiles."""
    numbers, _ = on_one(FP8)
    turned, _ = on_one(dataclasses.replace(FP8, reversed=True))
    return numbers, (torch.tensor(numbers) - torch.tensor(turned)).abs().amax(dim=0)


FP8 = Way(compute="fp8")


@pytest.mark.slow
@pytest.mark.parametrize(
    "layout",
    [Layout(dp=2, ep=2), Layout(dp=2, ep=2, sharding="zero1"), pipeline("zbv"), pipeline("interleaved", dp=2, ep=2)],
    ids=name_of,
)
def test_fp8_differs_from_one_rank_by_its_own_noise(layout: Layout, fp8: Any, tmp_path: Path) -> None:
    """Tiles along tokens differ, so the weights' gradients round differently; the first loss is not affected."""
    numbers, noise = fp8
    on_ranks(layout.ranks, trained, layout, FP8, str(tmp_path / "out.json"))
    found = torch.tensor(json.loads((tmp_path / "out.json").read_text())[0])
    off = (found - torch.tensor(numbers)).abs()
    assert off[0, :3].max() <= 1e-5, off[0]
    assert off[0, 3] <= 0.01 * found[0, 3] and (off.amax(dim=0) <= 3 * noise).all(), (off.amax(dim=0), noise)


@pytest.mark.slow
@pytest.mark.parametrize("way", [Way(), FP8], ids=["fp32", "fp8"])
def test_weights_that_travel_in_bf16_are_those_rounded_on_one_rank(way: Way, tmp_path: Path) -> None:
    """The first step; FP8 scales and rounding are those of the rounded weights. Embedding, head, routers stay fp32."""
    whole = one_rank(way)
    with torch.no_grad():
        for name, parameter in whole.model.named_parameters():
            if name.startswith(("blocks.", "mtp.")) and ".router." not in name:
                parameter.copy_(parameter.bfloat16())
    expected = torch.tensor(step(whole, next(batches(way, 1))))
    on_ranks(2, trained, Layout(dp=2, gather="bf16"), way, str(tmp_path / "out.json"))
    found = torch.tensor(json.loads((tmp_path / "out.json").read_text())[0][0])
    off = (found - expected).abs()
    # the gradients of rounded weights are also in bf16
    assert off[:3].max() <= 1e-5 and off[3] <= 0.01 * expected[3], (found, expected)


@pytest.mark.slow
@pytest.mark.parametrize("layout", TWO + FOUR, ids=name_of)
def test_every_layout_trains_like_one_rank(one: dict[Any, Any], layout: Layout, tmp_path: Path) -> None:
    agrees(one, layout, tmp_path)


@pytest.mark.slow
@pytest.mark.parametrize(
    ("config", "layout"),
    [
        (TIED, pipeline("interleaved")),
        (TIED, pipeline("1f1b", sharding="zero1")),
        (TIED, Layout(dp=2)),
        (TIED_PLAIN, pipeline("zbv")),
        (PLAIN, pipeline("1f1b")),
        (PLAIN, pipeline("dualpipev", sharding="zero1")),
        (PLAIN, Layout(dp=2, ep=2)),
        (FEW, Layout(dp=2)),
        (FEW, Layout(dp=2, sharding="zero1")),
    ],
)
def test_other_models_do_too(one: dict[Any, Any], config: ModelConfig, layout: Layout, tmp_path: Path) -> None:
    """A tied head, no MTP and no shared expert, and a number of experts that the ranks do not divide."""
    agrees(one, layout, tmp_path, Way(config))


@pytest.mark.slow
@pytest.mark.parametrize(
    ("config", "layout"),
    [
        (V4_MANY, Layout(dp=2, ep=2)),
        (V4_MANY, Layout(dp=2, sharding="zero1")),
        (V4_MANY, pipeline("zbv")),
        (SPARSE_MANY, Layout(dp=2, ep=2)),
        (SPARSE_MANY, pipeline("1f1b")),
    ],
)
def test_sparse_attention_does_too(one: dict[Any, Any], config: ModelConfig, layout: Layout, tmp_path: Path) -> None:
    """V4 and V3.2, also with documents that share rows; the model is evaluated both sharded and whole."""
    agrees(one, layout, tmp_path, Way(config, packed=True, ema_decay=0.9, looks=(1, 9)))


@pytest.mark.slow
def test_v4s_muon_does_too(one: dict[Any, Any], tmp_path: Path) -> None:
    agrees(one, Layout(dp=2, ep=2), tmp_path, Way(muon_form="v4"))


def _owners() -> None:
    """Seven matrices of uneven heights: every rank gets its rows of the matrix that the owner computed."""
    rank, size = dist.get_rank(), dist.get_world_size()
    shapes = [(5, 3), (1, 3), (4, 2), (8, 8), (3, 7), (2, 2), (7, 1)]
    generator = torch.Generator().manual_seed(0)
    wholes = [torch.randn(shape, generator=generator) for shape in shapes]
    seen: list[torch.Size] = []

    def reverse(matrices: list[Tensor]) -> list[Tensor]:
        seen.extend(m.shape for m in matrices)
        return [m.flip(0) for m in matrices]

    owners = Owners(shapes, dist.group.WORLD)
    mine = [slice(*share(len(w), size, rank)) for w in wholes]
    made = owners.apply(reverse, [w[rows] for w, rows in zip(wholes, mine, strict=True)])
    for part, whole, rows in zip(made, wholes, mine, strict=True):
        assert torch.equal(part, whole.flip(0)[rows])
    everyone: list[Any] = [None] * size
    dist.all_gather_object(everyone, [tuple(s) for s in seen])
    assert sorted(s for some in everyone for s in some) == sorted(shapes), "each matrix has one owner"
    losses = []
    for most in (4096, sharded_optim.BATCH):  # a few matrices at a time, as for large models
        sharded_optim.BATCH = most
        many = ShardedTrainer(MANY, Layout(dp=2), ROWS, 5)
        losses.append(torch.tensor(continued(many, Way(), 0, 3)))
        muon = many.optimizers[0][0]
        assert isinstance(muon, sharded_optim.ShardedMuon) and (len(muon.batches) > 5) == (most == 4096)
    assert (losses[0] - losses[1]).abs().max() <= 1e-5


def test_matrices_are_put_together_and_handed_back() -> None:
    on_ranks(2, _owners)
    assert pack([4, 9, 5, 1], 2, room=4) == [[1, 3], [2, 0]]
    assert [share(5, 3, m) for m in range(3)] == [(0, 2), (2, 4), (4, 5)]
    assert share(2, 4, 3) == (2, 2)


def test_stages_have_every_parameter_once() -> None:
    names = {n for n, _ in Transformer(MANY).named_parameters()}
    held = [{n for n, _ in cut(blank(MANY, torch.float32), s, 4).named_parameters()} for s in range(4)]
    assert set.union(*held) == names
    assert sum(map(len, held)) == len(names) + 1 and "embed" in held[0] & held[3], "both end stages have the embedding"
    assert [s.layers for s in split_layers(MANY, 3)] == [(0, 1), (2, 3), (4,)], "MTP is the last layer"
    deep = dataclasses.replace(MANY, num_hidden_layers=3, num_nextn_predict_layers=2)
    assert [s.layers for s in split_layers(deep, 4)] == [(0,), (1,), (2,), (3, 4)], "MTP modules are all last"
    assert [pipeline("zbv", pp=3).stages_of(r) for r in range(3)] == [(0, 5), (1, 4), (2, 3)]
    assert [pipeline("interleaved", pp=3).stages_of(r) for r in range(3)] == [(0, 3), (1, 4), (2, 5)]


def _not_finite() -> None:
    many = on_many(Layout(dp=2, ep=2, sharding="zero1"))
    many.models[0].norm.weight.data[3] = float("nan")
    before = {name: local(t).clone() for name, t in many.state().items()}
    assert math.isnan(step(many, next(batches(Way(), 1)))[-1])
    for name, tensor in many.state().items():
        assert torch.equal(local(tensor).nan_to_num(9.0), before[name].nan_to_num(9.0)), name
    assert not any(router.load.any() for router in many.routers)


def test_a_gradient_that_is_no_number_changes_nothing() -> None:
    on_ranks(2, _not_finite)


def _rounded(out: str) -> None:
    numbers = []
    for gather in ("fp32", "bf16"):
        layout, options = Layout(dp=2, gather=gather), ShardedOptions(compute="bf16")  # type: ignore[arg-type]
        many = ShardedTrainer(MANY, layout, ROWS, 5, options)
        numbers.append(continued(many, Way(), 0, 5))
        router = many.routers[0].weight
        assert router.dtype == torch.float32 and all(p.value.dtype == torch.float32 for p in many.parts)
    if dist.get_rank() == 0:
        Path(out).write_text(json.dumps(numbers))


@pytest.mark.slow
def test_weights_that_travel_in_bf16_train_like_those_in_fp32(tmp_path: Path) -> None:
    """In a bf16 model a matrix is rounded before its product either way; only the norms' gains are rounded as well."""
    on_ranks(2, _rounded, str(tmp_path / "out.json"))
    exact, rounded = (torch.tensor(n) for n in json.loads((tmp_path / "out.json").read_text()))
    assert 0 < (exact - rounded)[:, :-1].abs().max() < 0.02
    # the norm is about 2.5; its error depends on the processor's bf16 products
    assert ((exact - rounded)[:, -1] / exact[:, -1]).abs().max() < 2**-5


def _levels(start: str) -> None:
    """A pipeline that starts from trained biases and stops computing the MTP loss at some step."""
    many = ShardedTrainer(MANY, pipeline("1f1b"), ROWS, models.stored(Path(start))[1])
    assert all(router.bias.tolist() == list(range(8)) for router in many.routers)
    for weight in (0.3, 0.3, 0.0, 0.0):
        losses = step(many, next(batches(Way(), 1)), mtp_weight=weight)
        assert (losses[1] > 0) == (weight > 0) and math.isfinite(losses[-1])


def test_a_pipeline_can_leave_out_mtp_later_and_takes_learnt_biases(tmp_path: Path) -> None:
    start = Transformer(MANY).initialise(5)
    for router in start.routers():
        router.bias.copy_(torch.arange(8.0))
    models.save(tmp_path, start)
    on_ranks(2, _levels, str(tmp_path))


def test_no_stage_is_left_without_a_layer() -> None:
    deep = dataclasses.replace(MANY, num_hidden_layers=2, num_nextn_predict_layers=2)
    with pytest.raises(UserError, match=r"layout\.pp = 4: .*4 stages, but there are layers for only 3"):
        Layout(pp=4, micro_batches=4).check(deep, 8)
    Layout(pp=3, micro_batches=4).check(deep, 8)
    assert all(s.layers for s in split_layers(deep, 3))
