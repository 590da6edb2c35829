"""The whole pipeline at toy size: killed at any point it ends with the same results, and it never uses the network."""

import itertools
import json
import os
import random
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Sequence
from functools import partial
from pathlib import Path
from typing import Any

import psutil
import pytest
import torch
from safetensors.torch import load_file

from finback.runs.files import read_lines
from tests.road import TRAINED, write_road
from tests.toy import environment, finback, finback_process, write_recipe


def results(root: Path) -> dict[str, Any]:
    """summary.json without the costs, which depend on time."""
    summary = json.loads((root / "summary.json").read_text())
    for stage in summary["stages"].values():
        stage.pop("cost")
        for source in stage["results"].get("sources", {}).values():
            source.pop("files", None)  # their places
    return summary


def start(recipe: Path, runs: Path, ranks: int) -> subprocess.Popen[bytes]:
    command = [sys.executable, "-m", "finback", "run", str(recipe), "--runs", str(runs), "--ranks", str(ranks)]
    quiet = subprocess.DEVNULL
    return subprocess.Popen(command, env=environment(), stdout=quiet, stderr=quiet, start_new_session=True)


def wait_for(runs: Path, stage: str, child: subprocess.Popen[bytes], delay: float) -> None:
    """Waits until this very process has begun a stage (it then writes the stage's knobs), and `delay` seconds more."""
    knobs, began = runs / "toy" / stage / "config.json", time.time()
    while child.poll() is None and not (knobs.is_file() and knobs.stat().st_mtime >= began):
        time.sleep(0.01)
    time.sleep(delay)


def to_its_end(folder: Path, ranks: int) -> None:
    """Runs a folder's recipe, or the rest of it; one rank runs in this process."""
    command = finback if ranks == 1 else finback_process
    done = command("run", folder / "toy.py", "--runs", folder / "runs", "--ranks", ranks)
    assert done.returncode == 0, done.stderr


def uninterrupted(folder: Path, ranks: int) -> Path:
    """A folder with a recipe and its run."""
    write_recipe(folder)
    to_its_end(folder, ranks)
    return folder


