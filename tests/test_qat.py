"""Quantization-aware training in FP4: what passes compute with, where gradients go, and what engines and files get."""

import dataclasses
from functools import partial
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
import torch.distributed as dist
from torch import Tensor

from finback.checkpoint import models, store
from finback.checkpoint.export import export
from finback.config import UserError
from finback.engine.engine import EngineConfig
from finback.kernels import fp8
from finback.kernels.formats import from_mxfp4, mxfp4, round_mxfp4
from finback.kernels.fp8_products import Emulated
from finback.model.config import ModelConfig
from finback.model.dsa_training import teach_indexers
from finback.model.fp4 import is_expert_stack, is_fp4, round_indexers, use_fp4
from finback.model.lora import LoRA
from finback.model.rounding import RoundedIndexer, rounded
from finback.model.transformer import Transformer
from finback.parallel.layout import Layout
from finback.parallel.mesh import World
from finback.parallel.served_weights import ServedWeights
from finback.rollouts.generation import PolicyModel
from finback.rollouts.here import LiveRollouts
from finback.runs.files import METRICS, read_lines
from finback.runs.folder import StageRun
from finback.stages.grpo import GRPO
from finback.stages.sft import SFT
from finback.tasks.math import Chains
from finback.train import loop
from finback.train.precision import use_expert_kernel, use_fp8
from tests.many import MANY, V4_MANY, Way, check, continued, on_many, on_one, on_ranks, one_rank
from tests.test_pretrain import begin, prepared, pretrain, trained
from tests.toy import CONFIG, V4, backward
from tests.tuned import SPREAD
from tests.tuned import prepared as tuned_base

__all__ = ["prepared"]

WIDE = dataclasses.replace(CONFIG, moe_intermediate_size=32)
WIDE_V4 = dataclasses.replace(
    V4, vocab_size=320, moe_intermediate_size=32, index_head_dim=32, num_nextn_predict_layers=1
)


def stacks(state: dict[str, Tensor]) -> dict[str, Tensor]:
    """The routed experts' matrices of a model."""
    found = {name: tensor for name, tensor in state.items() if is_expert_stack(name, tuple(tensor.shape))}
    assert found
    return found


def windows(config: ModelConfig) -> Tensor:
    """Rows of a step, with labels for the loss and for that of MTP."""
    width = 25 + config.num_nextn_predict_layers
    return torch.randint(0, config.vocab_size, (3, width), generator=torch.Generator().manual_seed(1))


def packed_and_back(x: Tensor) -> Tensor:
    return from_mxfp4(*mxfp4(x), torch.float32)


def rounded_twin(model: Transformer) -> Transformer:
    """A plain model with the numbers that an FP4 file gives back, and with quantized indexers."""
    twin = Transformer(model.config, model.compute).train(model.training)
    state = model.state_dict()
    twin.load_state_dict(state | {name: packed_and_back(t) for name, t in stacks(state).items()})
    return round_indexers(twin)


def rounds_indexers(model: Transformer) -> bool:
    return any(isinstance(m, RoundedIndexer) for m in model.modules())


@pytest.mark.parametrize("config", [WIDE, WIDE_V4], ids=["v3", "v4"])
def test_passes_and_gradients_are_those_of_the_numbers_in_files(config: ModelConfig) -> None:
    """To the bit: losses, and the gradients that reach the masters as if without rounding (straight-through)."""
    model = Transformer(config).initialise(0).train()
    twin, before = rounded_twin(model), {n: p.clone() for n, p in model.named_parameters()}
    losses = [backward(one, windows(config)) for one in (use_fp4(model), twin)]
    assert is_fp4(model) and not is_fp4(twin) and torch.equal(losses[0].main, losses[1].main)
    for (name, mine), theirs in zip(model.named_parameters(), twin.parameters(), strict=True):
        assert torch.equal(mine, before[name])
        if mine.grad is None:
            assert theirs.grad is None and ".indexer." in name
        else:
            assert torch.equal(mine.grad, theirs.grad), name
    assert any(not torch.equal(before[n], t) for n, t in stacks(twin.state_dict()).items())


def test_a_straight_through_gradient_by_hand() -> None:
    x = torch.tensor([[0.3, -5.1, 2.6, 0.0] * 8], requires_grad=True)
    y = rounded(x)
    assert y.detach().flatten()[:4].tolist() == [0.5, -6.0, 3.0, 0.0]  # the factor is 1, since 5.1 / 6 is below it
    (y * torch.arange(32.0)).sum().backward()
    assert x.grad is not None and torch.equal(x.grad, torch.arange(32.0)[None])


