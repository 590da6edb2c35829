"""SFT and GRPO with compiled blocks: the losses of uncompiled ones, and an error where nothing can be compiled."""

from pathlib import Path

import pytest

from finback.config import UserError
from finback.model.lora import LoRA
from finback.stages.grpo import GRPO
from finback.stages.sft import SFT
from finback.tasks.math import Chains
from finback.train import compiling
from tests.test_grpo import reinforcement, steps, with_varied_rewards
from tests.test_tuning import stage_folder, tune, write_traces

# torch raises it itself while it traces
pytestmark = pytest.mark.filterwarnings("ignore:The .grad attribute of a Tensor:UserWarning")


def begun(root: Path) -> Path:
    root.mkdir()
    stage_folder(root, 1, "base")
    write_traces(root)
    return root


@pytest.mark.slow
def test_compiled_blocks_fine_tune_with_the_same_losses(tmp_path: Path) -> None:
    if compiling.why_not():
        pytest.skip("torch.compile does not work here")
    losses = []
    for compiles in (True, False):
        looped = tune(begun(tmp_path / str(compiles)), compile=compiles).loop()
        losses.append([looped.advance()["loss"] for _ in range(3)])
    assert losses[0] == pytest.approx(losses[1], abs=1e-5)


@pytest.mark.slow
def test_compiled_blocks_learn_from_rewards_with_the_same_losses(tmp_path: Path) -> None:
    """Uses a learning rate at which both sample the same answers; the gap shows that trainer and engine still agree."""
    if compiling.why_not():
        pytest.skip("torch.compile does not work here")
    found = []
    for compiles in (True, False):
        folder = tmp_path / str(compiles)
        folder.mkdir()
        found.append(steps(with_varied_rewards(reinforcement(folder, compile=compiles, lr=1e-5)), 3))
    for ours, theirs in zip(*found, strict=True):
        assert ours["loss"] == pytest.approx(theirs["loss"], abs=1e-5)
        assert ours["grad_norm"] == pytest.approx(theirs["grad_norm"], rel=1e-4)
        assert ours["gap_mean"] < 1e-4


def test_without_a_compiler_the_stage_says_so(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(compiling, "why_not", lambda: "no g++")
    with pytest.raises(UserError, match=r"tuned\.compile = True.*does not work here: no g\+\+"):
        tune(begun(tmp_path / "sft"), compile=True)
    (tmp_path / "grpo").mkdir()
    with pytest.raises(UserError, match=r"zero\.compile = True.*does not work here"):
        reinforcement(tmp_path / "grpo", compile=True)


def test_what_cannot_be_compiled_is_refused() -> None:
    with pytest.raises(UserError, match=r"a\.recompute.*cannot be compiled"):
        SFT(name="a", start="base", traces=("kept",), compile=True, recompute="attention")
    with pytest.raises(UserError, match=r"a\.compile.*all weights"):
        GRPO(name="a", start="base", task=Chains(2, 3), compile=True, adapter=LoRA())
