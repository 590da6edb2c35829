"""Fleets on a real Ray: answers and weights equal those of `Here`; dead engines are replaced. `make test-scale`."""

import os
import random
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch

from finback.checkpoint import models
from finback.client import Client
from finback.config import UserError
from finback.model.lora import LoRA
from finback.rollouts.fleet import Fleet, FleetRollouts
from finback.rollouts.fleet_members import RayEngine
from finback.runs.files import read_lines
from finback.stages.grpo_training import Reinforcement
from tests.test_rollouts import OPENED, Asked, agree, asked, base, connected, learning, sampled  # noqa: F401
from tests.toy import ROOT, environment

pytestmark = [pytest.mark.scale, pytest.mark.filterwarnings("ignore::ResourceWarning")]
QUICK: dict[str, Any] = {"backoff": 0.05, "timeout": 30.0}


@pytest.fixture(scope="module", autouse=True)
def ray() -> Iterator[Any]:
    """One Ray for all tests, whose workers can import this package."""
    found = pytest.importorskip("ray")
    os.environ["PYTHONPATH"] = str(ROOT)
    found.init(num_cpus=4, include_dashboard=False, log_to_driver=False, logging_level="ERROR", namespace="finback")
    yield found
    found.shutdown()


@pytest.fixture(autouse=True)
def closed() -> Iterator[None]:
    yield
    while OPENED:
        OPENED.pop().close()


def weights(r: Reinforcement) -> dict[str, torch.Tensor]:
    return {name: tensor.clone() for name, tensor in r.model.state_dict().items()}


def engines(rollouts: Any) -> list[RayEngine]:
    assert isinstance(rollouts, FleetRollouts)
    return [server for server in rollouts.servers if isinstance(server, RayEngine)]


def pid(engine: RayEngine) -> int:
    return int(engine.cluster.get(engine.handle().pid.remote(), 60))


@pytest.mark.parametrize("knobs", [{"routing_replay": True}, {"top_k": 8}, {"compute": "bf16"}])
def test_one_engine_is_here_to_the_bit(knobs: dict[str, Any], tmp_path: Path) -> None:
    """Compares tokens, log-probabilities and weights of three steps."""
    here = learning(tmp_path / "here", **knobs)
    first = sampled(here, 3)
    there = learning(tmp_path / "there", rollouts=Fleet(1, dtype="fp32", **QUICK), **knobs)
    second = sampled(there, 3)
    assert [c.tokens for c in first[1]] == [c.tokens for c in second[1]]
    assert [c.logprobs for c in first[1]] == [c.logprobs for c in second[1]]
    assert [c.versions for c in first[1]] == [c.versions for c in second[1]]
    mine, theirs = weights(here), weights(there)
    assert all(torch.equal(mine[name], theirs[name]) for name in mine)
    assert second[0][0]["sync_bytes"] > 100_000


@pytest.mark.parametrize("knobs", [{"routing_replay": True}, {"adapter": LoRA(rank=4, base="fp32")}])
def test_two_engines_share_the_prompts(knobs: dict[str, Any], tmp_path: Path) -> None:
    """An adapter is merged before it is sent to them, which rounds differently."""
    here = sampled(learning(tmp_path / "here", **knobs), 3)
    agree(sampled(learning(tmp_path / "there", rollouts=Fleet(2, **QUICK), **knobs), 3), here)


def test_an_engine_that_dies_comes_back(asked: Asked, tmp_path: Path) -> None:  # noqa: F811
    """Killed in the middle of an answer, then between answers; each prompt is answered once, by the current weights."""
    r = connected(asked, tmp_path, fleet=Fleet(2, **QUICK))
    r.update(0)
    for version in range(1, 4):
        victims = [pid(engine) for engine in engines(r)]
        killer = threading.Timer(0.02 * version, os.kill, (victims[version % 2], signal.SIGKILL))
        killer.start()
        asked.ask(r)
        killer.join()
        r.update(version)
        assert len(r.ready) == 2, "the replaced engine must have the weights too"
        asked.ask(r)
    assert r.take_tally().tokens == 6 * sum(len(c.tokens) for c in asked.answers)


