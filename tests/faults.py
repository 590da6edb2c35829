"""Trains a layout on two torchrun agents and breaks them repeatedly: `python -m tests.faults ROOT EVENTS SEED`.

Ranks and agents are killed, suspended and asked to leave, and checkpoints are damaged. Ended agents restart, as by
Slurm. Prints as JSON what happened, how long each event took, and what was wrong; exit code 1 if anything was.
"""

import json
import os
import random
import re
import shutil
import signal
import subprocess
import sys
import time
from collections import Counter
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import psutil
import torch

from finback.checkpoint import models
from finback.parallel.launch import free_port
from finback.runs.files import read_lines
from tests.toy import WORDS, environment

RECIPE = """
from pathlib import Path
from finback.data.sources import Files
from finback.parallel.layout import Layout
from finback.stages.prepare import Prepare
from finback.stages.pretrain import Pretrain
from finback.train.rates import Phase
from tests.toy import CONFIG

recipe = [
    Prepare(name="prepare", text=(Files((str(Path(__file__).parent / "words.txt"),), name="words"),), vocab_size=320),
    Pretrain(name="base", data="prepare", model=CONFIG, mixture={"words": 1.0}, batch_size=4, seq_len=16, compute="fp32",
             phases=(Phase(64 * STEPS // 2, 0.0, 1.0), Phase(64 * STEPS // 2)), checkpoint_steps=CHECKPOINT_STEPS,
             layout=Layout(dp=2, ep=2)),
]
"""
CHECKPOINT_STEPS = 5
STEPS_PER_EVENT = 14
PATIENCE = 15  # seconds that a rank may stay silent
WITHIN = 60.0  # seconds within which the other ranks must report why they end
LIMIT = 240.0  # seconds until training continues or everything has ended: torchrun gives a suspended rank 30 of them
KINDS = (
    "kill rank",
    "stop rank",
    "term agent",
    "kill agent",
    "term rank",
    "flip shard",
    "cut manifest",
    "int agent",
    "drop manifest",
    "kill both",
)
WORDS_OF = {"kill rank": "has disconnected", "stop rank": "no sign of life", "kill agent": "has disconnected"}


@dataclass
class Cluster:
    """Two agents, which are restarted when they end, and their files."""

    root: Path
    restarts: int = 3
    port: int = 0
    agents: list[subprocess.Popen[bytes]] = field(default_factory=list)
    starts: int = 0
    # damaged checkpoints by inode of their folder, since another one may get the same name
    spoiled: set[int] = field(default_factory=set)

    @property
    def log(self) -> Path:
        return self.root / "log.txt"

    @property
    def stage(self) -> Path:
        return self.root / "runs" / "faults" / "base"

    def start(self) -> None:
        """Starts both agents."""
        self.port = free_port()
        self.agents = [self._agent() for _ in range(2)]

    def _agent(self) -> subprocess.Popen[bytes]:
        where = ["--rdzv-backend", "c10d", "--rdzv-endpoint", f"127.0.0.1:{self.port}", "--rdzv-id", self.root.name]
        sizes = ["--nnodes", "2", "--nproc-per-node", "1", "--max-restarts", str(self.restarts)]
        what = ["-m", "finback", "run", str(self.root / "faults.py"), "--runs", str(self.root / "runs")]
        command = [sys.executable, "-m", "finback.parallel.torchrun", *sizes, *where, *what]
        self.starts += 1
        variables = environment() | {"FINBACK_RANK_TIMEOUT": str(PATIENCE), "OMP_NUM_THREADS": "1"}
        with self.log.open("ab") as log:
            return subprocess.Popen(command, env=variables, stdout=log, stderr=log, start_new_session=True)

    def replace(self, place: int) -> None:
        """Restarts one agent, like a machine that comes back."""
        self.agents[place].wait()
        self.agents[place] = self._agent()

    def ranks(self, place: int) -> list[psutil.Process]:
        """The rank processes of an agent."""
        try:
            children = psutil.Process(self.agents[place].pid).children()
            return [p for p in children if "finback" in p.cmdline() and p.status() != psutil.STATUS_ZOMBIE]
        except psutil.Error:
            return []

    def has_ended(self) -> bool:
        return all(agent.poll() is not None for agent in self.agents)

    def step(self) -> int:
        """The last step in the metrics."""
        lines = read_lines(self.stage / "metrics.jsonl")
        return int(lines[-1]["step"]) if lines else 0

    def checkpoint(self) -> int:
        """The step of the newest undamaged checkpoint under its final name."""
        return max((int(p.name[5:]) for p in self.checkpoints() if p.stat().st_ino not in self.spoiled), default=0)

    def checkpoints(self) -> list[Path]:
        """All checkpoints under their final names, damaged ones included; the oldest first."""
        return sorted((p for p in self.stage.glob("sharded/step-*") if not p.suffix), key=lambda p: int(p.name[5:]))

    def is_finished(self) -> bool:
        return (self.stage / "manifest.json").is_file()

    def text(self, since: int = 0) -> str:
        """The output of agents and ranks from an offset in the log on."""
        return self.log.read_bytes()[since:].decode(errors="replace") if self.log.is_file() else ""

    def processes(self) -> list[psutil.Process]:
        """All remaining processes of agents and ranks."""
        every = psutil.process_iter(["cmdline"])
        named = [p for p in every if str(self.root) in " ".join(p.info["cmdline"] or [])]
        return [p for p in named if p.pid != os.getpid()]

    def end(self) -> None:
        """Kills the remaining processes."""
        for process in self.processes():
            process.kill()
        for agent in self.agents:
            agent.wait()


