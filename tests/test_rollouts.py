"""Answers from servers equal those of the local engine, with any server program and after any failure."""

import re
import subprocess
import sys
import threading
from collections.abc import Iterator
from dataclasses import dataclass, replace
from itertools import count
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from finback.checkpoint import models
from finback.config import UserError
from finback.data import tokenizer as tokenizers
from finback.data.tokenizer import Tokenizer
from finback.engine.engine import Engine, EngineConfig
from finback.engine.request import Completion, SamplingParams
from finback.model.lora import LoRA
from finback.model.transformer import Transformer
from finback.parallel.mesh import World
from finback.parallel.served_weights import ServedWeights
from finback.rollouts.generation import Backend, PolicyModel, Rollouts
from finback.rollouts.servers import Servers
from finback.runs.files import read_lines
from finback.runs.folder import StageRun
from finback.stages.grpo_training import Reinforcement
from tests.engine_servers import FakeEngineServer, engine_server
from tests.test_grpo import reinforcement, steps, with_varied_rewards
from tests.toy import WORDS, environment

QUICK: dict[str, Any] = {"backoff": 0.01, "timeout": 300.0, "concurrency": 4}
OPENED: list[Rollouts] = []
SAMPLING = SamplingParams(temperature=0.9, max_tokens=8)


@pytest.fixture(autouse=True)
def closed() -> Iterator[None]:
    """Closes what a test has opened."""
    yield
    while OPENED:
        OPENED.pop().close()


def learning(folder: Path, **knobs: object) -> Reinforcement:
    """GRPO on the toy model, with a reward for every third answer."""
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
    """The results of three steps with the engine in this process."""
    return sampled(learning(tmp_path_factory.mktemp("run"), routing_replay=True), 3)


def agree(found: tuple[list[dict[str, Any]], list[Any]], here: tuple[list[dict[str, Any]], list[Any]]) -> None:
    """Checks for the same tokens, and log-probabilities within 1e-5."""
    assert [c.tokens for c in found[1]] == [c.tokens for c in here[1]]
    for mine, theirs in zip(found[1], here[1], strict=True):
        assert mine.logprobs == pytest.approx(theirs.logprobs, abs=1e-5)
        assert mine.finish_reason == theirs.finish_reason and mine.versions == theirs.versions
    for key in ("loss", "reward", "length", "grad_norm"):
        assert [m[key] for m in found[0]] == pytest.approx([m[key] for m in here[0]], abs=1e-4)
    assert all(m["gap_max"] < 1e-4 for m in found[0])


@dataclass(frozen=True)
class Asked:
    """A model, prompts for it, and its engine's answers to them."""

    model: Transformer
    tokenizer: Tokenizer
    prompts: list[list[int]]
    answers: list[Completion]

    def ask(self, generator: Rollouts) -> list[Completion]:
        """The answers of another generator, which must be the same."""
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


def connected(
    asked: Asked,
    root: Path,
    *urls: str,
    sampling: SamplingParams = SAMPLING,
    fleet: Backend | None = None,
    **knobs: Any,
) -> Any:
    """Servers for that model, or a fleet, as a stage opens them."""
    run = StageRun(root, "zero", 0, World(), quiet=False)
    run.folder.mkdir(exist_ok=True)
    policy = PolicyModel(
        ServedWeights(asked.model), asked.model.config, asked.tokenizer, run, return_routed_experts=True
    )
    OPENED.append((fleet or Servers(urls, **QUICK | knobs)).open(policy, sampling))
    return OPENED[-1]


@pytest.mark.parametrize("kind", ["vllm", "sglang"])
def test_servers_answer_as_the_engine_does(kind: str, base: Path, asked: Asked, tmp_path: Path) -> None:
    """Two of them share the prompts, with replayed experts; a prompt cached under one version is not reused later."""
    with engine_server(base, kind) as (one, first), engine_server(base, kind) as (two, second):
        r = connected(asked, tmp_path, one, f"{two}/v1")
        for version in range(3):
            r.update(version)
            asked.ask(r)
        assert first.answered + second.answered == 3 * 24 + 2 * 2, "each prompt once, and two probes per server"
        seen = [body for path, body in (*first.seen, *second.seen) if path.endswith("generate")]
    assert {body["cache_salt"] for body in seen} == {f"{r.token}-{version}" for version in range(3)}
    tally = r.take_tally()
    assert tally.tokens == 3 * sum(len(c.tokens) for c in asked.answers) and tally.seconds > 0 < tally.sync_seconds
    # the newest two versions of the weights stay until the run ends
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
    """Weights change, experts are replayed; the cost of sending weights is in the metrics and in the ledger."""
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


