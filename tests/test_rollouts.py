"""Answers from servers: the same as from the engine here, whatever program serves and whatever fails in between."""

import re
import subprocess
import sys
import threading
from collections.abc import Iterator
from dataclasses import dataclass
from itertools import count
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from finback.checkpoint import models
from finback.config import UserError
from finback.data.tokenizer import Tokenizer
from finback.engine.engine import Engine, EngineConfig
from finback.engine.request import Completion, SamplingParams
from finback.model.transformer import Transformer
from finback.parallel.mesh import World
from finback.rollouts.generation import PolicyModel, Rollouts
from finback.rollouts.servers import Servers
from finback.runs.files import read_lines
from finback.runs.folder import StageRun
from finback.stages.grpo_training import Reinforcement
from tests.engine_servers import engine_server
from tests.test_grpo import reinforcement, steps, with_varied_rewards
from tests.toy import WORDS, environment

QUICK: dict[str, Any] = {"backoff": 0.01, "timeout": 300.0, "concurrency": 4}
OPENED: list[Rollouts] = []
SAMPLING = SamplingParams(temperature=0.9, max_tokens=8)


@pytest.fixture(autouse=True)
def closed() -> Iterator[None]:
    """What a test has opened is let go of."""
    yield
    while OPENED:
        OPENED.pop().close()


def learning(folder: Path, **knobs: object) -> Reinforcement:
    """GRPO on the toy model, in which every third answer is paid."""
    folder.mkdir(exist_ok=True)
    found = with_varied_rewards(reinforcement(folder, lr=1e-3, **knobs))
    OPENED.append(found.rollouts)
    return found


def sampled(r: Reinforcement, number: int) -> tuple[list[dict[str, Any]], list[Any]]:
    """The metrics of so many steps, and their answers."""
    seen: list[Any] = []
    sample = r.sampler.sample

    def watched(step: int) -> Any:
        asked, groups = sample(step)
        seen.extend(rollout.completion for group in asked for rollout in group.rollouts)
        return asked, groups

    r.sampler.sample = watched  # type: ignore[method-assign]
    return steps(r, number), seen


