"""Pre-training on rows that grow, with attention that becomes sparse at a length: V4's schedule at toy size."""

import dataclasses
import json
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist

from finback.checkpoint import store
from finback.config import UserError
from finback.data.loader import Loader
from finback.model.config import ModelConfig
from finback.model.count import attending_densely, training_flops
from finback.model.dsa_training import Attention, divergence, set_attention, take_divergences, teach_indexers
from finback.model.transformer import Transformer
from finback.parallel.layout import Layout
from finback.planner import recipe_plan
from finback.planner.options import PlanOptions
from finback.runs.files import read_lines
from finback.runs.recipe import config_json
from finback.stages.pretrain_setup import PretrainingOptions
from finback.train import compiling, loop
from finback.train.sharded_options import ShardedOptions
from finback.train.trainer import ReplicatedTrainer, Trainer
from tests.many import SPARSE_MANY, V4_MANY, Way, batches, on_many, on_ranks, one_rank, step
from tests.test_pretrain import begin, interrupted, prepared, pretrain, trained
from tests.toy import CONFIG, V4

__all__ = ["prepared"]

V32 = dataclasses.replace(CONFIG, index_topk=6, index_n_heads=4, index_head_dim=8)
SMALL_V4 = dataclasses.replace(V4, vocab_size=320, num_nextn_predict_layers=1)
GLM_MANY = dataclasses.replace(SPARSE_MANY, shared_indexers=(1, 3))
# 8 steps of 4 x 16 dense tokens, 4 steps of 2 x 32 in which indexers warm up, 8 sparse ones of the same shape
GROWING: dict[str, Any] = {
    "seq_len": ((0, 16), (512, 32)),
    "batch_size": ((0, 4), (512, 2)),
    "sparse_from": 32,
    "indexer_tokens": 256,
    "phases": (),
    "max_tokens": 1280,
    "decay_tokens": 320,
    "warmup_tokens": 128,
    "checkpoint_steps": 3,
}


@pytest.mark.parametrize("config", [V32, SMALL_V4], ids=["V3.2", "V4"])
def test_attention_becomes_sparse_as_rows_grow(config: ModelConfig, prepared: Path) -> None:
    """Until then losses are those of a model whose indexers select everything, which computes attention in another order."""
    name, plain = f"grows-{config.attention}", f"dense-{config.attention}"
    knobs = {"model": config, "max_grad_norm": 1e9, "weight_decay": 0.0}  # neither depends on how many matrices learn
    _, found, folder = trained(prepared, name, **GROWING | knobs)
    steps = [line for line in found if "loss" in line]
    assert [(line["seq_len"], line["batch_size"]) for line in steps] == [(16, 4)] * 8 + [(32, 2)] * 12
    assert [line["tokens"] for line in steps] == list(range(64, 1281, 64))
    assert ["indexer_loss" in line for line in steps] == [False] * 8 + [True] * 12
    config = attending_densely(config)
    constant = {"seq_len": 16, "batch_size": 4, "sparse_from": 0, "indexer_tokens": 0}
    _, dense, _ = trained(prepared, plain, **GROWING | knobs | constant | {"model": config})
    assert [line["loss"] for line in steps[:8]] == pytest.approx([line["loss"] for line in dense[:8]], abs=1e-5)

    tensors = store.load(folder / "model.safetensors")[0]
    fresh = begin(prepared, pretrain(name=f"{name}-fresh", **GROWING | knobs)).trainer.model.state_dict()
    indexers = [n for n in fresh if ".indexer." in n and not n.startswith("mtp.")]
    assert indexers and any(not torch.equal(tensors[n], fresh[n]) for n in indexers)


@pytest.mark.parametrize("config", [V32, SMALL_V4], ids=["V3.2", "V4"])
def test_a_model_attends_as_it_is_told(config: ModelConfig) -> None:
    """Dense passes are those of a model that selects everything, and teach nothing; what follows is as if never dense."""
    tokens = torch.randint(0, 320, (2, 40), generator=torch.Generator().manual_seed(0))
    plain, wide = (Transformer(c).initialise(0).eval() for c in (config, attending_densely(config)))
    model = teach_indexers(Transformer(config).initialise(0), "dense").train()
    assert torch.equal(model(tokens), wide.train()(tokens)) and take_divergences(model) is None
    with torch.no_grad():
        assert torch.equal(model.eval()(tokens), wide.eval()(tokens))
        assert torch.equal(set_attention(model, "sparse")(tokens), plain(tokens))
        assert not torch.equal(plain(tokens), wide(tokens))
    model(tokens)
    warm = set_attention(model.train(), "warm-up")
    assert torch.allclose(warm(tokens), wide(tokens), atol=1e-5) and take_divergences(warm) is not None


