"""GRPO that generates answers ahead of training: bounded staleness, answers that survive a kill, and overlap."""

import sys
import time
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import pytest
import torch

from finback.config import UserError
from finback.engine.engine import Engine
from finback.engine.request import Completion, Request, SamplingParams
from finback.parallel.execute import on_ray
from finback.rollouts.answer_journal import FOLDER
from finback.rollouts.fleet import Fleet
from finback.rollouts.generation import PolicyModel, Rollouts
from finback.rollouts.here import Here
from finback.rollouts.live_engine import LiveEngine
from finback.rollouts.rl_health import overlap, overlap_text
from finback.rollouts.rollouts import Rollout
from finback.runs.files import read_lines
from finback.runs.recipe import Recipe
from finback.stages.grpo import GRPO
from finback.stages.grpo_training import Reinforcement
from finback.tasks.math import Chains
from finback.train.correction import mismatch
from tests.test_grpo import reinforcement, steps
from tests.toy import toy_model


@dataclass(frozen=True)
class Counted(Here):
    """The local engine, which records the seed and the length of each answer."""

    def open(self, policy: PolicyModel, sampling: SamplingParams) -> Rollouts:
        opened = super().open(policy, sampling)
        answers = opened._answers

        def counted(
            prompts: Sequence[Sequence[int]], sampling: SamplingParams, seeds: Sequence[int]
        ) -> Iterator[tuple[int, Completion]]:
            for place, completion in answers(prompts, sampling, seeds):
                opened.made.append((seeds[place], len(completion.tokens)))  # type: ignore[attr-defined]
                yield place, completion

        opened.made = []  # type: ignore[attr-defined]
        opened._answers = counted  # type: ignore[method-assign]
        return opened


def ahead(folder: Path, **knobs: object) -> Reinforcement:
    """Six steps of GRPO on the toy model, with rewards by the sum of an answer's ids."""
    folder.mkdir(exist_ok=True)
    r = reinforcement(folder, lr=1e-3, steps=6, max_gap=9.0, **knobs)

    def rewarded(group: list[Rollout]) -> list[dict[str, float]]:
        return [{"accuracy": float(sum(r.completion.tokens) % 3 == 0), "form": 0.0} for r in group]

    r.sampler.rewarded = rewarded  # type: ignore[method-assign]
    return r


def made(r: Reinforcement) -> list[tuple[int, int]]:
    return r.rollouts.made  # type: ignore[attr-defined, no-any-return]


@pytest.mark.parametrize(("most", "in_flight"), [(1, "continue"), (3, "drop")])
def test_each_token_is_learnt_once_at_the_age_that_is_asked_for(most: int, in_flight: str, tmp_path: Path) -> None:
    """The trainer waits until all allowed answers exist, so that all tokens have the maximal staleness."""
    r = ahead(tmp_path, max_staleness=most, in_flight=in_flight, rollouts=Counted())
    looped, update = r.loop(), r._update

    def later(*given: Any, **more: Any) -> Any:
        while len(made(r)) < 16 * min(looped.step + most, 6):
            time.sleep(0.01)
        return update(*given, **more)

    r._update = later  # type: ignore[method-assign]
    looped.train()
    lines = list(read_lines(r.run.folder / "metrics.jsonl"))
    assert [line["step"] for line in lines] == list(range(1, 7))
    for line in lines:
        age = min(line["step"] - 1, most)
        assert line["staleness"] == line["staleness_max"] == age and line["versions"] == 1
        assert line["staleness_shares"] == [float(i == age) for i in range(most + 1)]
        assert 0 <= line["trainer_idle"] <= 1 and 0 <= line["engines_idle"] <= 1 and line["learnt_per_second"] > 0
        assert (abs(line["mismatch_kl"]) < 1e-4) == (age == 0), "only older weights may differ from the trainer's"
    seeds = [seed for seed, _ in made(r)]
    assert len(set(seeds)) == len(seeds) == 6 * 16
    assert r.totals["tokens_generated"] == sum(tokens for _, tokens in made(r))
    assert len(list(read_lines(r.run.folder / "samples.jsonl"))) == 6 * 16
    results = r.finish(looped)
    assert results["ahead"]["staleness"] == sum(min(n, most) for n in range(6)) / 6
    assert f"({most} at most)" in r.stage.describe(results) and "engines keep" not in r.stage.describe(results)
    r.close()


@pytest.mark.parametrize("drop", [False, True])
def test_weights_come_between_two_steps_of_an_engine(drop: bool) -> None:
    """Answers continue with new weights and record it, or restart; under the same weights they are equal either way."""
    engine = Engine(toy_model(1), ())
    prompts, sampling = [[5, 6, 7], [8, 9], [5, 6, 7]], SamplingParams(max_tokens=8)
    plain = engine.generate(prompts, sampling, range(3))
    live, step, count = LiveEngine(engine), engine.step, iter(range(1000))
    live.take(lambda model: None, 4)

    def stepped() -> list[Request]:
        if next(count) == 3:
            live._took(5, drop)
        return step()

    engine.step = stepped  # type: ignore[method-assign]
    found = dict(answer for answer in live.answers(prompts, sampling, range(3), 60) if answer is not None)
    live.close()
    assert [found[i].tokens for i in range(3)] == [c.tokens for c in plain]
    if drop:
        assert live.dropped > 0 and all(c.versions == ((5, 0, 8),) for c in found.values())
    else:
        for c in found.values():
            (old, start, middle), (new, again, end) = c.versions
            assert (old, new, start, end) == (4, 5, 0, 8) and 0 < middle == again < 8


