"""Stages that train an adapter: what they train, save and write; adapters in files, and the base they belong to."""

import json
import shutil
from dataclasses import replace
from pathlib import Path

import pytest
import torch

from finback.checkpoint import models, store
from finback.checkpoint.export import export
from finback.config import UserError
from finback.model.lora import AdaptedTransformer, LoRA, adapter_parameters
from finback.model.transformer import Transformer
from finback.runs.files import read_lines
from finback.runs.recipe import Recipe
from finback.stages.distill import Distill
from finback.stages.sft import SFT
from finback.tasks.math import Chains
from finback.train import loop
from finback.train.grpo_loss import Objective
from tests.test_grpo import reinforcement, step, steps, with_varied_rewards
from tests.test_lora import base_of, logits
from tests.test_tuning import tune

EXACT = LoRA(rank=4, alpha=8.0, base="fp32")
FILES = ("adapter_config.json", "adapter_model.safetensors")


def test_sft_learns_an_adapter_and_writes_it_alone(tmp_path: Path) -> None:
    (tmp_path / "recipe.json").write_text("{}")
    t = tune(tmp_path, adapter=replace(EXACT, base="bf16"), lr=2e-2, epochs=4)
    model = t.trainer.model
    before = {n: p.clone() for n, p in model.state_dict().items()}
    results = loop.run(t)
    losses = [r["loss"] for r in read_lines(tmp_path / "tuned/metrics.jsonl")]
    assert losses[-1] < 0.7 * losses[0]
    changed = {n for n, p in model.state_dict().items() if not torch.equal(p, before[n])}
    assert changed == {n for n, _ in adapter_parameters(model)}, "the whole adapter must change, and nothing else"
    written = {p.name for p in (tmp_path / "tuned").iterdir()}
    assert {*FILES, "model.json", "tokenizer.json"} <= written and "model.safetensors" not in written
    newest = store.load_newest(tmp_path / "tuned")
    assert newest is not None and newest[0] == results["steps"]
    kept = {n.removeprefix("model.").removeprefix("adam.").rpartition("adapter.")[1] for n in newest[1]}
    assert kept == {"adapter."} or all("adapter" in n for n in newest[1]), (
        "a checkpoint holds the adapter and its moments"
    )
    # a moved run still finds its stages
    shutil.copytree(tmp_path, tmp_path / "moved", ignore=shutil.ignore_patterns("moved"))
    found = models.load(tmp_path / "moved/tuned")
    assert type(found) is Transformer and all(p.dtype == torch.float32 for p in found.parameters())
    torch.testing.assert_close(logits(found.eval()), logits(model.eval()), atol=1e-4, rtol=0)
    assert json.loads((tmp_path / "tuned/adapter_config.json").read_text())["base_model_name_or_path"] == "base"


def test_an_interrupted_adapter_ends_with_the_same_bytes(tmp_path: Path) -> None:
    (tmp_path / "a").mkdir(), (tmp_path / "b").mkdir()
    loop.run(tune(tmp_path / "a", adapter=LoRA(rank=4, base="nf4"), recompute="none"))  # bit-identical, in more memory
    two = tune(tmp_path / "b", adapter=LoRA(rank=4, base="nf4")).loop()
    for _ in range(3):
        two.advance()
    two.checkpoint()
    two.advance()  # lost
    loop.run(tune(tmp_path / "b", adapter=LoRA(rank=4, base="nf4")))
    one, other = ((tmp_path / each / "tuned" / FILES[1]).read_bytes() for each in "ab")
    assert one == other


def test_an_adapter_goes_on_learning_or_is_merged_where_all_weights_learn(tmp_path: Path) -> None:
    first = tune(tmp_path, adapter=EXACT, lr=1e-2)
    loop.run(first)
    (tmp_path / "tuned/manifest.json").write_text("{}")
    again = tune(tmp_path, name="again", start="tuned", adapter=EXACT)
    for (name, a), (_, b) in zip(
        adapter_parameters(first.trainer.model), adapter_parameters(again.trainer.model), strict=True
    ):
        assert torch.equal(a, b), name
    assert isinstance(again.trainer.model, AdaptedTransformer)
    assert again.trainer.model.base == str(tmp_path / "base")
    with pytest.raises(UserError, match=r"adapter = 'rank=8.*has rank=4, alpha=8, rs=False.*export"):
        tune(tmp_path, name="wider", start="tuned", adapter=replace(EXACT, rank=8))
    whole = tune(tmp_path, name="whole", start="tuned")
    assert not isinstance(whole.trainer.model, AdaptedTransformer)
    torch.testing.assert_close(
        logits(whole.trainer.model.eval()), logits(first.trainer.model.eval()), atol=1e-4, rtol=0
    )
    named = tune(tmp_path, name="named", start=f"{tmp_path}/base+{tmp_path}/tuned")
    assert torch.equal(logits(named.trainer.model.eval()), logits(whole.trainer.model.eval()))
    with pytest.raises(UserError, match=r"base = '.*other'.*its weights differ from those"):
        models.load(Path(f"{tmp_path}/other+{tmp_path}/tuned"))