@pytest.mark.parametrize("packing", ["stream", "best_fit"])
def test_an_interrupted_schedule_ends_with_the_same_bits(
    packing: str, prepared: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Interrupted before, at and after the change of length, and in the indexers' warm-up."""
    knobs = GROWING | {"model": V32, "packing": packing, "valid_tokens": 320}
    _, _, one = trained(prepared, f"schedule-{packing}", **knobs)
    stage = pretrain(name=f"pieces-{packing}", **knobs)
    for stops in (5, 3, 2, 4):  # after 5, 8, 10 and 14 steps
        interrupted(begin(prepared, stage), stops, monkeypatch)
    loop.run(begin(prepared, stage))
    timed = ("seconds", "tokens_per_second", "mfu")
    logs = [read_lines(prepared / name / "metrics.jsonl") for name in (f"schedule-{packing}", f"pieces-{packing}")]
    a, b = ([{k: v for k, v in line.items() if k not in timed} for line in log] for log in logs)
    assert a == b and len(a) > 20
    mine, other = (store.load(f / "model.safetensors")[0] for f in (one, prepared / f"pieces-{packing}"))
    assert all(torch.equal(mine[name], other[name]) for name in mine)


@pytest.mark.slow
@pytest.mark.filterwarnings("ignore:The .grad attribute of a Tensor:UserWarning")
@pytest.mark.parametrize("config", [V32, SMALL_V4], ids=["V3.2", "V4"])
def test_compiled_blocks_follow_the_schedule(config: ModelConfig, prepared: Path) -> None:
    """Rows of another length are compiled again, and attention is not compiled."""
    if compiling.why_not():
        pytest.skip("torch.compile does not work here")
    knobs = GROWING | {"model": config, "max_tokens": 768, "decay_tokens": 256}
    logs = [trained(prepared, f"{config.attention}-compiled-{int(c)}", **knobs, compile=c)[1] for c in (True, False)]
    found, expected = ([line["loss"] for line in log if "loss" in line] for log in logs)
    assert len(found) == 12 and found == pytest.approx(expected, abs=1e-5)


def test_a_loader_keeps_its_shares_when_rows_grow(prepared: Path) -> None:
    loader, fresh = (Loader(prepared / "prepare", {"words": 1.0}, length, 2, 7) for length in (16, 32))
    loader.draw(3)
    loader.resize(32)
    assert all((a.tokens == b.tokens).all() for a, b in zip(loader.draw(2), fresh.draw(2), strict=True))
    assert loader.tokens_by_source() == {"words": 3 * 16 + 2 * 32}
    again = Loader(prepared / "prepare", {"words": 1.0}, 16, 2, 7)
    again.load_state(json.loads(json.dumps(loader.state())))
    assert all((a.tokens == b.tokens).all() for a, b in zip(loader.draw(2), again.draw(2), strict=True))


@pytest.mark.parametrize(
    ("knobs", "problem"),
    [
        ({"seq_len": ((0, 16), (512, 0))}, r"base\.seq_len = .*not above 0"),
        ({"seq_len": ((64, 16), (512, 32))}, r"base\.seq_len = .*must start at token 0"),
        ({"seq_len": ((0, 32), (512, 16))}, r"base\.seq_len = .*rows must grow"),
        ({"batch_size": ((0, 4), (0, 2))}, r"base\.batch_size = .*ascend"),
        ({"batch_size": ((0, 4.5),)}, r"base\.batch_size = .*expected"),
        ({"batch_size_start": 1, "ramp_tokens": 64}, r"base\.batch_size_start = 1: batch_size is a schedule already"),
        ({"sparse_from": 64}, r"base\.sparse_from = 64: rows have at most 32 tokens"),
        ({"indexer_tokens": -1}, r"base\.indexer_tokens = -1: negative"),
        ({"layout": Layout(cp=3)}, r"layout\.cp = 3: does not divide rows of 16"),
    ],
)
def test_bad_schedules_are_refused(knobs: dict[str, Any], problem: str) -> None:
    with pytest.raises(UserError, match=problem):
        pretrain(**GROWING | knobs)


def test_what_a_schedule_needs_is_asked_for_before_training(prepared: Path) -> None:
    with pytest.raises(UserError, match=r"base\.sparse_from = 32: the model has no indexers"):
        begin(prepared, pretrain(**GROWING))
    with pytest.raises(UserError, match=r"mixture\.words = 1\.0: the source has only"):
        begin(prepared, pretrain(**GROWING | {"model": V32, "seq_len": ((0, 16), (512, 10**6))}))


def test_a_schedule_is_planned_part_by_part() -> None:
    """FLOPs by hand: dense attention over rows of 16 and 32, then what indexers select."""
    stage = pretrain(model=V32, **GROWING)
    found = recipe_plan.plan_configs("r", [config_json(stage)], PlanOptions(), None, 1)["stages"]["base"]
    dense = attending_densely(V32)
    expected = 512 * training_flops(dense, 8) + 256 * training_flops(dense, 16) + 512 * training_flops(V32, 16)
    assert found["tokens_trained"] == 1280 and found["flops"] == pytest.approx(expected)
    away = recipe_plan.plan_configs("r", [config_json(stage)], PlanOptions(on="h100:1"), None, 1)["stages"]["base"]
    alone = [
        pretrain(model=model, seq_len=length, batch_size=rows, phases=(), max_tokens=tokens, name=f"s{i}")
        for i, (model, length, rows, tokens) in enumerate([(dense, 16, 4, 512), (dense, 32, 2, 256), (V32, 32, 2, 512)])
    ]
    parts = recipe_plan.plan_configs("r", map(config_json, alone), PlanOptions(on="h100:1"), None, 1)["stages"]
    for key in ("seconds", "device_hours", "flops"):
        assert away[key] == pytest.approx(sum(part[key] for part in parts.values())), key
    assert away["memory_bytes"] == max(part["memory_bytes"] for part in parts.values())


class Teaching(Way):
    """A way in which indexers learn, as in pre-training."""

    @property
    def options(self) -> ShardedOptions:
        usual = super().options
        knobs = {field.name: getattr(usual, field.name) for field in dataclasses.fields(usual)}
        return PretrainingOptions(**knobs, prepare=teach_indexers)


def _phased(trainer: Trainer, way: Way) -> list[list[float]]:
    numbers = []
    attention: tuple[Attention, ...] = ("dense", "dense", "warm-up", "warm-up", "sparse", "sparse")
    for kind, batch in zip(attention, batches(way, 6), strict=True):
        for model in trainer.models:
            set_attention(model, kind)
        numbers.append(step(trainer, batch))
        if isinstance(trainer, ReplicatedTrainer) or trainer.layout.pp == 1:  # type: ignore[attr-defined]
            numbers.append([divergence(model) for model in trainer.models])
    return numbers


def _phased_on_many(layout: Layout, way: Way, expected: list[list[float]]) -> None:
    many = on_many(layout, way)
    if layout.pp > 1:
        expected = expected[::2]
    found = _phased(many, way)
    for line in found if layout.cp > 1 else ():
        if len(line) == 1:  # of this part of the rows
            total = torch.tensor(line)
            dist.all_reduce(total)
            line[:] = (total / layout.cp).tolist()
    for line, one in zip(found, expected, strict=True):
        if len(line) > 1 or layout.dp == 1:
            assert line == pytest.approx(one, abs=1e-5)
    set_attention(many.gathered(), "dense")


@pytest.mark.slow
@pytest.mark.parametrize("config", [SPARSE_MANY, GLM_MANY, V4_MANY], ids=["V3.2", "GLM-5", "V4"])
@pytest.mark.parametrize(
    "layout", [Layout(dp=2, ep=2), Layout(pp=2, micro_batches=2), Layout(cp=2, ep=2)], ids=["fsdp", "piped", "context"]
)
@pytest.mark.parametrize("packed", [False, True], ids=["whole", "packed"])
def test_shards_follow_the_schedule(config: ModelConfig, layout: Layout, packed: bool) -> None:
    """Losses, gradient norms and divergences of one rank; indexers that rest have gradients of zero there, and none here."""
    if layout.pp > 1 and config.shared_indexers:
        pytest.skip("pipelines refuse shared indexers")
    way = Teaching(config, packed=packed)
    on_ranks(2, _phased_on_many, layout, way, _phased(one_rank(way), way))
