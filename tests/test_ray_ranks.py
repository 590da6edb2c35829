"""Trainer ranks that Ray places. The tests with a real Ray are of `make test-scale`."""

import os
import signal
import subprocess
import sys
import time
from contextlib import ExitStack
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import psutil
import pytest
import torch

from finback.checkpoint import models
from finback.client import RequestFailed
from finback.config import UserError
from finback.parallel import launch, ray_cluster, ray_ranks
from finback.parallel.ray_ranks import Place, RankHost, launch_ranks
from finback.rollouts.fleet import Fleet
from finback.runs.files import read_lines
from finback.stages.grpo import GRPO
from finback.tasks.math import Chains
from tests.fleets import FakeCluster
from tests.test_rollouts import base  # noqa: F401
from tests.toy import environment

RECIPE = """
import time

from finback.stages.grpo import GRPO
from finback.stages.grpo_training import Reinforcement
from finback.tasks.math import Chains

update = Reinforcement._update
Reinforcement._update = lambda *given, **more: time.sleep(0.5) or update(*given, **more)  # so that a signal finds it at work
recipe = [GRPO(name="zero", start={base!r}, task=Chains(2, 3), steps=8, prompts_per_step=4, num_generations=4, max_tokens=10, lr=1e-3,
               checkpoint_steps=1, patience=0, max_gap=9.0)]
"""


class FakeRay:
    """Hosts in this process in place of Ray's actors."""

    def __init__(self) -> None:
        self.resources, self.ended = {"CPU": 8.0}, 0

    def cluster_resources(self) -> dict[str, float]:
        return self.resources

    def get_runtime_context(self) -> SimpleNamespace:
        return SimpleNamespace(gcs_address="10.0.0.5:6379")


class HostCluster(FakeCluster):
    """Hosts of ranks in this process, in place of ray_cluster.Cluster."""

    def __init__(self, ray: FakeRay, asked: ray_cluster.Room, field: str, is_owner: bool) -> None:
        super().__init__(ExitStack())
        self.ray, self.asked = ray, asked

    def reserve(self) -> None:
        pass

    def end(self, actor: Any) -> None:
        actor.made._process.kill()  # as Ray does with the children of a worker
        self.ray.ended += 1

    def leave(self) -> None:
        for actor in self.actors:
            actor.made._process.kill()
            actor.made._process.wait()
            for each in actor.made._written:
                each.close()


@pytest.fixture
def ray(monkeypatch: pytest.MonkeyPatch) -> FakeRay:
    fake = FakeRay()
    monkeypatch.setattr(ray_cluster, "imported", lambda field, value: fake)
    monkeypatch.setattr(ray_cluster, "connect", lambda *given: None)
    monkeypatch.setattr(ray_cluster, "Cluster", HostCluster)
    monkeypatch.setattr(ray_cluster, "node_address", lambda: "10.0.0.7")
    monkeypatch.setattr(ray_cluster, "reserved_gpus", lambda: ())
    return fake


def programs(monkeypatch: pytest.MonkeyPatch, text: str) -> None:
    """Ranks run `text` in place of finback."""
    popen = subprocess.Popen
    fake = lambda command, **own: popen([sys.executable, "-c", text], **own)  # noqa: E731
    monkeypatch.setattr(ray_ranks, "subprocess", SimpleNamespace(Popen=fake, DEVNULL=subprocess.DEVNULL))


@pytest.mark.parametrize(
    ("text", "code", "out", "err"),
    [
        ("print('summary' * (RANK == '0')); sys.stderr.write('step 1\\n' * (RANK == '0'))", 0, "summary", "step 1"),
        (
            "sys.exit(print('no such file', file=sys.stderr) or 2 if RANK == '1' else time.sleep(60))",
            2,
            "",
            "no such file",
        ),
        ("os.kill(os.getpid(), 9) if RANK == '1' else time.sleep(60)", 1, "", "rank 1 was killed (signal 9)"),
    ],
)
def test_ranks_are_supervised(
    text: str, code: int, out: str, err: str, ray: FakeRay, monkeypatch: pytest.MonkeyPatch, capsys: Any
) -> None:
    """Rank 0's output is passed on; the output of another rank is shown if that one fails, and the others are ended."""
    programs(monkeypatch, f"import os, sys, time; RANK = os.environ['RANK']; {text}")
    assert launch_ranks((), ["run", "r.py"], 2, "auto") == code
    said = capsys.readouterr()
    assert out in said.out and err in said.err
    assert ray.ended == (code != 0)


def test_a_lost_machine_is_a_killed_rank(ray: FakeRay, monkeypatch: pytest.MonkeyPatch, capsys: Any) -> None:
    programs(monkeypatch, "import time; time.sleep(60)")

    def look(self: RankHost, seen: Any) -> None:
        raise RequestFailed("was lost")

    monkeypatch.setattr(RankHost, "look", look)
    assert launch_ranks((), ["run", "r.py"], 2, "auto") == 1
    assert "rank 0 was killed (signal 9); run the same command to continue" in capsys.readouterr().err


def test_ranks_find_each_other() -> None:
    """Two machines with two GPUs each: local numbers, GPUs that NCCL may reach, and the first rank's address."""
    places = [Place(f"10.0.0.{7 + i // 2}", (str(i % 2),), 4000 + i) for i in range(4)]
    found = [ray_ranks._environment(places, rank) for rank in range(4)]
    assert [each["LOCAL_RANK"] for each in found] == ["0", "1", "0", "1"]
    assert {each["CUDA_VISIBLE_DEVICES"] for each in found} == {"0,1"}
    assert {(each["MASTER_ADDR"], each["MASTER_PORT"], each["WORLD_SIZE"]) for each in found} == {
        ("10.0.0.7", "4000", "4")
    }
    assert all("GLOO_SOCKET_IFNAME" not in each for each in found)
    alone = ray_ranks._environment(places[:2], 1)
    assert alone["MASTER_ADDR"] == "127.0.0.1" and alone["LOCAL_WORLD_SIZE"] == "2"


