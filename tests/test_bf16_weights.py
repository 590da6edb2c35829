"""Weights kept in bf16 without fp32 masters: what is rounded, gradients, resuming, and losses beside those of fp32 masters."""

from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist
from torch import Tensor

from finback.checkpoint import models, store
from finback.config import UserError
from finback.kernels import native, updates
from finback.model.lora import LoRA
from finback.model.transformer import Transformer
from finback.parallel.layout import Layout
from finback.parallel.mesh import flat_gradients
from finback.stages.grpo import GRPO
from finback.stages.sft import SFT
from finback.train.loop import Loop
from finback.train.precision import use_bf16_weights
from tests import tuned
from tests.many import on_ranks
from tests.test_pretrain import begin, prepared, pretrain
from tests.toy import CONFIG, DENSE, V4, backward, toy_model
from tests.tuned import LEARNT, Tuned, begun, stopped_at

assert prepared  # a fixture
FAMILIES = {
    "mla": CONFIG,
    "gqa": replace(DENSE, tie_word_embeddings=True),
    "sparse": replace(CONFIG, index_topk=6, index_n_heads=16, index_head_dim=8),
    "compressed": V4,
}
WAYS: dict[str, dict[str, Any]] = {
    "muon": {"optimizer": "muon", "compute": "bf16"},
    "adamw": {"optimizer": "adamw", "compute": "bf16"},
}
BF16 = {"weights": "bf16", "compute": "bf16"}
TUNED = {
    "sft": Tuned(SFT, BF16),
    "sft in eight bits": Tuned(SFT, BF16 | {"moments": "int8"}),
    "grpo": Tuned(GRPO, LEARNT["grpo"].knobs | BF16),
}


def is_exact(name: str) -> bool:
    """Whether a parameter stays fp32."""
    return name in ("embed", "head.weight") or any(word in name for word in ("norm", "router"))


def test_hidden_matrices_are_rounded() -> None:
    plain, rounded = toy_model(), use_bf16_weights(toy_model())
    for (name, before), (_, after) in zip(plain.named_parameters(), rounded.named_parameters(), strict=True):
        assert after.dtype == (torch.float32 if is_exact(name) else torch.bfloat16), name
        assert torch.equal(after, before.to(after.dtype)), name


@pytest.mark.parametrize("family", FAMILIES)
def test_gradients_are_those_of_fp32_parameters_with_these_numbers(family: str) -> None:
    """Rounded to bf16 by each of two passes, and added up in fp32 in place."""
    config = FAMILIES[family]
    rounded = use_bf16_weights(Transformer(config, torch.bfloat16).initialise(0)).train()
    plain = Transformer(config, torch.bfloat16).initialise(0).train()
    plain.load_state_dict(rounded.state_dict())
    windows = torch.arange(4 * (17 + len(plain.mtp))).view(4, -1) * 7 % config.vocab_size
    flat, known = flat_gradients(list(rounded.parameters())), dict(plain.named_parameters())
    for _ in range(2):
        backward(rounded, windows)
        backward(plain, windows)
    assert flat.dtype == torch.float32 and flat.any()
    for name, p in rounded.named_parameters():
        assert p.grad is not None and p.grad.dtype == torch.float32, name
        assert p.grad.untyped_storage().data_ptr() == flat.untyped_storage().data_ptr(), name
        wanted = known[name].grad
        if wanted is None:  # an indexer, which no loss reaches here
            assert ".indexer." in name and not p.grad.any(), name
            continue
        assert (p.grad - wanted).abs().max() <= 2.0**-8 * wanted.abs().max(), name
        assert torch.equal(p.grad, wanted) or not is_exact(name), name


def ends_alike(start: Any) -> dict[str, Tensor]:
    """Seven steps at once, and with the fifth taken twice: it is lost with the process after the fourth was saved."""
    whole = stopped_at(Loop(start("whole")), 7)
    stopped_at(Loop(start("killed")), 4).advance()
    killed = stopped_at(Loop(start("killed")), 7)
    ours, theirs = (looped.trainer.model.state_dict() for looped in (killed, whole))
    assert all(torch.equal(ours[name], tensor) for name, tensor in theirs.items())
    found: dict[str, Tensor] = theirs
    return found


@pytest.mark.parametrize("way", WAYS)
def test_a_killed_run_ends_with_the_same_bits(way: str, prepared: Path) -> None:
    knobs = {"weights": "bf16", **WAYS[way]}
    state = ends_alike(lambda name: begin(prepared, pretrain(name=f"{way}-{name}", **knobs)))
    assert {n for n, t in state.items() if t.dtype == torch.bfloat16} == {n for n in state if not is_exact(n)}