def test_an_adapter_is_merged_and_top_k_replayed(base: Path, tmp_path: Path) -> None:
    with engine_server(base) as (url, server):
        servers = Servers((url,), **QUICK)
        found = steps(learning(tmp_path / "run", adapter=LoRA(rank=4), top_k=8, rollouts=servers), 2)
        assert all(m["gap_max"] < 1e-4 for m in found)
        server.change = lambda reply: reply["choices"][0].update(sampling_mask=None)
        with pytest.raises(UserError, match=r"zero\.rollouts = .*does not report which tokens top_k and top_p leave"):
            steps(learning(tmp_path / "again", top_k=8, rollouts=servers), 1)


def test_top_k_is_refused_where_its_choices_are_not_known(base: Path, asked: Asked, tmp_path: Path) -> None:
    with engine_server(base, "sglang") as (url, _), pytest.raises(UserError, match="Leave out top_k and top_p"):
        connected(asked, tmp_path, url, sampling=replace(SAMPLING, top_k=8, return_sampling_mask=True)).update(0)


def test_completions_do_where_the_token_route_is_off(base: Path, asked: Asked, tmp_path: Path) -> None:
    """They do not report versions, which come from another route."""
    with engine_server(base) as (url, server):
        server.fault = lambda path, body: 403 if path == "/inference/v1/generate" else None
        r = connected(asked, tmp_path, url)
        r.policy = replace(r.policy, return_routed_experts=False)
        r.servers[0].model = replace(r.servers[0].model, return_routed_experts=False)
        r.update(0)
        found = r.generate(asked.prompts, SAMPLING, range(24))
        assert [c.tokens for c in found] == [c.tokens for c in asked.answers]
        server.version = "other"
        with pytest.raises(UserError, match="answers with weights 'other', not with"):
            r.generate(asked.prompts, SAMPLING, range(24))


def test_a_model_that_does_not_learn_is_not_sent(base: Path, asked: Asked, tmp_path: Path) -> None:
    """Its server has the model, under any version, and keeps it."""
    with engine_server(base) as (url, server):
        r = connected(asked, tmp_path, url)
        r.policy = replace(r.policy, learns=False)
        r.update(0)
        asked.ask(r)
        assert server.version == "default" and r.take_tally().sync_bytes == 0
        server.version = "other"
        with pytest.raises(UserError, match="answers with weights 'other', not with 'default'"):
            r.generate(asked.prompts, SAMPLING, range(24))


# ---- failures --------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("fault", [503, 500, "drop"])
def test_faults_cost_no_answer_and_none_counts_twice(
    fault: int | str, base: Path, asked: Asked, tmp_path: Path
) -> None:
    """Every third request to one server fails, and later all of them."""
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
            assert failed.wait(300), "the first server must be used too"

        first.fault, second.fault = sometimes, later
        asked.ask(r)
        assert first.answered + second.answered == 24


