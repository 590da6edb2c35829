"""GRPO's two formulas worked by hand, and the machinery around them on a toy model."""

import math
from pathlib import Path

import pytest
import torch

from finback.checkpoint import model as models
from finback.checkpoint.export import export
from finback.config import UserError
from finback.data import tokenizer
from finback.parallel.mesh import World
from finback.report import outgoing
from finback.run import StageRun
from finback.stages.grpo import GRPO, _Reinforcement, advantages, policy_loss
from finback.stages.rollout import Rollout
from finback.tasks.gym import Gym
from finback.tasks.math import Chains
from tests.toy import WORDS, toy_model


def test_advantages_by_hand() -> None:
    rewards = torch.tensor([[1.0, 0.0, 0.0, 1.0], [0.1, 0.1, 0.1, 0.1], [1.0, 0.0, 0.0, 0.0]])
    a = advantages(rewards)
    torch.testing.assert_close(a[0], torch.tensor([1.0, -1.0, -1.0, 1.0]))
    assert (a[1] == 0).all(), "a group without differences says nothing"
    std = math.sqrt(0.75 * 0.25)
    torch.testing.assert_close(a[2], torch.tensor([0.75 / std] + [-0.25 / std] * 3))
    torch.testing.assert_close(
        advantages(rewards, normalise=False)[2], torch.tensor([0.75, -0.25, -0.25, -0.25])
    )


def test_policy_loss_by_hand() -> None:
    """ρ = 1.5 and 0.5 at ε = 0.2: the clip acts where it would otherwise pay to go further, and only there."""
    old = torch.zeros(2, 2)
    new = torch.tensor([[1.5, 0.5], [1.5, 0.5]]).log().requires_grad_()
    mask = torch.ones(2, 2)
    loss, clipped = policy_loss(new, old, torch.tensor([2.0, -1.0]), mask, clip=0.2)
    # A = 2: min(3, 2.4) and min(1, 1.6); A = -1: min(-1.5, -1.2) and min(-0.5, -0.8)
    assert loss.item() == pytest.approx(-(2.4 + 1.0 - 1.5 - 0.8))
    assert clipped.item() == 2
    loss.backward()
    torch.testing.assert_close(new.grad, torch.tensor([[0.0, -1.0], [1.5, 0.0]]))
    masked, _ = policy_loss(
        new.detach(), old, torch.tensor([2.0, -1.0]), torch.tensor([[1.0, 0.0], [0.0, 0.0]]), 0.2
    )
    assert masked.item() == pytest.approx(-2.4)


def reinforcement(folder: Path, **knobs: object) -> _Reinforcement:
    """A GRPO run on a random toy model that was saved as a finished stage."""
    base = folder / "base"
    if not base.exists():
        base.mkdir()
        tokenizer.train([WORDS], 320, base / "tokenizer.json")
        models.save(base, toy_model(1))
        (base / "manifest.json").write_text("{}")
    run = StageRun(folder, "zero", 0, World(), quiet=True)
    run.folder.mkdir(exist_ok=True)
    settings = {"start": "base", "steps": 3, "prompts": 4, "group": 4, "max_tokens": 10, "task": Chains(2, 3)}
    return _Reinforcement(GRPO(name="zero", **settings | knobs), run)


class Parity:
    """A reward that differs within groups although a random model answers nothing right."""

    def __init__(self) -> None:
        self.calls = 0

    def __call__(self, verdict: object) -> float:
        self.calls += 1
        return float(self.calls % 3 == 0)


def with_varied_rewards(r: _Reinforcement) -> _Reinforcement:
    object.__setattr__(r.stage, "reward", Parity())
    return r


def test_gap_between_trainer_and_engine_is_flat_at_zero_learning_rate(tmp_path: Path) -> None:
    r = with_varied_rewards(reinforcement(tmp_path, lr=0.0))
    before = {n: t.clone() for n, t in r.model.state_dict().items()}
    metrics = [r._train_step() for _ in range(3)]
    assert all(m["tokens_with_gradient"] > 0 for m in metrics)
    assert all(m["gap_max"] <= 1e-4 and m["clip_share"] == 0 for m in metrics)
    for name, tensor in r.model.state_dict().items():
        assert torch.equal(tensor, before[name]), name