@pytest.mark.parametrize("name", TUNED)
def test_killed_fine_tuning_and_rl_do_too(name: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    root = tuned.prepared(tmp_path / "runs")
    monkeypatch.setitem(LEARNT, "here", TUNED[name])
    tuned.outcome(root, "here", None, 7)  # records the answers of RL
    if (root / "here.new").is_file():
        (root / "here.new").rename(root / "here.pickle")
    state = ends_alike(lambda run_name: begun(root, "here", None, run_name))
    base = models.load(root / "base").state_dict()
    assert any(not torch.equal(tensor.float(), base[n].to(tensor.dtype).float()) for n, tensor in state.items())


def losses(root: Path, name: str, **knobs: Any) -> list[float]:
    training = begin(root, pretrain(name=name, muon_lr=2e-4, adam_lr=2e-4, phases=(), max_tokens=10**6, **knobs))
    looped = Loop(training)
    return [looped.advance()["loss"] for _ in range(60)]


@pytest.mark.parametrize("way", WAYS)
def test_losses_are_close_to_those_of_fp32_masters(way: str, prepared: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """At a learning rate whose steps are mostly smaller than half the distance of two bf16 numbers: rounded to the nearest,
    most weights would not move."""
    knobs = {**WAYS[way], "warmup_tokens": 64}
    exact = losses(prepared, f"{way}-exact", **knobs)
    ours = losses(prepared, f"{way}-ours", weights="bf16", **knobs)
    monkeypatch.setattr(native, "serves", lambda x: False)
    monkeypatch.setattr(updates, "stochastically_rounded", lambda values, key, offset=0: values.bfloat16())
    nearest = losses(prepared, f"{way}-nearest", weights="bf16", **knobs)
    learnt = exact[0] - sum(exact[-5:]) / 5
    off, lost = (abs(sum(found[-5:]) - sum(exact[-5:])) / 5 for found in (ours, nearest))
    assert learnt > 0.1 and off < 0.01 * learnt and lost > 4 * off


def _on_two(root: str) -> None:
    LEARNT["here"] = TUNED["sft"]
    trainer = stopped_at(Loop(begun(Path(root), "here", None)), 3).trainer
    for _, tensor in trainer.model.named_parameters():
        mine = tensor.detach().float()
        both = [torch.empty_like(mine) for _ in range(2)]
        dist.all_gather(both, mine)
        assert torch.equal(*both)


def test_whole_copies_on_two_ranks_stay_equal(tmp_path: Path) -> None:
    root = tuned.prepared(tmp_path / "runs")
    on_ranks(2, _on_two, str(root))


def test_the_model_is_stored_as_it_is(prepared: Path) -> None:
    training = stopped_at(Loop(begin(prepared, pretrain(name="stored", **BF16))), 2).training
    training.trainer.export(training.run, training.run.folder, training.tokenizer)
    stored = store.load(training.run.folder / "model.safetensors")[0]
    assert {t.dtype for n, t in stored.items() if not is_exact(n)} == {torch.bfloat16}
    again = models.load(training.run.folder).state_dict()
    assert all(torch.equal(again[n], t.float()) for n, t in training.trainer.model.state_dict().items())


@pytest.mark.parametrize(
    ("kind", "knobs", "words"),
    [
        (SFT, {"layout": Layout(dp=2)}, r"tuned\.layout = .*needs weights in fp32"),
        (GRPO, {"adapter": LoRA()}, r"tuned\.adapter = .*needs weights in fp32"),
        (SFT, {"qat": "mxfp4"}, r"tuned\.qat = "),
        (SFT, {"compute": "fp32"}, r"tuned\.weights = 'bf16': saves memory only if passes compute in bf16"),
        (SFT, {"compile": True}, r"tuned\.compile = True: needs weights in fp32"),
    ],
)
def test_what_needs_masters_is_refused(kind: Any, knobs: dict[str, Any], words: str) -> None:
    more = {"task": tuned.ANSWERS["task"]} if kind is GRPO else {}
    with pytest.raises(UserError, match=words):
        kind(**{"name": "tuned", "start": "base"} | BF16 | knobs | more)


def test_pretraining_refuses_an_average() -> None:
    with pytest.raises(UserError, match=r"base\.ema_decay = 0\.9: needs weights in fp32"):
        pretrain(**BF16, ema_decay=0.9)
