"""A validation set during training: early stopping, the best model, and questions that training must leave out."""

from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch

from finback.checkpoint import models
from finback.config import UserError
from finback.report.summary import draw
from finback.rollouts import rl_health
from finback.rollouts.here import EngineRollouts
from finback.rollouts.rollouts import Rollout
from finback.runs.files import read_lines, write_lines
from finback.runs.reader import StageFolder
from finback.stages import validation
from finback.stages.grpo_sampling import GroupSampler
from finback.stages.grpo_training import Reinforcement
from finback.stages.sft import SFT
from finback.stages.validation import Validation
from finback.tasks.math import Chains
from finback.tasks.questions import Questions
from finback.train import loop
from tests.test_grpo import reinforcement, with_varied_rewards
from tests.test_tuning import stage_folder, tune, write_traces

SET = Validation(task=Chains(2, 3), problems=10, every_steps=2, patience=2, max_tokens=8)


def scripted(monkeypatch: pytest.MonkeyPatch, *rights: int) -> None:
    """Scores so many of ten problems right, call by call."""
    calls = iter(rights)
    right = lambda *_: ([float(i < n) for n in [next(calls)] for i in range(10)], 1.0)  # noqa: E731
    monkeypatch.setattr(validation, "answered", right)


def scores(folder: Path) -> dict[int, float]:
    return {r["step"]: r["validation"] for r in read_lines(folder / "metrics.jsonl") if "validation" in r}


def weights(folder: Path) -> torch.Tensor:
    return torch.cat([p.flatten() for p in models.load(folder).state_dict().values()])