@pytest.fixture(scope="module")
def alone(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """An uninterrupted run on one rank."""
    return uninterrupted(tmp_path_factory.mktemp("alone"), 1)


@pytest.fixture(scope="module")
def finished(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """An uninterrupted run on two ranks."""
    return uninterrupted(tmp_path_factory.mktemp("uninterrupted"), 2)


def steps_in(folder: Path) -> list[Path]:
    """The step checkpoints of a stage, oldest first."""
    return sorted(folder.glob("step-*.safetensors"))


def kill(child: subprocess.Popen[bytes]) -> None:
    os.killpg(child.pid, signal.SIGKILL)
    child.wait()


def press(times: int, child: subprocess.Popen[bytes]) -> None:
    """Ctrl-C, once to stop at a safe point or twice to stop immediately."""
    for _ in range(times):
        child.send_signal(signal.SIGINT)
        time.sleep(0.05)
    assert child.wait(60) == 130


def kill_and_finish(
    finished: Path,
    tmp_path: Path,
    moments: list[tuple[str, float]],
    ends: Sequence[Callable[[subprocess.Popen[bytes]], None]] = (),
    tear: bool = False,
    order: Sequence[str] = ("prepare", "base", "before", "zero", "after"),
    trained: Sequence[str] = ("base", "zero"),
    ranks: int = 2,
) -> int:
    """Ends the run at each moment, restarts it each time, and compares; returns how many moments hit their stage.

    `ends` are the ways to end it at the moments, in order; the default is kill -9.

    `tear` waits for two checkpoints, truncates the newer one after the kill, as a power failure may, and returns how
    often it did.
    """
    shutil.copy(finished / "words.txt", tmp_path), shutil.copy(finished / "toy.py", tmp_path)
    hits = 0
    for (wanted, delay), end in itertools.zip_longest(moments, ends, fillvalue=kill):
        # a stage may have finished just before the last kill; then the next one runs
        later = order[order.index(wanted) :]
        left = [s for s in later if not (tmp_path / "runs/toy" / s / "manifest.json").is_file()]
        if not left:
            break
        stage = left[0]
        child = start(tmp_path / "toy.py", tmp_path / "runs", ranks)
        wait_for(tmp_path / "runs", stage, child, delay)
        folder = tmp_path / "runs/toy" / stage
        while tear and len(steps_in(folder)) < 2 and child.poll() is None:
            assert not (folder / "manifest.json").is_file(), f"{stage} ended before it had two checkpoints"
            time.sleep(0.005)
        hits += not tear and child.poll() is None
        end(child)
        time.sleep(0.5)  # the ranks notice within a fifth of a second, and may finish a stage meanwhile
        steps = steps_in(folder)
        if tear and len(steps) > 1:  # a single damaged checkpoint is reported instead of skipped
            steps[-1].write_bytes(steps[-1].read_bytes()[:-1000])
            hits += 1
    to_its_end(tmp_path, ranks)
    assert results(tmp_path / "runs/toy") == results(finished / "runs/toy")
    for stage in trained:
        ours, theirs = (read_lines(f / f"runs/toy/{stage}/metrics.jsonl") for f in (tmp_path, finished))
        assert [(r["step"], r.get("loss")) for r in ours] == [(r["step"], r.get("loss")) for r in theirs]
        one, two = (load_file(f / f"runs/toy/{stage}/model.safetensors") for f in (finished, tmp_path))
        assert one.keys() == two.keys() and all(torch.equal(one[name], two[name]) for name in one)
    return hits


def test_killed_it_ends_with_the_same_bits(alone: Path, tmp_path: Path) -> None:
    assert kill_and_finish(alone, tmp_path, [("base", 0.5)], ranks=1) == 1


@pytest.mark.slow
def test_two_ranks_stopped_and_killed_end_with_the_same_bits(finished: Path, tmp_path: Path) -> None:
    moments = [("base", 0.5), ("zero", 0.3)]
    assert kill_and_finish(finished, tmp_path, moments, [partial(press, 1), kill]) == 2


def ask(whom: str, child: subprocess.Popen[bytes]) -> None:
    """Sends SIGTERM to the parent, or to one of the ranks alone: all ranks stop at a safe point."""
    ranks = [p for p in psutil.Process(child.pid).children() if p.environ().get("RANK") == whom]
    (ranks[0] if ranks else child).send_signal(signal.SIGTERM)
    assert child.wait(60) == 130


@pytest.mark.slow
def test_asked_by_sigterm_or_pressed_twice_it_ends_with_the_same_bits(finished: Path, tmp_path: Path) -> None:
    moments = [("base", 0.5), ("base", 0.8), ("base", 0.8), ("zero", 0.5), ("zero", 0.5)]
    ends = [partial(press, 2), *(partial(ask, whom) for whom in ("parent", "1", "0", "parent"))]
    assert kill_and_finish(finished, tmp_path, moments, ends) >= 4


@pytest.mark.slow
def test_torn_checkpoints_are_passed_over(finished: Path, tmp_path: Path) -> None:
    # RL ends soon after its second checkpoint, and may finish before the kill
    assert kill_and_finish(finished, tmp_path, [("base", 0.0), ("zero", 0.0)], tear=True) >= 1


@pytest.mark.slow
def test_killed_at_ten_random_moments_it_ends_with_the_same_bits(finished: Path, tmp_path: Path) -> None:
    rng = random.Random(0)
    stages = ["prepare", "prepare", "base", "base", "base", "before", "before", "zero", "zero", "after"]
    longest = {"base": 0.8, "zero": 0.4}  # seconds into a stage; the others take less than one
    moments = [(stage, rng.uniform(0, longest.get(stage, 0.1))) for stage in stages]
    assert kill_and_finish(finished, tmp_path, moments) == 10


@pytest.mark.slow
def test_a_whole_road_killed_at_twenty_random_moments_ends_with_the_same_bits(tmp_path: Path) -> None:
    """Every kind of stage: RL with a reference, rejection sampling, SFT, distillation on traces and on-policy."""
    whole, killed = tmp_path / "whole", tmp_path / "killed"
    whole.mkdir(), killed.mkdir()
    write_road(whole)
    to_its_end(whole, 2)
    order = list(json.loads((whole / "runs/toy/summary.json").read_text())["stages"])
    rng = random.Random(0)
    moments = sorted((rng.randrange(len(order)), rng.uniform(0, 0.8)) for _ in range(20))
    asked = [(order[place], delay) for place, delay in moments]
    # if a stage ends early its kill hits the next stage, or none at the very end
    assert kill_and_finish(whole, killed, asked, order=order, trained=TRAINED) >= 15
    for name in ("zero", "dev2"):
        ours, theirs = (read_lines(f / f"runs/toy/{name}/samples.jsonl") for f in (killed, whole))
        assert ours == theirs and len({r["step"] for r in ours}) == (6 if name == "zero" else 4)
    kept = [(f / "runs/toy/cold/traces.jsonl").read_bytes() for f in (killed, whole)]
    assert kept[0] == kept[1]


@pytest.mark.slow
def test_torchrun_starts_the_ranks_again_when_one_is_killed(finished: Path, tmp_path: Path) -> None:
    shutil.copy(finished / "words.txt", tmp_path), shutil.copy(finished / "toy.py", tmp_path)
    options = ["--nproc-per-node", "2", "--max-restarts", "2", "--standalone", "-m"]
    arguments = ["finback", "run", str(tmp_path / "toy.py"), "--runs", str(tmp_path / "runs")]
    command = [sys.executable, "-m", "torch.distributed.run", *options, *arguments]
    output = tmp_path / "output.txt"
    with output.open("w") as log:
        agent = subprocess.Popen(command, env=environment(), stdout=log, stderr=log)
    wait_for(tmp_path / "runs", "base", agent, 0.0)
    while not steps_in(tmp_path / "runs/toy/base"):
        assert agent.poll() is None, output.read_text()
        time.sleep(0.01)
    ranks = [p for p in psutil.Process(agent.pid).children(recursive=True) if "finback" in p.cmdline()]
    victim = next(p for p in ranks if p.environ().get("RANK") == "1")
    victim.kill()
    assert agent.wait(200) == 0, output.read_text()
    assert "resumed at" in output.read_text()
    assert results(tmp_path / "runs/toy") == results(finished / "runs/toy")


def test_a_second_run_only_notices_what_is_done(alone: Path) -> None:
    before = {p: p.stat().st_mtime_ns for p in (alone / "runs").rglob("*.safetensors")}
    done = finback("run", alone / "toy.py", "--runs", alone / "runs", "--json")
    assert done.returncode == 0
    assert json.loads(done.stdout)["recipe"] == "toy"
    assert {p: p.stat().st_mtime_ns for p in (alone / "runs").rglob("*.safetensors")} == before


def test_summary_holds_what_is_promised(alone: Path) -> None:
    stages = json.loads((alone / "runs/toy/summary.json").read_text())["stages"]
    assert list(stages) == ["prepare", "base", "before", "zero", "after"]
    cost = stages["base"]["cost"]
    assert cost["tokens_trained"] == stages["base"]["results"]["tokens"] > 0
    assert cost["wall_seconds"] > 0 and cost["flops"] > 0 and 0 < cost["mfu"] < 1
    assert cost["energy_wh"] > 0 and cost["money_usd"] > 0 and "estimate" in cost["basis"]
    exam = stages["after"]["results"]["evaluations"][0]
    assert exam["n"] == 24 and exam["interval"][0] <= exam["accuracy"] <= exam["interval"][1]
    assert exam["mean_tokens"] > 0 and 0 <= exam["truncated"] <= 1
    assert len((alone / "runs/toy/after/sampled.jsonl").read_text().splitlines()) == 24
    assert (alone / "runs/toy/learning.png").stat().st_size > 5_000
    gaps = [r["gap_max"] for r in read_lines(alone / "runs/toy/zero/metrics.jsonl")]
    assert len(gaps) == 8 and max(gaps) <= 1e-4
    assert stages["base"]["results"]["probe_reached"] is False  # a toy model cannot reach it, and the results say so
    assert "DID NOT PASS ITS PROBE" in finback("show", alone / "runs/toy").stdout


@pytest.mark.slow
def test_no_socket_is_opened_at_run_time(tmp_path: Path) -> None:
    """One rank, in a process where opening any socket raises."""
    recipe = write_recipe(tmp_path)
    code = f"""
import socket, sys
def refuse(*a, **k): raise AssertionError("a socket was opened")
socket.socket.__init__ = refuse
socket.create_connection = socket.getaddrinfo = refuse
from pathlib import Path
from finback.runs import recipe as recipes
from finback.parallel.mesh import World
from finback.runs.folder import prepare_folder
import torch
torch.set_num_threads(1)
plan = recipes.load(Path({str(recipe)!r}))
root = Path({str(tmp_path / "runs")!r}) / "toy"
prepare_folder(root); recipes.claim(plan, root, 0)
recipes.execute(plan, root, 0, World(), lambda run: None)
from finback.report import chat, summary
from finback.report.options import ChatOptions
summary.summarize(root)
chat.loop(ChatOptions(model=root, max_tokens=16), True, False)
"""
    done = subprocess.run(
        [sys.executable, "-c", code], env=environment(), input="1+2=?\nhello\n", capture_output=True, text=True
    )
    assert done.returncode == 0, done.stderr
    assert [turn["user"] for turn in json.loads(done.stdout)["dialogue"]] == ["1+2=?", "hello"]


def test_chat_answers_on_stdout(alone: Path) -> None:
    done = finback("chat", alone / "runs/toy", "--max-tokens", 8, input="1+2=?\n/new\nhi\n")
    assert done.returncode == 0 and len(done.stdout.splitlines()) >= 2, done.stderr
    again = finback("chat", alone / "runs/toy", "--max-tokens", 8, input="1+2=?\n/new\nhi\n")
    assert again.stdout == done.stdout


def test_a_damaged_model_is_named(alone: Path, tmp_path: Path) -> None:
    shutil.copytree(alone / "runs", tmp_path / "runs")
    weights = tmp_path / "runs/toy/base/model.safetensors"
    weights.write_bytes(weights.read_bytes()[:-100])
    shutil.rmtree(tmp_path / "runs/toy/before")
    done = finback("run", alone / "toy.py", "--runs", tmp_path / "runs", "--ranks", 1)
    assert done.returncode == 2 and "model.safetensors" in done.stderr and "Traceback" not in done.stderr