def test_an_engine_that_dies_while_it_starts_is_replaced(
    ray: Any,
    asked: Asked,  # noqa: F811
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    begin, begun = RayEngine._start, list[int]()

    def doomed(engine: RayEngine) -> Any:
        actor = begin(engine)
        begun.append(engine.number)
        if len(begun) == 1:
            ray.kill(actor)
        return actor

    monkeypatch.setattr(RayEngine, "_start", doomed)
    r = connected(asked, tmp_path, fleet=Fleet(1, **QUICK))
    r.update(0)
    asked.ask(r)
    assert begun == [0, 0]


def test_random_kills_lose_nothing(asked: Asked, tmp_path: Path) -> None:  # noqa: F811
    """Kills twenty engines at random times, while prompts are answered continuously."""
    rng, r = random.Random(0), connected(asked, tmp_path, fleet=Fleet(2, **QUICK | {"tries": 50}))
    r.update(0)
    end, killed = threading.Event(), 0

    def kill() -> None:
        nonlocal killed
        while killed < 20 and not end.wait(rng.uniform(0.1, 0.6)):
            engine = rng.choice(engines(r))
            actor = engine._actor
            if actor is None:
                continue
            try:
                os.kill(int(engine.cluster.get(actor.pid.remote(), 60)), signal.SIGKILL)
                killed += 1
            except Exception:
                continue
        end.set()

    killer = threading.Thread(target=kill)
    killer.start()
    rounds, until = 0, time.monotonic() + 400
    while not end.is_set() and time.monotonic() < until:
        asked.ask(r)
        rounds += 1
        r.update(rounds)
    end.set()
    killer.join()
    assert killed == 20
    assert r.take_tally().tokens == rounds * sum(len(c.tokens) for c in asked.answers)


def python(folder: Path) -> str:
    """Replaces the Python of an engine's environment: `-m MODULE` starts the test's own server."""
    script = folder / "python"
    script.write_text(f'#!/bin/sh\nPYTHONPATH={ROOT} exec {sys.executable} -m tests.engine_servers "$@"\n')
    script.chmod(0o755)
    return str(script)


@pytest.mark.parametrize("engine", ["vllm", "sglang"])
def test_programs_on_ray(engine: Any, asked: Asked, tmp_path: Path) -> None:  # noqa: F811
    """Each program is a process of a worker; it ends when its worker is killed, and another one replaces it."""
    r = connected(asked, tmp_path, fleet=Fleet(2, engine=engine, python=python(tmp_path), **QUICK))
    r.update(0)
    asked.ask(r)
    first = r.members[0]._server.url
    os.kill(pid(r.members[0]), signal.SIGKILL)
    ended(first)
    asked.ask(r)
    r.update(1)
    asked.ask(r)
    assert len(r.ready) == 2 and r.members[0]._server.url != first
    last = [member._server.url for member in r.members]
    OPENED.pop().close()
    for url in last:
        ended(url)


def ended(url: str) -> None:
    """Waits until a program no longer answers."""
    until = time.monotonic() + 60
    with Client(url, timeout=2) as client:
        while client.has("/health") and time.monotonic() < until:
            time.sleep(0.1)
        assert not client.has("/health"), "the program must end with its worker"


def test_a_silent_engine_is_replaced(asked: Asked, tmp_path: Path) -> None:  # noqa: F811
    """A suspended process does not answer; after `timeout` another one replaces it."""
    r = connected(asked, tmp_path, fleet=Fleet(1, **QUICK | {"timeout": 4.0}))
    r.update(0)
    stopped = pid(engines(r)[0])
    os.kill(stopped, signal.SIGSTOP)
    asked.ask(r)
    assert pid(engines(r)[0]) != stopped


@pytest.mark.parametrize(
    ("fleet", "text"),
    [
        (Fleet(1, num_gpus=1.0), r"zero\.rollouts\.num_gpus = 1\.0: 1 engines with 1 GPUs each need 1, but Ray has 0"),
        (Fleet(64), r"zero\.rollouts\.num_cpus = 1: 64 engines with 1 CPUs each need 64, but Ray has 4"),
    ],
)
def test_too_little_of_ray_is_said(fleet: Fleet, text: str, asked: Asked, tmp_path: Path) -> None:  # noqa: F811
    with pytest.raises(UserError, match=text):
        connected(asked, tmp_path, fleet=fleet)


RECIPE = """
import time

from finback.rollouts.fleet import Fleet
from finback.stages.grpo import GRPO
from finback.stages.grpo_training import Reinforcement
from finback.tasks.math import Chains

update = Reinforcement._update
Reinforcement._update = lambda *given, **more: time.sleep(0.5) or update(*given, **more)  # so that a kill finds it at work
recipe = [GRPO(name="zero", start={base!r}, task=Chains(2, 3), steps=8, prompts_per_step=4, num_generations=4, max_tokens=10, lr=1e-3,
               checkpoint_steps=2, patience=0, max_gap=9.0, max_staleness=2, rollouts=Fleet(2, backoff=0.05))]
"""


def test_a_trainer_that_is_killed_goes_on(ray: Any, base: Path, tmp_path: Path) -> None:  # noqa: F811
    """Two kills at random steps: every step runs once, all tokens are in the ledger, and engines end with it."""
    (tmp_path / "r.py").write_text(RECIPE.format(base=str(base)))
    command = [sys.executable, "-m", "finback", "run", str(tmp_path / "r.py"), "--runs", str(tmp_path), "--ranks", "1"]
    command += ["--ray", ray.get_runtime_context().gcs_address]
    stage, rng = tmp_path / "r" / "zero", random.Random(1)

    def lines(name: str) -> list[dict[str, Any]]:
        return list(read_lines(stage / name))

    for kill in range(3):
        with subprocess.Popen(command, env=environment(), stderr=subprocess.PIPE, start_new_session=True) as process:
            wanted = min(len(lines("metrics.jsonl")) + rng.randint(1, 2), 7)
            while kill < 2 and process.poll() is None and len(lines("metrics.jsonl")) < wanted:
                time.sleep(0.02)
            if kill < 2 and process.poll() is None:
                os.killpg(process.pid, signal.SIGKILL)
            _, said = process.communicate()
        if process.returncode == 0:
            break
    assert process.returncode == 0, said.decode()
    assert [line["step"] for line in lines("metrics.jsonl")] == list(range(1, 9))
    samples = lines("samples.jsonl")
    assert len(samples) == 8 * 16
    spent = sum(line.get("tokens_generated", 0) for line in lines("ledger.jsonl"))
    assert spent == sum(sample["tokens"] for sample in samples)
    assert not (stage / ".answers").exists()


SHARED = """
from finback.parallel.layout import Layout
from finback.rollouts.fleet import Fleet
from finback.rollouts.here import Here
from finback.stages.grpo import GRPO
from finback.tasks.math import Chains

knobs = dict(start={base!r}, task=Chains(2, 3), steps=3, prompts_per_step=4, num_generations=4, max_tokens=10, lr=1e-3, patience=0,
             layout=Layout(dp=2))
fleet = Fleet(2, dtype="fp32", backoff=0.05)
recipe = [GRPO(name="here", **knobs), GRPO(name="there", rollouts=fleet, **knobs)]
"""


def test_trainer_ranks_share_a_fleet(ray: Any, base: Path, tmp_path: Path) -> None:  # noqa: F811
    """Two ranks with their own prompts and one model sharded over both: the same answers as with their own engines."""
    (tmp_path / "r.py").write_text(SHARED.format(base=str(base)))
    command = [sys.executable, "-m", "finback", "run", str(tmp_path / "r.py"), "--runs", str(tmp_path), "--ranks", "2"]
    command += ["--ray", ray.get_runtime_context().gcs_address]
    done = subprocess.run(command, env=environment(), capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    made = [list(read_lines(tmp_path / "r" / name / "samples.jsonl")) for name in ("here", "there")]
    assert len(made[0]) == 3 * 16 and made[0] == made[1]
    models_after = [models.load(tmp_path / "r" / name).state_dict() for name in ("here", "there")]
    for name, tensor in models_after[0].items():
        torch.testing.assert_close(tensor, models_after[1][name], atol=1e-5, rtol=0)