def test_gap_stays_small_while_the_policy_moves_and_mtp_and_bias_do_not(tmp_path: Path) -> None:
    r = with_varied_rewards(reinforcement(tmp_path, lr=1e-3))
    before = {n: t.clone() for n, t in r.model.state_dict().items()}
    metrics = [r._train_step() for _ in range(3)]
    assert all(m["gap_max"] <= 1e-4 for m in metrics)
    for name, tensor in r.model.state_dict().items():
        kept = name.startswith("mtp.") or name.endswith("router.bias")
        assert torch.equal(tensor, before[name]) == kept or "experts" in name, name


def test_micro_batches_do_not_change_the_update(tmp_path: Path) -> None:
    models_after = []
    for micro in (40, 4096):
        r = with_varied_rewards(reinforcement(tmp_path, lr=1e-2, micro_tokens=micro))
        r._train_step()
        models_after.append(r.gradients.flat.clone())
    torch.testing.assert_close(models_after[0], models_after[1], rtol=1e-3, atol=1e-6)


def test_groups_without_differences_carry_no_gradient(tmp_path: Path) -> None:
    r = reinforcement(tmp_path)  # a random model: nothing is ever right
    metrics = r._train_step()
    assert metrics["accuracy"] == 0
    assert metrics["tokens_with_gradient"] == 0 or metrics["well_formed"] > 0


def test_shuffled_rewards_are_the_same_rewards_elsewhere(tmp_path: Path) -> None:
    r = reinforcement(tmp_path, shuffle_rewards=True)
    rewards = torch.arange(16.0).view(4, 4) ** 2
    plain = advantages(rewards, True).flatten()
    r.step = 1
    assert not torch.equal(r._credit(rewards), plain)


def test_rl_runs_on_a_reasoning_gym_task(tmp_path: Path) -> None:
    r = reinforcement(tmp_path, task=Gym("basic_arithmetic"), max_tokens=6)
    metrics = r._train_step()
    assert metrics["accuracy"] == 0 and metrics["length"] > 0
    with pytest.raises(UserError, match=r"zero\.task"):
        reinforcement(tmp_path, task="chain_sum")


def test_a_gap_above_the_limit_stops_the_run(tmp_path: Path) -> None:
    r = reinforcement(tmp_path, max_gap=1e-3)
    with pytest.raises(UserError, match=r"max_gap = 0\.001"):
        r._check_gap({"gap_mean": 0.5})


def test_training_on_a_reward_raises_it(tmp_path: Path) -> None:
    """The sign is right: paying for the lower half of the vocabulary makes it more frequent."""
    r = reinforcement(tmp_path, lr=3e-3, prompts=8, group=8, max_tokens=4, steps=90)
    sample = r._sample

    def share(rollouts: list[Rollout]) -> list[float]:
        return [sum(t < 160 for t in x.completion.tokens) / len(x.completion.tokens) for x in rollouts]

    def paid() -> tuple[list[Rollout], torch.Tensor]:
        rollouts, _ = sample()
        return rollouts, torch.tensor(share(rollouts)).view(-1, 8)

    r._sample = paid  # type: ignore[method-assign]
    rewards = [r._train_step()["reward"] for _ in range(30)]
    assert sum(rewards[-5:]) > sum(rewards[:5]) + 1


def test_rl_starts_from_a_hugging_face_folder_and_goes_out_as_one(tmp_path: Path) -> None:
    words = tokenizer.train([WORDS], 320, tmp_path / "tokenizer.json")
    export(toy_model(1), tmp_path / "open", "fp32", extras=words.export)
    r = reinforcement(tmp_path, start=str(tmp_path / "open"), steps=1)
    r.run()
    trained = tmp_path / "zero"
    assert models.load(trained).config == r.model.config
    files = outgoing.export(trained, tmp_path / "out", "bf16")
    assert {
        "config.json",
        "tokenizer.json",
        "tokenizer_config.json",
        "generation_config.json",
        "README.md",
    } <= {f.name for f in files}
    back = models.load(tmp_path / "out").state_dict()
    kept = {n: t for n, t in r.model.state_dict().items() if n.endswith("router.bias")}
    assert kept and all(torch.equal(back[n], t) for n, t in kept.items())
    assert all((back[n] - t).abs().max() <= t.abs().max() / 128 for n, t in r.model.state_dict().items())