def test_indexers_scores_are_a_plain_reimplementation() -> None:
    """Queries and keys through a signed Hadamard matrix, then blocks of 32 in FP4; gradients reach both."""
    generator, width = torch.Generator().manual_seed(0), 64
    query, key = torch.randn(1, 3, 2, width, generator=generator), torch.randn(1, 5, width, generator=generator)
    weight = torch.randn(1, 3, 2, generator=generator)
    signs = torch.tensor([[(-1.0) ** (i & j).bit_count() for j in range(width)] for i in range(width)])
    q, k = (packed_and_back(x @ (signs * width**-0.5)) for x in (query, key))
    expected = torch.zeros(1, 3, 5)
    for t in range(3):
        for s in range(5):
            expected[0, t, s] = sum(weight[0, t, j] * (q[0, t, j] @ k[0, s]).relu() for j in range(2))
    query.requires_grad_(True)
    key.requires_grad_(True)
    found = RoundedIndexer.scores(query, weight, key)
    torch.testing.assert_close(found, expected, atol=1e-5, rtol=0)
    plain = (weight[..., None] * torch.einsum("btje,bse->btjs", query, key).relu()).sum(2)
    assert 0.01 < (found - plain).abs().max() / plain.abs().max() < 0.2  # four bits make a difference
    found.sum().backward()
    assert query.grad is not None and key.grad is not None and query.grad.any() and key.grad.any()


def test_v4s_indexers_are_rounded_where_they_pick_and_where_they_learn() -> None:
    model = teach_indexers(use_fp4(Transformer(WIDE_V4).initialise(0))).train()
    found = [m for m in model.modules() if isinstance(m, RoundedIndexer)]
    assert len(found) == 1  # that of the only CSA layer
    tokens = torch.randint(0, 50, (1, 40), generator=torch.Generator().manual_seed(0))
    seen: list[Tensor] = []
    plain = RoundedIndexer.scores
    found[0].scores = lambda *given: seen.append(plain(*given)) or seen[-1]  # type: ignore[method-assign, func-returns-value]
    model(tokens)
    assert any(scores.requires_grad for scores in seen) and any(not scores.requires_grad for scores in seen)


def test_fp8_takes_the_rounded_weights_as_they_are() -> None:
    """With block factors that are powers of two FP8 keeps FP4's numbers exactly (V4); V3's factors round them."""
    weight = round_mxfp4(torch.randn(256, 256, generator=torch.Generator().manual_seed(0)))
    assert torch.equal(Emulated().blocks(weight, True)[0], weight)
    assert not torch.equal(Emulated().blocks(weight)[0], weight)
    assert torch.equal(fp8.dequantize(*fp8.quantize(weight, True), torch.float32), weight)
    model = use_fp4(use_fp8(Transformer(WIDE, torch.float32).initialise(0))).train()
    backward(model, windows(WIDE))
    twin = use_fp8(rounded_twin(Transformer(WIDE, torch.float32).initialise(0))).train()
    for module in twin.modules():
        form = vars(module).get("experts")
        if isinstance(form, partial):
            form.keywords["numerics"] = dataclasses.replace(form.keywords["numerics"], weight_power_of_two=True)
    backward(twin, windows(WIDE))
    assert all(torch.equal(a.grad, b.grad) for a, b in zip(model.parameters(), twin.parameters(), strict=True))


def test_what_a_stage_writes_is_what_it_computed_with(prepared: Path, tmp_path: Path) -> None:
    """Checkpoints have the masters, the folder has the rounded numbers, and an FP4 export returns these to the bit."""
    training = begin(prepared, pretrain(name="fp4", model=WIDE_V4, qat="mxfp4", ema_decay=0.5))
    loop.run(training)
    folder = training.run.folder
    found = store.load_newest(folder, print)
    assert found is not None
    masters, written = found[1], stacks(models.load(folder).state_dict())
    for name, tensor in written.items():
        assert torch.equal(tensor, packed_and_back(masters[f"model.{name}"]))
        assert not torch.equal(tensor, masters[f"model.{name}"])
    assert all(torch.equal(t, round_mxfp4(t)) for t in stacks(models.load(folder / "average").state_dict()).values())
    export(models.load(folder), tmp_path / "out", "fp8")
    exported = models.load(tmp_path / "out")
    again = exported.state_dict()
    assert all(torch.equal(again[name].float(), tensor) for name, tensor in written.items())
    assert all(rounds_indexers(m) and m.config.index_fp4 for m in (models.load(folder), exported))
    # select with rounded scores, as the stage's own passes do
    tokens = torch.randint(0, 320, (2, 60), generator=torch.Generator().manual_seed(2))
    with torch.no_grad():
        found, mine = (m.eval()(tokens) for m in (models.load(folder), training.trainer.gathered()))
        plain = Transformer(dataclasses.replace(exported.config, index_fp4=False)).eval()
        plain.load_state_dict(models.load(folder).state_dict())
        assert torch.equal(found, mine) and not torch.equal(found, plain(tokens))
    plain = models.load(trained(prepared, "plain", model=WIDE_V4)[2])
    other = stacks(plain.state_dict())
    assert not rounds_indexers(plain) and any(not torch.equal(t, round_mxfp4(t)) for t in other.values())