class Trial:
    """The events, their consequences, and what went wrong."""

    def __init__(self, cluster: Cluster, rng: random.Random) -> None:
        self.cluster, self.rng = cluster, rng
        self.wrong: list[str] = []
        self.took: dict[str, list[float]] = {}
        self.said: dict[str, list[float]] = {}

    def run(self, kind: str) -> bool:
        """Runs one event after some steps of training; False if training has ended before."""
        cluster = self.cluster
        if not self._advance(cluster.step() + self.rng.randint(6, STEPS_PER_EVENT - 2)):
            return False
        begin, mark = time.monotonic(), len(self.cluster.text().encode())
        expected = cluster.checkpoint()
        ends = self._do(kind)
        if kind in WORDS_OF:
            self._hear(kind, WORDS_OF[kind], mark, begin)
        self._settle(kind, begin, mark, ends)
        if ends and kind in ("flip shard", "cut manifest", "drop manifest"):
            expected = self._damage(kind)
        if ends and not cluster.is_finished():
            cluster.start()
        self._resumed(kind, expected, mark)
        self.took.setdefault(kind, []).append(round(time.monotonic() - begin, 1))
        return True

    def _do(self, kind: str) -> bool:
        """Breaks something; returns whether both agents must end because of it."""
        cluster, place = self.cluster, self.rng.randrange(2)
        ranks = cluster.ranks(place)
        if kind in ("kill rank", "stop rank", "term rank"):
            for rank in ranks:
                rank.send_signal({"k": signal.SIGKILL, "s": signal.SIGSTOP, "t": signal.SIGTERM}[kind[0]])
            return kind == "term rank"
        if kind == "kill agent":
            cluster.agents[place].kill()
            return False
        if kind == "kill both":
            for agent in cluster.agents:
                agent.kill()
            return True
        cluster.agents[place].send_signal(signal.SIGINT if kind == "int agent" else signal.SIGTERM)
        return True

    def _hear(self, kind: str, words: str, mark: int, begin: float) -> None:
        """Waits until a process reports the cause."""
        while words not in self.cluster.text(mark):
            if time.monotonic() - begin > WITHIN:
                self.wrong.append(f"{kind}: no process reported {words!r} within {WITHIN:.0f} s")
                return
            time.sleep(0.1)
        self.said.setdefault(kind, []).append(round(time.monotonic() - begin, 1))

    def _settle(self, kind: str, begin: float, mark: int, ends: bool) -> None:
        """Waits until both agents have ended, or the ranks have returned."""
        cluster = self.cluster
        while not cluster.has_ended():
            gone = [agent.poll() is not None for agent in cluster.agents]
            if not ends and any(gone):
                cluster.replace(gone.index(True))
            if not ends and "resumed at step" in cluster.text(mark):
                return
            if time.monotonic() - begin > LIMIT:
                self.wrong.append(f"{kind}: neither ended nor resumed after {LIMIT:.0f} s")
                cluster.end()
                break
            time.sleep(0.1)
        if not ends and not cluster.is_finished():  # both ended: they had no restarts left, or the store was lost
            cluster.start()

    def _damage(self, kind: str) -> int:
        """Damages the newest checkpoint; returns the step of the one that replaces it."""
        steps = [p for p in self.cluster.checkpoints() if p.stat().st_ino not in self.cluster.spoiled]
        if len(steps) < 2:
            return self.cluster.checkpoint()
        self.cluster.spoiled.add(steps[-1].stat().st_ino)
        manifest, shard = steps[-1] / "manifest.json", sorted(steps[-1].glob("*.safetensors"))[0]
        if kind == "flip shard":
            content = bytearray(shard.read_bytes())
            content[-self.rng.randint(1, 1000)] ^= 4
            shard.write_bytes(content)
        elif kind == "cut manifest":
            manifest.write_bytes(manifest.read_bytes()[: self.rng.randint(0, 200)])
        else:
            manifest.unlink()
        return int(steps[-2].name[5:])

    def _resumed(self, kind: str, expected: int, mark: int) -> None:
        """Checks that they resume from the newest undamaged checkpoint, and report it if it is not the newest."""
        begin = time.monotonic()
        while not (found := re.findall(r"resumed at step ([\d,]+)", self.cluster.text(mark))):
            if self.cluster.is_finished():
                return
            if time.monotonic() - begin > LIMIT or self.cluster.has_ended():
                self.wrong.append(f"{kind}: did not resume: {self.cluster.text(mark)[-600:]}")
                return
            time.sleep(0.1)
        step = int(found[0].replace(",", ""))
        is_damaged = kind in ("flip shard", "cut manifest", "drop manifest")
        if step < expected or (is_damaged and step != expected):
            self.wrong.append(f"{kind}: resumed from step {step}, not {expected}")
        if is_damaged and "falling back to the previous checkpoint" not in self.cluster.text(mark):
            self.wrong.append(f"{kind}: skipped the damaged checkpoint without a message")

    def _advance(self, step: int) -> bool:
        """Waits for this step; False if training has ended, successfully or not."""
        begin, cluster = time.monotonic(), self.cluster
        while cluster.step() < step and not cluster.is_finished():
            if cluster.has_ended() or time.monotonic() - begin > 2 * LIMIT:
                self.wrong.append(f"stuck at step {cluster.step()}: {cluster.text()[-600:]}")
                return False
            time.sleep(0.05)
        return not cluster.is_finished()


