"""Compiled blocks: the numbers of uncompiled ones, one compilation for all blocks, and only training is compiled."""

import copy
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
import torch._dynamo.utils as dynamo

from finback.checkpoint import store
from finback.config import UserError
from finback.data.messages import IGNORE
from finback.model.config import ModelConfig
from finback.model.dsa_training import divergence, teach_indexers
from finback.model.recompute import Policy, use_recompute
from finback.model.transformer import Block, Transformer
from finback.runs.folder import Interrupted
from finback.train import compiling
from finback.train.batch import Batch
from finback.train.loss import Losses
from tests.many import SPARSE_MANY, V4_MANY
from tests.test_pretrain import begin, prepared, pretrain, trained
from tests.toy import CONFIG, backward, backward_batch, toy_model

__all__ = ["prepared"]  # a fixture

# torch raises it itself while it traces
pytestmark = pytest.mark.filterwarnings("ignore:The .grad attribute of a Tensor:UserWarning")

TOKENS = torch.randint(CONFIG.vocab_size, (4, 16 + 2), generator=torch.Generator().manual_seed(1))


@pytest.fixture(autouse=True, scope="module")
def compiler() -> None:
    """Checked here and not during collection, since the check takes seconds."""
    if compiling.why_not():
        pytest.skip("torch.compile does not work here")


def two(compute: torch.dtype = torch.float32, config: ModelConfig = CONFIG) -> tuple[Transformer, Transformer]:
    """A compiled model and the same model uncompiled; indexers learn."""
    plain = teach_indexers(Transformer(config, compute).initialise(3).train())
    return compiling.compile_blocks(copy.deepcopy(plain)), plain


def gradients(model: Transformer) -> torch.Tensor:
    return torch.cat([p.grad.flatten() for p in model.parameters() if p.grad is not None])


def graphs() -> int:
    """How many graphs this process has compiled."""
    return int(dynamo.counters["stats"]["unique_graphs"])


def rows() -> Batch:
    """Rows of two documents; the last row ends in padding."""
    documents = torch.zeros_like(TOKENS)
    documents[:, 7:] = 1
    real = torch.ones_like(TOKENS, dtype=torch.bool)
    real[-1, 12:] = False
    follows = real[:, 1:] & (documents[:, 1:] == documents[:, :-1])
    return Batch(TOKENS[:, :-1], TOKENS[:, 1:].masked_fill(~follows, IGNORE), 16, real[:, :-1], documents[:, :-1])


def test_the_same_loss_gradient_and_load(policy: Policy = "none") -> None:
    compiled, plain = two()
    for model in (compiled, plain):
        use_recompute(model, policy)
    losses = [backward(model, TOKENS, 0.3, 1e-2) for model in (compiled, plain)]
    assert_near(*losses)
    a, b = (gradients(model) for model in (compiled, plain))
    assert ((a - b).norm() / b.norm()).item() < 1e-5
    for ours, theirs in zip(compiled.routers(), plain.routers(), strict=True):
        assert torch.equal(ours.load, theirs.load) and ours.load.sum() > 0


def test_the_same_where_blocks_are_recomputed() -> None:
    test_the_same_loss_gradient_and_load("block")


@pytest.mark.slow
@pytest.mark.parametrize("policy", ["none", "block"])
@pytest.mark.parametrize("config", [SPARSE_MANY, V4_MANY], ids=["V3.2", "V4"])
def test_the_same_around_sparse_attention(config: ModelConfig, policy: Policy) -> None:
    """Attention itself is not compiled; routers, feed-forwards and V4's streams are."""
    models = two(config=config)
    kinds = {compiling.CompiledMoE, compiling.CompiledHyperConnection} if config.hc_mult else {compiling.CompiledMoE}
    assert all(any(isinstance(m, kind) for m in models[0].modules()) for kind in kinds)
    assert_near(*(backward(use_recompute(model, policy), TOKENS, 0.3, 1e-2) for model in models))
    assert divergence(models[0]) == pytest.approx(divergence(models[1]), rel=1e-5) and divergence(models[0]) > 0
    a, b = (gradients(model) for model in models)
    assert ((a - b).norm() / b.norm()).item() < 1e-5