def test_ranks_of_a_machine_adjoin() -> None:
    hosts = [SimpleNamespace(place=SimpleNamespace(remote=lambda a=a: Place(a, (), 1))) for a in ("x", "y", "x", "y")]
    cluster: Any = SimpleNamespace(get=lambda call, seconds: call)
    assert [place.address for _, place in ray_ranks._placed(hosts, cluster)] == ["x", "x", "y", "y"]


def test_too_little_room_is_said(ray: FakeRay, tmp_path: Path) -> None:
    """Before anything starts, and counting the engines that come later."""
    fleet = GRPO(name="zero", start="base", task=Chains(2, 3), rollouts=Fleet(3, num_cpus=2))
    match = r"--ranks = 4: they need 4 CPUs and the recipe's engines 6, but Ray has 8\. Lower it"
    with pytest.raises(UserError, match=match):
        launch_ranks((fleet,), [], 4, "auto")
    ray.resources["GPU"] = 3.0
    with pytest.raises(UserError, match=r"--ranks = 2: they need 2 GPUs and the recipe's engines 2, but Ray has 3\."):
        launch_ranks((replace(fleet, rollouts=Fleet(2, num_gpus=1)),), [], 2, "auto")
    shared = GRPO(name="zero", start="base", task=Chains(2, 3), rollouts=Fleet(1, colocated=True))
    with pytest.raises(UserError, match=r"--ranks = 2: a fleet is colocated"):
        launch_ranks((shared,), [], 2, "auto")
    with pytest.raises(UserError, match=r"runs = '/nowhere': no such folder on 10\.0\.0\.7"):
        RankHost().start([], "/nowhere", {})


def test_an_address_without_ray_is_said_at_once() -> None:
    """Ray itself would try for minutes."""
    room = ray_cluster.Room("x", 1, 1, 0, f"127.0.0.1:{launch.free_port()}")
    with pytest.raises(UserError, match=r"x\.address = '127\.0\.0\.1:\d+': nothing answers there .*ray start --head"):
        ray_cluster.connect(SimpleNamespace(is_initialized=lambda: False), room, "x")


@pytest.mark.scale
def test_two_ranks_are_stopped_killed_and_go_on(base: Path, tmp_path: Path) -> None:  # noqa: F811
    """A request to stop, a killed rank, a killed launcher: the run ends as on ranks that the command starts itself."""
    found = pytest.importorskip("ray")
    os.environ["PYTHONPATH"] = environment()["PYTHONPATH"]
    found.init(num_cpus=2, include_dashboard=False, log_to_driver=False, logging_level="ERROR", namespace="finback")
    try:
        for name in ("here", "there"):
            (tmp_path / name).mkdir()
            (tmp_path / name / "r.py").write_text(RECIPE.format(base=str(base)))
        command = [sys.executable, "-m", "finback", "run", "r.py", "--runs", ".", "--ranks", "2"]
        subprocess.run(command, env=environment(), cwd=tmp_path / "here", check=True, capture_output=True)
        command += ["--ray", found.get_runtime_context().gcs_address]
        said = [
            _disturbed(command, tmp_path / "there", kind, step) for kind, step in zip(KINDS, (2, 4, 6, 99), strict=True)
        ]
    finally:
        found.shutdown()
    assert "interrupted; run the same command to continue" in said[0]
    assert "run the same command to continue" in said[1]
    assert [line["step"] for line in read_lines(tmp_path / "there/r/zero/metrics.jsonl")] == list(range(1, 9))
    here, there = (models.load(tmp_path / name / "r" / "zero").state_dict() for name in ("here", "there"))
    for name, tensor in here.items():
        assert torch.equal(tensor, there[name]), name


KINDS = ("stop", "rank", "launcher", "")
CODES = {"stop": launch.INTERRUPTED, "rank": 1, "launcher": -signal.SIGKILL, "": 0}


def _disturbed(command: list[str], folder: Path, kind: str, step: int) -> str:
    """Runs the command, disturbs it after a step, and returns what it has written to stderr."""
    log = folder / "r" / "zero" / "metrics.jsonl"
    with subprocess.Popen(command, env=environment(), cwd=folder, stderr=subprocess.PIPE, text=True) as process:
        while process.poll() is None and kind and len(list(read_lines(log))) < step:
            time.sleep(0.02)
        if kind == "rank":
            next(iter(_ranks())).kill()
        elif kind:
            process.send_signal(signal.SIGTERM if kind == "stop" else signal.SIGKILL)
        _, said = process.communicate()
    assert process.returncode == CODES[kind], (kind, said)
    until = time.monotonic() + 30
    while _ranks() and time.monotonic() < until:
        time.sleep(0.1)
    assert not _ranks(), "ranks must end with the command"
    return said


def _ranks() -> list[psutil.Process]:
    """The ranks that Ray's workers run."""
    found = []
    for process in psutil.Process().children(recursive=True):
        try:
            if "FINBACK_JOB" in process.environ() and process.cmdline()[1:3] == ["-m", "finback"]:
                found.append(process)
        except psutil.Error:
            continue
    return found
