"""GRPO that asks ahead: bounded staleness, answers that outlive a kill, and overlap."""

import time
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
import torch

from finback.config import UserError
from finback.engine.request import Completion, SamplingParams
from finback.rollouts.answer_journal import FOLDER
from finback.rollouts.generation import PolicyModel, Rollouts
from finback.rollouts.here import Here
from finback.rollouts.rollouts import Rollout
from finback.runs.files import read_lines
from finback.stages.grpo_training import Reinforcement
from finback.train.correction import mismatch
from tests.test_grpo import reinforcement, steps


@dataclass(frozen=True)
class Slow(Here):
    """The engine here, which takes so many seconds for each batch; counts what it makes."""

    seconds: float = 0.0

    def open(self, policy: PolicyModel, sampling: SamplingParams) -> Rollouts:
        opened = super().open(policy, sampling)
        answers, seconds = opened._answers, self.seconds

        def slowly(
            prompts: Sequence[Sequence[int]], sampling: SamplingParams, seeds: Sequence[int]
        ) -> Iterator[tuple[int, Completion]]:
            time.sleep(seconds)
            for place, completion in answers(prompts, sampling, seeds):
                opened.made.append((seeds[place], len(completion.tokens)))  # type: ignore[attr-defined]
                yield place, completion

        opened.made = []  # type: ignore[attr-defined]
        opened._answers = slowly  # type: ignore[method-assign]
        return opened


def ahead(folder: Path, **knobs: object) -> Reinforcement:
    """Six steps of GRPO on the toy model, which pays by an answer's ids."""
    folder.mkdir(exist_ok=True)
    r = reinforcement(folder, lr=1e-3, steps=6, max_gap=9.0, **knobs)

    def rewarded(group: list[Rollout]) -> list[dict[str, float]]:
        return [{"accuracy": float(sum(r.completion.tokens) % 3 == 0), "form": 0.0} for r in group]

    r.sampler.rewarded = rewarded  # type: ignore[method-assign]
    return r


def made(r: Reinforcement) -> list[tuple[int, int]]:
    return r.rollouts.made  # type: ignore[attr-defined, no-any-return]


@pytest.mark.parametrize(("most", "in_flight"), [(1, "continue"), (3, "drop")])
def test_no_token_is_older_than_asked_and_each_is_learnt_once(most: int, in_flight: str, tmp_path: Path) -> None:
    r = ahead(tmp_path, max_staleness=most, in_flight=in_flight, rollouts=Slow(seconds=0.05))
    looped = r.loop()
    looped.train()
    lines = list(read_lines(r.run.folder / "metrics.jsonl"))
    assert [line["step"] for line in lines] == list(range(1, 7))
    for line in lines:
        assert 0 <= line["staleness"] <= line["staleness_max"] <= min(most, line["step"] - 1)
        assert sum(line["staleness_shares"]) == pytest.approx(1.0) and len(line["staleness_shares"]) == most + 1
        assert 1 <= line["versions"] <= most + 1
        assert 0 <= line["trainer_idle"] <= 1 and 0 <= line["engines_idle"] <= 1 and line["learnt_per_second"] > 0
    assert max(line["staleness_max"] for line in lines) > 0, "answers are made ahead"
    seeds = [seed for seed, _ in made(r)]
    assert len(set(seeds)) == len(seeds) == 6 * 16
    assert r.totals["tokens_generated"] == sum(tokens for _, tokens in made(r))
    assert len(list(read_lines(r.run.folder / "samples.jsonl"))) == 6 * 16
    r.close()


def test_answers_outlive_a_kill(tmp_path: Path) -> None:
    """A second run takes up the journal: nothing is asked twice, and what the first one learnt since its checkpoint is learnt again."""
    first = ahead(tmp_path, max_staleness=2, checkpoint_steps=2, rollouts=Slow())
    looped = first.loop()
    for _ in range(3):
        looped.advance()
        if looped.step == 2:
            looped.checkpoint()
    learnt = first.model.state_dict()["embed"].clone()
    while len(made(first)) < 5 * 16:  # the steps 4 and 5 lie there when the process goes
        time.sleep(0.01)
    with (first.run.folder / FOLDER / "00000005-0.jsonl").open("a") as torn:
        torn.write('{"seed": 1, "tok')
    first.sampler.close()
    second = ahead(tmp_path, max_staleness=2, checkpoint_steps=2, rollouts=Slow())
    looped = second.loop()
    state = looped.restore()
    assert state is not None and looped.step == 2
    second.load_state(state)
    looped.advance()
    assert torch.equal(second.model.state_dict()["embed"], learnt), "step 3 again, from the same answers"
    while looped.step < 6:
        looped.advance()
    seeds = [seed for r in (first, second) for seed, _ in made(r)]
    assert len(set(seeds)) == len(seeds) == 6 * 16
    assert second.totals["tokens_generated"] == sum(tokens for r in (first, second) for _, tokens in made(r))
    for r in (first, second):
        r.close()


def test_what_nobody_learns_from_is_accounted_for(tmp_path: Path) -> None:
    """A run that ends early has answers for later steps."""
    r = ahead(tmp_path, max_staleness=2, rollouts=Slow())
    looped = r.loop()
    looped.advance()
    while len(made(r)) < 3 * 16:
        time.sleep(0.01)
    results = r.finish(looped)
    assert results["tokens_generated"] == sum(tokens for _, tokens in made(r))
    spent = sum(line.get("tokens_generated", 0) for line in read_lines(r.run.folder / "ledger.jsonl"))
    assert spent == results["tokens_generated"]
    r.close()


def test_generating_and_learning_overlap(tmp_path: Path) -> None:
    """With sleeps that make both equally long, taking turns needs twice the time; the sleeps outweigh whatever else runs."""
    taken = {}
    for most in (0, 1):
        r = ahead(tmp_path / str(most), max_staleness=most, rollouts=Slow(seconds=0.5))
        update = r._update

        def slowly(*given: Any, update: Any = update, **more: Any) -> Any:
            time.sleep(0.5)
            return update(*given, **more)

        r._update = slowly  # type: ignore[method-assign]
        begin = time.monotonic()
        steps(r, 6)
        taken[most] = time.monotonic() - begin
        r.close()
    assert taken[1] < 0.8 * taken[0], taken  # benchmarks/overlap.py measures it: 7 / 12 without any work


def test_mistakes_in_the_thread_are_raised_where_the_step_is_wanted(tmp_path: Path) -> None:
    r = ahead(tmp_path, max_staleness=1, rollouts=Slow())

    def fails(*given: object) -> None:
        raise UserError("zero.rollouts", "x", "no server is left", "Start one.")

    r.rollouts._answers = fails  # type: ignore[method-assign, assignment]
    with pytest.raises(UserError, match="no server is left"):
        steps(r, 1)
    r.close()


def test_mismatch_by_hand() -> None:
    """verl's numbers for d = 0.2, -0.1, 1.0."""
    kl, chi2 = mismatch(torch.tensor([0.2, -0.1, 1.0]), torch.zeros(3))
    assert float(kl) / 3 == pytest.approx(-0.366667, abs=1e-6) and float(chi2) / 3 == pytest.approx(2.233204, abs=1e-5)