def test_a_server_that_dies_is_left_out_until_it_is_back(
    base: Path, asked: Asked, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    with engine_server(base) as (one, first), engine_server(base) as (two, second):
        r = connected(asked, tmp_path, one, two)
        for version in range(2):  # both are probed twice
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
        with pytest.raises(UserError, match="no server is left") as failed:
            asked.ask(r)
        assert one in str(failed.value) and two in str(failed.value)
        with pytest.raises(UserError, match="no server accepts the weights"):
            r.update(4)


def other_tokenizer(server: FakeEngineServer, folder: Path) -> None:
    server.tokenizer = tokenizers.train(["Quite another text, in which other words occur."] * 9, 300, folder / "t.json")


def raw_logprobs(server: FakeEngineServer) -> None:
    def raw(reply: dict[str, Any]) -> None:
        for each in reply["choices"][0]["logprobs"]["content"]:
            each["logprob"] -= 0.01

    server.change = raw


def without(name: str) -> Any:
    def change(server: FakeEngineServer) -> None:
        server.change = lambda reply: reply["choices"][0].update({name: None})

    return change


def answers_as(version: str) -> Any:
    def change(server: FakeEngineServer) -> None:
        spans = [{"version": version, "start": 0, "end": 9}]
        server.change = lambda reply: reply["choices"][0].update(weight_versions=spans)

    return change


def broken(path: str, status: int) -> Any:
    def change(server: FakeEngineServer) -> None:
        server.fault = lambda asked, body: status if asked == path else None

    return change


def of_another_shape(server: FakeEngineServer) -> None:
    server.change = lambda reply: reply["choices"][0].update(token_ids=[10**6])


@pytest.mark.parametrize(
    ("change", "problem", "remedy"),
    [
        (raw_logprobs, "differ from the trainer's by 0.01", "processed_logprobs"),
        (without("logprobs"), "lack log-probabilities", "processed_logprobs"),
        (without("routed_experts"), "does not report which experts", "routing_replay"),
        (answers_as("17"), "answers with weights '17', not with", "Run the same command again"),
        (of_another_shape, "ids beyond the vocabulary of 320", "Serve the model that is trained"),
        (broken("/pause", 404), "does not accept weights", "VLLM_SERVER_DEV_MODE=1"),
        (broken("/collective_rpc", 500), "failed: HTTP 500", "See its log"),
        (broken("/inference/v1/generate", 400), "HTTP 400", "See its log"),
    ],
    ids=["raw", "no logprobs", "no experts", "stale", "vocabulary", "no control", "no reload", "refuses"],
)
def test_a_server_that_does_not_fit_is_named(
    change: Any, problem: str, remedy: str, base: Path, asked: Asked, tmp_path: Path
) -> None:
    with engine_server(base) as (url, server):
        change(server)
        with pytest.raises(UserError) as failed:
            connected(asked, tmp_path, url).update(0)
        assert failed.value.field == "zero.rollouts" and failed.value.value == url
        assert problem in failed.value.problem and remedy in failed.value.remedy, str(failed.value)
        assert not server.paused


def test_servers_that_cannot_be_used_at_all(base: Path, asked: Asked, tmp_path: Path) -> None:
    with engine_server(base) as (url, server):
        (tmp_path / "file").write_text("")
        with pytest.raises(UserError, match=r"zero.rollouts.folder = .*cannot be written"):
            connected(asked, tmp_path, url, folder=str(tmp_path / "file" / "within")).update(0)
        other_tokenizer(server, tmp_path)
        with pytest.raises(
            UserError, match=r"different tokenizer: .*The whale sang.* has the ids \[.* there and \[.* here"
        ):
            connected(asked, tmp_path, url)
        server.kind = "llama.cpp"
        with pytest.raises(UserError, match="not a known program"):
            connected(asked, tmp_path, url)
    with pytest.raises(UserError, match=r"zero.rollouts = .*no server answers"):
        connected(asked, tmp_path, url)
    for urls, problem in (((), "empty, or one"), ((url, url), "one of them twice"), (("10.0.0.1",), "not the url")):
        with pytest.raises(UserError, match=problem):
            Servers(urls)


# ---- finback's own server ------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def finback_server(base: Path, tmp_path_factory: pytest.TempPathFactory) -> Iterator[tuple[str, Path]]:
    """`finback serve` in a separate process, and the folder from which it loads weights."""
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
    """The same tokens for the same seeds, log-probabilities within 1e-5, also after a change of weights."""
    url, folder = finback_server
    r = learning(tmp_path / "run", routing_replay=True, rollouts=Servers((url,), folder=str(folder), **QUICK))
    agree(sampled(r, 3), here)
    r.rollouts.close()
    assert not any(folder.iterdir())
    with pytest.raises(UserError, match="--allow-weight-updates"):  # the stage's own folder is not permitted
        connected(asked, tmp_path, url).update(0)