def compare(root: Path, whole: Path, steps: int) -> list[str]:
    """The differences from an undisturbed run."""
    ours, theirs = (read_lines(r / "runs/faults/base/metrics.jsonl") for r in (root, whole))
    wrong = []
    if [r["step"] for r in ours] != list(range(1, steps + 1)):
        wrong.append("steps are missing or repeated")
    if [r["loss"] for r in ours] != [r["loss"] for r in theirs]:
        wrong.append("losses differ")
    one, two = (models.load(r / "runs/faults/base").state_dict() for r in (root, whole))
    if one.keys() != two.keys() or not all(torch.equal(one[name], two[name]) for name in one):
        wrong.append("weights differ")
    return wrong


def write(root: Path, steps: int) -> None:
    """Writes the recipe and its text."""
    root.mkdir(parents=True)
    (root / "words.txt").write_text(WORDS, encoding="utf-8")
    recipe = RECIPE.replace("CHECKPOINT_STEPS", str(CHECKPOINT_STEPS)).replace("STEPS", str(steps))
    (root / "faults.py").write_text(recipe, encoding="utf-8")


def main(root: Path, events: int, seed: int) -> dict[str, Any]:
    """Runs all kinds of events in turn, in a new order each round; returns the results."""
    steps, rng = STEPS_PER_EVENT * events + 20, random.Random(seed)
    broken, whole = root / "broken", root / "whole"
    for each in (broken, whole):
        shutil.rmtree(each, ignore_errors=True)
        write(each, steps)
    begin = time.monotonic()
    cluster = Cluster(broken)
    trial, done = Trial(cluster, rng), Counter[str]()
    kinds = [kind for _ in range(-(-events // len(KINDS))) for kind in rng.sample(KINDS, len(KINDS))]
    try:
        cluster.start()
        for kind in kinds[:events]:
            print(f"{time.monotonic() - begin:.0f} s, step {cluster.step()}: {kind}", file=sys.stderr, flush=True)
            if not trial.run(kind):
                break
            done[kind] += 1
        while not cluster.is_finished() and not cluster.has_ended():
            time.sleep(0.2)
        for agent in cluster.agents:
            agent.wait(60)
        time.sleep(2)
        trial.wrong += [f"left behind: {p.pid} {p.cmdline()}" for p in cluster.processes()]
    finally:
        cluster.end()
    seconds = round(time.monotonic() - begin)
    command = [
        sys.executable,
        "-m",
        "finback",
        "run",
        str(whole / "faults.py"),
        "--runs",
        str(whole / "runs"),
        "--ranks",
        "2",
    ]
    subprocess.run(command, env=environment(), check=True, stderr=subprocess.DEVNULL, stdout=subprocess.DEVNULL)
    wrong = trial.wrong + (compare(broken, whole, steps) if cluster.is_finished() else ["it did not finish"])
    found = {"events": dict(done), "seconds_until_gone_on": trial.took, "seconds_until_said": trial.said}
    return found | {"agents_started": cluster.starts, "steps": steps, "seconds": seconds, "wrong": wrong}


if __name__ == "__main__":
    found = main(Path(sys.argv[1]).resolve(), int(sys.argv[2]), int(sys.argv[3]))
    print(json.dumps(found, indent=1))
    sys.exit(bool(found["wrong"]))
