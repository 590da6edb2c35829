"""Asynchronous RL on a fleet whose processes are killed again and again: `python -m tests.fleet_faults ROOT KILLS SEED`.

Engines, idle workers of Ray and the trainer are killed at random moments, in runs of many steps on one local Ray; a killed
trainer is started again. Prints as JSON what was killed and what was wrong; exit code 1 if anything was. Needs Ray.
"""

import contextlib
import json
import os
import random
import signal
import subprocess
import sys
import time
from collections import Counter
from pathlib import Path
from typing import Any

import psutil

from finback.runs.files import read_lines
from tests.test_fleet import RECIPE
from tests.test_rollouts import learning
from tests.toy import ROOT, environment

STEPS = 60  # of each run
LIMIT = 120.0  # seconds without a new step after which a run counts as stuck
KINDS = (*["engine"] * 6, "worker", "trainer")


class Run:
    """One run of the recipe, started until it ends by itself."""

    def __init__(self, folder: Path, base: Path, address: str) -> None:
        folder.mkdir(parents=True)
        recipe = folder / "r.py"
        # an engine takes longer to start than some kills are apart
        text = (
            RECIPE.format(base=str(base))
            .replace("steps=8", f"steps={STEPS}")
            .replace("Fleet(2, ", "Fleet(2, tries=50, ")
        )
        recipe.write_text(text, encoding="utf-8")
        self.stage, self.log = folder / "r" / "zero", folder / "log.txt"
        self.command = [sys.executable, "-m", "finback", "run", str(recipe), "--runs", str(folder), "--ranks", "1"]
        self.command += ["--ray", address]
        self.start()

    def start(self) -> None:
        """Starts the trainer, anew or where it was."""
        with self.log.open("ab") as log:
            self.process = subprocess.Popen(
                self.command, env=environment(), stdout=log, stderr=log, start_new_session=True
            )

    def lines(self, name: str) -> list[dict[str, Any]]:
        return list(read_lines(self.stage / name))

    def steps(self) -> int:
        """The number of steps that were logged."""
        return len(self.lines("metrics.jsonl"))

    def faults(self) -> list[str]:
        """What is wrong with an ended run."""
        wrong, samples = [], self.lines("samples.jsonl")
        if self.process.returncode != 0:
            wrong.append(f"ended with {self.process.returncode}: {self.log.read_text(encoding='utf-8')[-800:]}")
        if [line["step"] for line in self.lines("metrics.jsonl")] != list(range(1, STEPS + 1)):
            wrong.append("steps are missing or repeated")
        if len(samples) != STEPS * 16:
            wrong.append(f"{len(samples)} of {STEPS * 16} answers")
        spent = sum(line.get("tokens_generated", 0) for line in self.lines("ledger.jsonl"))
        if spent != (made := sum(sample["tokens"] for sample in samples)):
            wrong.append(f"{spent} tokens in the ledger, {made} in answers")
        if (self.stage / ".answers").exists():
            wrong.append("the journal was left behind")
        return wrong


def victims(kind: str, run: Run) -> list[int]:
    """The processes of a kind."""
    if kind == "trainer":
        return [run.process.pid] if run.process.poll() is None else []
    title = "ray::FleetEngine" if kind == "engine" else "ray::IDLE"
    found = []
    for process in psutil.Process().children(recursive=True):  # of this script's Ray, not of another one
        with contextlib.suppress(psutil.Error):
            if " ".join(process.cmdline()).startswith(title):
                found.append(process.pid)
    return found


def disturb(run: Run, rng: random.Random, most: int) -> Counter[str]:
    """Kills up to `most` processes while a run lasts; returns how many of each kind."""
    killed: Counter[str] = Counter()
    kind, seen, since, delay = rng.choice(KINDS), -1, time.monotonic(), 0.0
    wanted = 1  # a step after which to kill, so that a run gets on between two kills
    while run.process.poll() is None:
        time.sleep(0.02)
        now = time.monotonic()
        if (steps := run.steps()) != seen:
            seen, since = steps, now
        if now - since > LIMIT:
            os.killpg(run.process.pid, signal.SIGKILL)
            break
        if seen < wanted or seen >= STEPS - 2 or now < since + delay or killed.total() == most:
            continue
        if kind == "worker" and not victims(kind, run):  # Ray keeps none
            kind = "engine"
        if not (found := victims(kind, run)):
            continue
        killed[kind] += 1
        if kind == "trainer":
            os.killpg(run.process.pid, signal.SIGKILL)
            run.process.wait()
            run.start()
        else:
            psutil.Process(rng.choice(found)).kill()
        kind, wanted, delay = rng.choice(KINDS), seen + 1, rng.uniform(0, 0.4)
    run.process.wait()
    return killed


def main(root: Path, kills: int, seed: int) -> dict[str, Any]:
    """Runs the recipe until enough processes have been killed."""
    import ray

    os.environ["PYTHONPATH"] = str(ROOT)
    ray.init(num_cpus=3, include_dashboard=False, log_to_driver=False, logging_level="ERROR", namespace="finback")
    address, rng = ray.get_runtime_context().gcs_address, random.Random(seed)
    learning(root)
    killed: Counter[str] = Counter()
    wrong, begin, number = list[str](), time.monotonic(), 0
    while killed.total() < kills:
        number += 1
        run = Run(root / f"run-{number}", root / "base", address)
        killed += disturb(run, rng, min(25, kills - killed.total()))
        wrong += [f"run {number}: {fault}" for fault in run.faults()]
        print(f"run {number}: {dict(killed)}, {len(wrong)} faults", file=sys.stderr, flush=True)
    ray.shutdown()
    left = [p.pid for p in psutil.process_iter(["cmdline"]) if str(root / "run-") in " ".join(p.info["cmdline"] or [])]
    wrong += [f"{len(left)} trainers were left"] if left else []
    seconds = round(time.monotonic() - begin)
    return {"killed": killed, "runs": number, "steps": number * STEPS, "seconds": seconds, "wrong": wrong}


if __name__ == "__main__":
    found = main(Path(sys.argv[1]).absolute(), int(sys.argv[2]), int(sys.argv[3]))
    print(json.dumps(found, indent=1))
    sys.exit(bool(found["wrong"]))