@pytest.mark.slow
def test_the_same_with_documents_and_padding() -> None:
    compiled, plain = two()
    losses = [backward_batch(model, rows(), rows().counts(1), 0.3, 1e-2) for model in (compiled, plain)]
    assert_near(*losses)
    a, b = (gradients(model) for model in (compiled, plain))
    assert ((a - b).norm() / b.norm()).item() < 1e-5


def assert_near(ours: Losses, theirs: Losses) -> None:
    for name in ("main", "mtp", "balance"):
        assert getattr(ours, name).item() == pytest.approx(getattr(theirs, name).item(), rel=1e-5)


@pytest.mark.slow
def test_bf16_rounds_no_worse() -> None:
    truth = Transformer(CONFIG).initialise(3).train()
    compiled, plain = two(torch.bfloat16)
    for model in (truth, compiled, plain):
        backward(model, TOKENS, 0.3, 1e-2)
    exact = gradients(truth)
    off = [((gradients(model) - exact).norm() / exact.norm()).item() for model in (compiled, plain)]
    assert off[0] < 1.25 * off[1] < 0.25


@pytest.mark.slow
def test_one_compilation_for_all_blocks_steps_and_models() -> None:
    compiled, _ = two()
    backward(compiled, TOKENS, 0.3, 1e-2)
    known = graphs()
    for _ in range(3):
        backward(compiled, TOKENS, 0.3, 1e-2)
    backward(two()[0], TOKENS, 0.3, 1e-2)
    assert graphs() == known
    for count in (3, 2, 1):  # a growing number of rows does not recompile for each size
        backward(compiled, TOKENS[:count], 0.3, 1e-2)
    assert graphs() - known <= 10
    known = graphs()
    backward(compiled, TOKENS.repeat(2, 1)[:7], 0.3, 1e-2)
    assert graphs() == known


def test_only_training_is_compiled() -> None:
    compiled, plain = two()
    known = graphs()
    with torch.no_grad():
        for length in (5, 9, 13):
            assert torch.equal(compiled(TOKENS[:, :length]), plain(TOKENS[:, :length]))
    assert graphs() == known


def test_a_compiled_run_goes_on_with_the_same_bits(prepared: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    _, whole, folder = trained(prepared, "compiled", compile=True)
    loop = begin(prepared, pretrain(name="compiled_twice", compile=True)).loop()
    monkeypatch.setattr(loop.run, "check_stop", lambda: loop.step == 8)
    with pytest.raises(Interrupted):
        loop.train()
    again, _, other = trained(prepared, "compiled_twice", compile=True)
    a, b = (store.load(each / "model.safetensors")[0] for each in (folder, other))
    assert all(torch.equal(a[name], b[name]) for name in a)
    assert again["tokens"] == 1280
    _, plain, _ = trained(prepared, "not_compiled")
    assert [r["loss"] for r in whole] == pytest.approx([r["loss"] for r in plain], rel=1e-4)


@pytest.mark.parametrize(
    ("knobs", "words"), [({"compute": "fp8"}, "base.compute"), ({"recompute": "attention"}, "base.recompute")]
)
def test_what_cannot_be_compiled_is_named(knobs: dict[str, Any], words: str) -> None:
    with pytest.raises(UserError, match=words):
        pretrain(compile=True, **knobs)


def test_without_a_compiler_it_says_so(prepared: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(compiling, "why_not", lambda: "no g++ here")
    with pytest.raises(UserError, match=r"base\.compile .*no g\+\+ here.*\n?.*Install g\+\+"):
        begin(prepared, pretrain(compile=True))
    assert type(toy_model().blocks[0]) is Block


@pytest.mark.slow
def test_why_not_names_what_is_missing(tmp_path: Path) -> None:
    """Runs in a separate process, since torch remembers a compiler that it has found."""
    code = "from finback.train.compiling import why_not; print(why_not())"
    lacking = os.environ | {
        "CXX": "/nowhere/g++",
        "PATH": str(tmp_path),
        "TORCHINDUCTOR_CACHE_DIR": str(tmp_path / "compiled"),
    }
    found = subprocess.run([sys.executable, "-c", code], env=lacking, capture_output=True, text=True)
    assert found.returncode == 0 and found.stdout.strip()