def test_answers_outlive_a_kill(tmp_path: Path) -> None:
    """A second run reads the journal: it requests no answer twice, and learns again from those after the checkpoint."""
    first = ahead(tmp_path, max_staleness=2, checkpoint_steps=2, rollouts=Counted())
    looped = first.loop()
    for _ in range(3):
        looped.advance()
        if looped.step == 2:
            looped.checkpoint()
    learnt = first.model.state_dict()["embed"].clone()
    while len(made(first)) < 5 * 16:  # the answers of steps 4 and 5 exist when the process ends
        time.sleep(0.01)
    with (first.run.folder / FOLDER / "00000005-0.jsonl").open("a") as torn:
        torn.write('{"seed": 1, "tok')
    first.sampler.close()
    second = ahead(tmp_path, max_staleness=2, checkpoint_steps=2, rollouts=Counted())
    looped = second.loop()
    state = looped.restore()
    assert state is not None and looped.step == 2
    second.load_state(state)
    looped.advance()
    assert torch.equal(second.model.state_dict()["embed"], learnt), "step 3 must learn from the same answers"
    while looped.step < 6:
        looped.advance()
    seeds = [seed for r in (first, second) for seed, _ in made(r)]
    assert len(set(seeds)) == len(seeds) == 6 * 16
    assert second.totals["tokens_generated"] == sum(tokens for r in (first, second) for _, tokens in made(r))
    for r in (first, second):
        r.close()


def test_what_nobody_learns_from_is_accounted_for(tmp_path: Path) -> None:
    """A run that ends early has answers for later steps."""
    r = ahead(tmp_path, max_staleness=2, rollouts=Counted())
    looped = r.loop()
    looped.advance()
    while len(made(r)) < 3 * 16:
        time.sleep(0.01)
    results = r.finish(looped)
    assert results["tokens_generated"] == sum(tokens for _, tokens in made(r))
    spent = sum(line.get("tokens_generated", 0) for line in read_lines(r.run.folder / "ledger.jsonl"))
    assert spent == results["tokens_generated"]
    r.close()


def test_mistakes_in_the_thread_are_raised_where_the_step_is_wanted(tmp_path: Path) -> None:
    r = ahead(tmp_path, max_staleness=1, rollouts=Counted())

    def fails(*given: object) -> None:
        raise UserError("zero.rollouts", "x", "no server is left", "Start one.")

    r.rollouts._answers = fails  # type: ignore[method-assign, assignment]
    with pytest.raises(UserError, match="no server is left"):
        steps(r, 1)
    r.close()


def test_engines_wanted_by_hand() -> None:
    """Generating takes 8 s and learning 5 s: 1.6 times as long, so that two engines should become four."""
    row = {"staleness": 1.0, "staleness_max": 1, "mismatch_kl": 0.0, "mismatch_chi2": 0.0, "trainer_idle": 0.4}
    row |= {"engines_idle": 0.0, "generating_seconds": 8.0, "update_seconds": 5.0}
    found = overlap([row] * 3)
    assert found["generating"] == pytest.approx(1.6)
    assert overlap_text("zero", found, 2).endswith("1.6 times as long as learning: 4 engines keep the trainer busy.")
    assert overlap([{"step": 1, "update_seconds": 1.0}]) == {}


def test_mismatch_by_hand() -> None:
    """verl's numbers for d = 0.2, -0.1, 1.0."""
    kl, chi2 = mismatch(torch.tensor([0.2, -0.1, 1.0]), torch.zeros(3))
    assert float(kl) / 3 == pytest.approx(-0.366667, abs=1e-6) and float(chi2) / 3 == pytest.approx(2.233204, abs=1e-5)


def test_a_fleet_without_ray_says_so_and_an_address_reaches_all_fleets(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Checks what needs no Ray; tests/test_fleet.py has the rest."""
    monkeypatch.setitem(sys.modules, "ray", None)
    with pytest.raises(UserError, match=r"zero\.rollouts = 'Fleet': Ray is not installed here.*pip install"):
        reinforcement(tmp_path, rollouts=Fleet(2))
    stages = [GRPO(name=name, start=str(tmp_path / "base"), task=Chains(2, 3)) for name in ("one", "two")]
    recipe = Recipe("r", (stages[0], replace(stages[1], rollouts=Fleet(2))))
    assert on_ray(recipe, "", 0) is recipe
    one, two = on_ray(recipe, "10.0.0.5:6379", 1).stages
    assert one == stages[0] and two.rollouts == Fleet(2, address="10.0.0.5:6379")  # type: ignore[attr-defined]
    with pytest.raises(UserError, match="no stage generates on a fleet"):
        on_ray(Recipe("r", (stages[0],)), "auto", 1)