def test_rl_stops_when_the_scores_do_and_keeps_the_best_model(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Steps 6 and 8 bring no new best, so the rate falls over the next four steps; the model of step 4 is kept."""
    scripted(monkeypatch, 2, 5, 8, 8, 3, 7, 6)
    r = with_varied_rewards(reinforcement(tmp_path, steps=60, lr=1e-3, validation=SET))
    kept: dict[int, torch.Tensor] = {}
    finished = r.stopping.validator.after  # type: ignore[union-attr]

    def watched(looped: Any, last: bool = False) -> None:
        kept[looped.step] = torch.cat([p.detach().flatten() for p in r.model.state_dict().values()])
        finished(looped, last)

    monkeypatch.setattr(r.stopping.validator, "after", watched)
    results = loop.run(r)
    assert scores(r.run.folder) == {0: 0.2, 2: 0.5, 4: 0.8, 6: 0.8, 8: 0.3, 10: 0.7, 12: 0.6}
    assert results["steps"] == 12
    assert results["validation"] == {"problems": 10, "before": 0.2, "after": 0.8, "step": 4, "worse": False}
    assert torch.equal(weights(r.run.folder), kept[4]) and not torch.equal(kept[4], kept[12])
    assert draw(tmp_path, [StageFolder(r.run.folder, {})]) is not None, "a score is not drawn as a step"
    rates = [row["lr"] for row in read_lines(r.run.folder / "metrics.jsonl") if "lr" in row]
    assert rates[:8] == [1e-3] * 8 and rates[8:] == pytest.approx([7.75e-4, 5.5e-4, 3.25e-4, 1e-4])


def test_a_model_that_got_worse_is_named(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    scripted(monkeypatch, 10, 1, 0)
    r = with_varied_rewards(reinforcement(tmp_path, steps=4, lr=1e-3, validation=SET))
    r.run.quiet = False
    assert loop.run(r)["validation"]["worse"]
    assert (
        "warning: the model is worse than before: validation 100.0%, now 10.0% at its best" in capsys.readouterr().err
    )


def test_a_killed_run_scores_and_keeps_the_same(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Killed in step 5; the scores depend on the weights alone."""
    often = replace(SET, every_steps=1, patience=0)

    def training(root: Path) -> Reinforcement:
        root.mkdir(exist_ok=True)
        knobs = {"steps": 6, "lr": 1e-2, "validation": often, "checkpoint_steps": 2}
        return reinforcement(root, **knobs)

    def answered(rollouts: EngineRollouts, *_: Any) -> tuple[list[float], float]:
        total = float(rollouts.engine.model.head.weight.detach().double().sum())
        return [float(int(total * 1e6 * (i + 1)) % 3 == 0) for i in range(10)], 1.0

    def rewarded(_: GroupSampler, group: list[Rollout]) -> list[dict[str, float]]:
        return [{"accuracy": float(sum(r.completion.tokens) % 3 == 0), "form": 0.0} for r in group]

    monkeypatch.setattr(validation, "answered", answered)
    monkeypatch.setattr(GroupSampler, "rewarded", rewarded)
    whole = training(tmp_path / "whole")
    results = loop.run(whole)
    killed = training(tmp_path / "killed")
    score = killed.after

    def kill(looped: Any, metrics: Any) -> None:
        if looped.step == 5:
            raise KeyboardInterrupt
        score(looped, metrics)

    monkeypatch.setattr(killed, "after", kill)
    with pytest.raises(KeyboardInterrupt):
        loop.run(killed)
    again = training(tmp_path / "killed")
    assert loop.run(again) == results
    assert scores(again.run.folder) == scores(whole.run.folder) and len({*scores(whole.run.folder).values()}) > 1
    assert torch.equal(weights(again.run.folder), weights(whole.run.folder))


def test_validation_questions_are_not_learnt(tmp_path: Path) -> None:
    """RL asks none of the set's questions, out of about 1,100 sums of two terms below ten; SFT skips their traces."""
    small = Validation(task=Chains(2, 2), problems=60, every_steps=1, max_tokens=8)
    r = reinforcement(tmp_path, task=Chains(2, 2), prompts_per_step=200, num_generations=2, validation=small)
    asked, _ = r.sampler.sample(1)
    mine = {p.key for p in small.questions(r.run)}
    assert len(mine) == 60 and not mine & {group.rollouts[0].problem.key for group in asked}
    without = reinforcement(tmp_path, task=Chains(2, 2), prompts_per_step=200, num_generations=2)
    assert mine & {group.rollouts[0].problem.key for group in without.sampler.sample(1)[0]}
    write_traces(tmp_path)
    records = [{"question": f"{i}?", "answer": str(i)} for i in range(60)]
    write_lines(tmp_path / "numbers.jsonl", records)
    questions = Questions(str(tmp_path / "numbers.jsonl"))
    t = tune(tmp_path, seq_len=64, validation=Validation(task=questions, problems=20))
    assert t.batches.results["contaminated"] == {"kept": {"validation": 20}} and t.batches.results["lessons"] == 40


def test_fine_tuning_ends_when_the_scores_stop(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    stage_folder(tmp_path, 0, "base")
    write_traces(tmp_path)
    scripted(monkeypatch, 0, 4, 3, 2)
    t = tune(tmp_path, epochs=20, seq_len=64, validation=SET)
    assert t.total > 6
    results = loop.run(t)
    assert results["steps"] == 6 and results["validation"]["step"] == 2
    assert "flops_evaluation" in t.stage.declaration().ledger and isinstance(t.stage, SFT)


def test_what_rl_has_cost_is_told_from_chance() -> None:
    def rows(*accuracies: float, prompts: int = 32) -> list[dict[str, float]]:
        return [{"accuracy": a, "answers": prompts * 8.0} for a in accuracies]

    fallen = rl_health.lost(rows(*[0.6] * 5, *[0.5] * 20, *[0.3] * 5), 8)
    assert fallen == "accuracy has fallen: 60.0% right in the first 3 steps, 30.0% in the last"
    assert not rl_health.lost(rows(*[0.6] * 5, *[0.5] * 20, *[0.55] * 5), 8), "within chance"
    assert not rl_health.lost(rows(*[0.6] * 5, *[0.7] * 25), 8) and not rl_health.lost(rows(0.6, 0.1), 8)
    assert not rl_health.lost(rows(*[0.9] * 5, *[0.1] * 5, prompts=2), 8), "too few questions"


@pytest.mark.parametrize("knobs", [{"problems": 0}, {"every_steps": 0}, {"patience": -1}, {"temperature": -1.0}])
def test_impossible_sets_are_named(knobs: dict[str, Any]) -> None:
    with pytest.raises(UserError, match=f"validation.{next(iter(knobs))}"):
        Validation(task=Chains(2, 3), **knobs)