@pytest.fixture(scope="module")
def base(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The folder in which `reinforcement` finds its model."""
    folder = tmp_path_factory.mktemp("here")
    learning(folder)
    return folder / "base"


@pytest.fixture(scope="module")
def here(tmp_path_factory: pytest.TempPathFactory) -> tuple[list[dict[str, Any]], list[Any]]:
    """What three steps of the engine in this process make."""
    return sampled(learning(tmp_path_factory.mktemp("run"), routing_replay=True), 3)


def agree(found: tuple[list[dict[str, Any]], list[Any]], here: tuple[list[dict[str, Any]], list[Any]]) -> None:
    """The same tokens, log-probabilities within 1e-5."""
    assert [c.tokens for c in found[1]] == [c.tokens for c in here[1]]
    for mine, theirs in zip(found[1], here[1], strict=True):
        assert mine.logprobs == pytest.approx(theirs.logprobs, abs=1e-5)
        assert mine.finish_reason == theirs.finish_reason and mine.versions == theirs.versions
    for key in ("loss", "reward", "length", "grad_norm"):
        assert [m[key] for m in found[0]] == pytest.approx([m[key] for m in here[0]], abs=1e-4)
    assert all(m["gap_max"] < 1e-4 for m in found[0])


@dataclass(frozen=True)
class Asked:
    """A model, prompts for it, and what its engine answers to them."""

    model: Transformer
    tokenizer: Tokenizer
    prompts: list[list[int]]
    answers: list[Completion]

    def ask(self, generator: Rollouts) -> list[Completion]:
        """The answers of something else, which have to be the same."""
        found = generator.generate(self.prompts, SAMPLING, range(len(self.prompts)))
        assert [c.tokens for c in found] == [c.tokens for c in self.answers]
        for mine, theirs in zip(found, self.answers, strict=True):
            assert mine.logprobs == pytest.approx(theirs.logprobs, abs=1e-5)
            assert mine.finish_reason == theirs.finish_reason
            assert mine.versions == ((generator.version, 0, len(mine.tokens)),)
            assert np.array_equal(mine.routed_experts, theirs.routed_experts)  # type: ignore[arg-type]
        return found


@pytest.fixture(scope="module")
def asked(base: Path) -> Asked:
    model, words = models.load(base), Tokenizer(base)
    prompts = [words.encode(line)[:6] for line in WORDS.split("\n\n")[:24]]
    engine = Engine(model, words.stops, EngineConfig(return_routed_experts=True))
    return Asked(model, words, prompts, engine.generate(prompts, SAMPLING, range(len(prompts))))


def connected(asked: Asked, folder: Path, *urls: str, sampling: SamplingParams = SAMPLING, **knobs: Any) -> Any:
    """Servers for that model, as a stage opens them."""
    run = StageRun(folder, "zero", 0, World(), quiet=False)
    run.folder.mkdir(exist_ok=True)
    policy = PolicyModel(lambda: asked.model, asked.model.config, asked.tokenizer, run, return_routed_experts=True)
    OPENED.append(Servers(urls, **QUICK | knobs).open(policy, sampling))
    return OPENED[-1]


@pytest.mark.parametrize("kind", ["vllm", "sglang"])
def test_servers_answer_as_the_engine_does(kind: str, base: Path, asked: Asked, tmp_path: Path) -> None:
    """Two of them share the prompts, experts included; prompts cached under one version are not the next one's."""
    with engine_server(base, kind) as (one, first), engine_server(base, kind) as (two, second):
        r = connected(asked, tmp_path, one, f"{two}/v1")
        for version in range(3):
            r.update(version)
            asked.ask(r)
        assert first.answered + second.answered == 3 * 24 + 2 * 2, "each prompt once, and two probes of each server"
        seen = [body for path, body in (*first.seen, *second.seen) if path.endswith("generate")]
    assert {body["cache_salt"] for body in seen} == {f"{r.token}-{version}" for version in range(3)}
    tally = r.take_tally()
    assert tally.tokens == 3 * sum(len(c.tokens) for c in asked.answers) and tally.seconds > 0 < tally.sync_seconds
    # the newest two versions of the weights stay until the run is over
    size = sum(file.stat().st_size for file in (tmp_path / "zero" / ".weights" / f"{r.token}-2").iterdir())
    assert tally.sync_bytes == 3 * 2 * size
    assert sorted(path.name for path in (tmp_path / "zero" / ".weights").iterdir()) == [
        f"{r.token}-{v}" for v in (1, 2)
    ]
    r.close()
    assert not any((tmp_path / "zero" / ".weights").iterdir())


def test_grpo_on_a_server_is_grpo_here(
    base: Path, here: tuple[list[dict[str, Any]], list[Any]], tmp_path: Path
) -> None:
    """Weights that move, with replayed experts; what sending them costs is a metric and in the ledger."""
    with engine_server(base) as (url, _):
        r = learning(tmp_path / "run", routing_replay=True, rollouts=Servers((url,), **QUICK))
        agree(sampled(r, 3), here)
        looped = r.loop()
        looped.step = 3
        metrics = looped.advance()
        looped.account()
    assert metrics["sync_bytes"] > 100_000 and metrics["sync_seconds"] > 0 < metrics["generated_per_second"]
    spent = list(read_lines(r.run.folder / "ledger.jsonl"))[-1]
    assert spent["sync_bytes"] == metrics["sync_bytes"] and spent["sync_seconds"] == metrics["sync_seconds"]
    assert all(m["sync_bytes"] == 0 < m["generated_per_second"] for m in here[0])


# ---- what fails ------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("fault", [503, 500, "drop"])
def test_faults_cost_no_answer_and_none_counts_twice(
    fault: int | str, base: Path, asked: Asked, tmp_path: Path
) -> None:
    """Every third request of one server fails, and then all of them."""
    with engine_server(base) as (one, first), engine_server(base) as (two, second):
        calls, failed = count(1), threading.Event()
        r = connected(asked, tmp_path, one, two)
        r.update(0)
        first.answered = second.answered = 0

        def sometimes(path: str, body: dict[str, Any]) -> int | str | None:
            if (number := next(calls)) % 3 and number <= 9:
                return None
            failed.set()
            return fault

        def later(path: str, body: dict[str, Any]) -> None:
            assert failed.wait(300), "the first server is asked too"

        first.fault, second.fault = sometimes, later
        asked.ask(r)
        assert first.answered + second.answered == 24


def test_a_server_that_dies_is_left_out_until_it_is_back(
    base: Path, asked: Asked, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    with engine_server(base) as (one, first), engine_server(base) as (two, second):
        r = connected(asked, tmp_path, one, two)
        for version in range(2):  # both are looked at twice
            r.update(version)
        first.fault = lambda path, body: "drop"
        first.answered = second.answered = 0
        r.update(2)
        assert f"warning: {one} has missed new weights" in capsys.readouterr().err
        asked.ask(r)
        assert (first.answered, second.answered) == (0, 24)
        first.fault = lambda path, body: None
        r.update(3)
        assert first.version == second.version == f"{r.token}-3" and len(r.ready) == 2
        second.fault = first.fault = lambda path, body: "drop"
        with pytest.raises(UserError, match="no server is left to answer") as failed:
            asked.ask(r)
        assert one in str(failed.value) and two in str(failed.value)
        with pytest.raises(UserError, match="no server takes the weights"):
            r.update(4)


# ---- the real thing --------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def finback_server(base: Path, tmp_path_factory: pytest.TempPathFactory) -> Iterator[tuple[str, Path]]:
    """`finback serve` in a process of its own, and the folder from which it takes weights."""
    folder = tmp_path_factory.mktemp("weights")
    command = [sys.executable, "-m", "finback", "serve", str(base), "--port", "0", "--dtype", "fp32", "--no-page"]
    command += ["--allow-weight-updates", str(folder), "--enable-return-routed-experts"]
    with subprocess.Popen(command, env=environment(), stderr=subprocess.PIPE, text=True) as process:
        assert process.stderr is not None
        try:
            line = next(line for line in process.stderr if "serving" in line)
            yield re.findall(r"http://[\d.]+:\d+", line)[0], folder
        finally:
            process.terminate()
            process.stderr.read()


def test_grpo_through_finbacks_own_server(
    finback_server: tuple[str, Path], here: tuple[list[dict[str, Any]], list[Any]], asked: Asked, tmp_path: Path
) -> None:
    """The same tokens for the same seeds, log-probabilities within 1e-5, also after the weights have moved."""
    url, folder = finback_server
    r = learning(tmp_path / "run", routing_replay=True, rollouts=Servers((url,), folder=str(folder), **QUICK))
    agree(sampled(r, 3), here)
    r.rollouts.close()
    assert not any(folder.iterdir())
    with pytest.raises(UserError, match="--allow-weight-updates"):  # the stage's own folder is not within that one
        connected(asked, tmp_path, url).update(0)