def test_rl_generates_with_the_numbers_that_it_learns_with(tmp_path: Path) -> None:
    """Answers come from a copy with rounded weights, renewed after each update; trainer and engine agree."""
    root = tuned_base(tmp_path / "runs", dataclasses.replace(SPREAD, moe_intermediate_size=32))
    stage = GRPO(
        name="zero",
        start="base",
        task=Chains(2, 3),
        prompts_per_step=2,
        num_generations=4,
        max_tokens=8,
        lr=1e-3,
        steps=2,
        routing_replay=True,
        qat="mxfp4",
    )
    run = StageRun(root, "zero", 0, World(), quiet=True)
    run.folder.mkdir()
    stage.run(run)
    assert all(line["gap_max"] < 1e-4 for line in read_lines(run.folder / METRICS))
    assert all(torch.equal(t, round_mxfp4(t)) for t in stacks(models.load(run.folder).state_dict()).values())


def test_a_copy_follows_its_masters() -> None:
    trainer = one_rank(Way(dataclasses.replace(MANY, moe_intermediate_size=32), qat="mxfp4"))
    served = trainer.served()
    first = {n: t.clone() for n, t in served().state_dict().items()}
    continued(trainer, Way(trainer.model.config, qat="mxfp4"), 0, 1)
    assert trainer.served() is served and served() is trainer.gathered()
    second, masters = served().state_dict(), trainer.model.state_dict()
    assert all(torch.equal(second[n], packed_and_back(masters[n])) for n in stacks(second))
    assert any(not torch.equal(first[n], second[n]) for n in stacks(second))
    assert all(torch.equal(second[n], masters[n]) for n in masters if n not in stacks(second))


def test_an_engine_beside_training_rounds_its_indexers_too() -> None:
    """The engine that keeps generating while weights change."""
    config = dataclasses.replace(WIDE_V4, num_nextn_predict_layers=0)
    nothing: Any = SimpleNamespace(stops=())
    for model in (use_fp4(Transformer(config)), Transformer(config)):
        weights = ServedWeights(model)
        policy = PolicyModel(weights, model.config, nothing, nothing, in_flight="continue")
        rollouts = LiveRollouts(policy, EngineConfig())
        engine = rollouts.live.engine.model
        rollouts.close()
        assert rounds_indexers(engine) == is_fp4(model)


WAYS = {
    "v3": Way(dataclasses.replace(MANY, moe_intermediate_size=32), qat="mxfp4", looks=(1,)),
    "v4": Way(dataclasses.replace(V4_MANY, moe_intermediate_size=32, index_topk=2), qat="mxfp4"),
}


@pytest.mark.parametrize("name", WAYS)
def test_two_ranks_round_as_one_does(name: str, tmp_path: Path) -> None:
    numbers, masters = on_one(WAYS[name], 3)
    torch.save((numbers, masters), tmp_path / "one.pt")
    on_ranks(2, _on_layout, Layout(dp=2, ep=2), WAYS[name], str(tmp_path))


def _on_layout(layout: Layout, way: Way, out: str) -> None:
    """On every rank: three steps, then the model as engines and files get it."""
    many = on_many(layout, way)
    found = continued(many, way, 0, 3)
    numbers, masters = torch.load(Path(out) / "one.pt", weights_only=False)
    check(found, numbers)
    gathered = many.gathered().state_dict()
    for tensor in stacks(gathered).values():
        assert torch.equal(tensor, round_mxfp4(tensor))
    for key, tensor in stacks(gathered).items():  # except masters at the midpoint of two numbers
        assert (tensor != round_mxfp4(masters[key])).float().mean() < 1e-3
    nothing: Any = SimpleNamespace(save=lambda folder: None, folder=Path(out))
    many.export(nothing, Path(out) / "written", nothing)
    dist.barrier()
    written = models.load(Path(out) / "written").state_dict()
    assert rounds_indexers(many.gathered()) == (way.config.attention == "compressed")
    assert all(torch.equal(written[key], tensor) for key, tensor in gathered.items())


def test_what_cannot_be_rounded_is_named(prepared: Path) -> None:
    sft: dict[str, Any] = {"name": "sft", "start": "base", "traces": ("kept",), "qat": "mxfp4"}
    for make, words in (
        (lambda: SFT(**sft, adapter=LoRA()), r"sft\.qat"),
        (lambda: SFT(**sft, layout=Layout(dp=2, gather="bf16")), r"sft\.qat"),
        (lambda: pretrain(qat="mxfp4", layout=Layout(dp=2, gather="bf16")), r"base\.qat"),
        (lambda: trained(prepared, "narrow", model=CONFIG, qat="mxfp4"), r"narrow\.qat.*moe_intermediate_size"),
        (
            lambda: trained(prepared, "odd", model=dataclasses.replace(WIDE_V4, index_head_dim=24), qat="mxfp4"),
            "Hadamard",
        ),
    ):
        with pytest.raises(UserError, match=words):
            make()


def test_grouped_products_are_rounded_too() -> None:
    """Whatever kernel was set before."""
    models_ = [Transformer(WIDE).initialise(0).train() for _ in range(2)]
    use_expert_kernel(models_[0], "grouped_mm")
    for model in models_:
        backward(use_fp4(model), windows(WIDE))
    for mine, theirs in zip(*(m.parameters() for m in models_), strict=True):
        assert mine.grad is None or torch.allclose(mine.grad, theirs.grad, atol=1e-5)