def test_recipes_take_base_and_adapter(tmp_path: Path) -> None:
    with pytest.raises(UserError, match=r"b input = 'nowhere'"):
        Recipe("r", (SFT(name="a", start=str(base_folder(tmp_path))), SFT(name="b", start="a+nowhere")))
    assert SFT(name="b", start="x+y").inputs() == ("x", "y")
    with pytest.raises(UserError, match=r"a\.bias_speed = 0\.1"):
        SFT(name="a", start="b", adapter=LoRA(), bias_speed=0.1)


def base_folder(root: Path) -> Path:
    """A model in Hugging Face's files."""
    if not (root / "hf").exists():
        export(base_of("gqa"), root / "hf", "fp32")
    return root / "hf"


def test_distillation_learns_an_adapter(tmp_path: Path) -> None:
    t = tune(tmp_path, Distill, teacher="other", adapter=EXACT, hard=0.5, mtp_weight=0.3)
    assert t.loop().advance()["grad_norm"] > 0 and t.depths == 0
    on_policy = {"traces": (), "task": Chains(2, 3), "prompts_per_step": 2, "max_tokens": 6, "steps": 1}
    assert tune(tmp_path, Distill, teacher="other", adapter=EXACT, **on_policy).loop().advance()["grad_norm"] > 0


def test_the_reference_of_an_adapter_is_its_base(tmp_path: Path) -> None:
    knobs = {"adapter": EXACT, "objective": Objective(beta=0.1), "lr": 1e-2}
    r = with_varied_rewards(reinforcement(tmp_path, **knobs))
    looped = r.loop()
    first = looped.advance()
    assert first["kl"] == pytest.approx(0, abs=1e-7) and first["gap_max"] <= 1e-4
    second = looped.advance()
    assert second["kl"] > 1e-5 and second["gap_max"] <= 1e-4
    base = models.load(tmp_path / "base").eval()
    r.model.eval()
    assert r.reference is not None
    with r.reference.asked() as model:
        torch.testing.assert_close(logits(model), logits(base), atol=1e-5, rtol=0)
    learnt = logits(r.model)
    assert (learnt - logits(base)).abs().max() > 1e-3 and not any(
        n.startswith("reference") for n in r.reference.state()
    )
    r.reference.refresh(r.model)
    with torch.no_grad():
        for _, p in adapter_parameters(r.model):
            p.add_(0.1)
    with r.reference.asked() as model:
        assert torch.equal(logits(model), learnt)
    assert not torch.equal(logits(r.model), learnt)


def test_rl_of_an_adapter_goes_on_from_its_checkpoint(tmp_path: Path) -> None:
    (tmp_path / "a").mkdir(), (tmp_path / "b").mkdir()
    knobs = {"adapter": EXACT, "objective": Objective(beta=0.1), "reference_steps": 1, "lr": 1e-2}
    one = reinforcement(tmp_path / "a", **knobs)
    steps(one, 3)
    two = reinforcement(tmp_path / "b", **knobs).loop()
    two.advance(), two.advance()
    two.checkpoint()
    three = reinforcement(tmp_path / "b", **knobs)
    again = three.loop()
    state = again.restore()
    assert state is not None
    three.load_state(state)
    again.advance()
    for (name, a), (_, b) in zip(adapter_parameters(one.model), adapter_parameters(three.model), strict=True):
        assert torch.equal(a, b), name


def test_default_rate_of_an_adapter(tmp_path: Path) -> None:
    assert reinforcement(tmp_path, adapter=EXACT).stopping.peak_lr == pytest.approx(3e-3)
    assert step(reinforcement(tmp_path, adapter=LoRA(rank=2, base="int8")))["gap_max"] <= 1e-4
