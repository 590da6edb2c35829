"""Runs a road on two ranks and kills both -9 at random moments: `python -m tests.killed_road ROOT KILLS SEED`.

SFT and RL of all weights, and of an adapter on a quantized base, with expert parallelism. Ranks are forked, so that
twenty kills take minutes. Prints as JSON where ranks were killed and what differs from an undisturbed road; exit code 1
if anything does.
"""

import json
import os
import random
import signal
import sys
import time
import traceback
from collections import Counter
from pathlib import Path
from typing import Any

import torch

from finback.checkpoint import models
from finback.parallel import execute
from finback.parallel.launch import free_port
from finback.runs import recipe as recipes
from finback.runs.files import MANIFEST, read_lines
from finback.train import sharded_adapter
from tests.tuned import prepared

RECIPE = """
from finback.model.lora import LoRA
from finback.parallel.layout import Layout
from finback.stages.grpo import GRPO
from finback.stages.prepare import TaskText
from finback.stages.sft import SFT
from finback.stages.validation import Validation
from finback.tasks.math import Chains
from finback.train.grpo_loss import Objective

task, layout, adapter = Chains(2, 3), Layout(dp=2, ep=2), LoRA(rank=4, base="nf4")
text = (TaskText(name="sums", tasks=(task,), documents=60, think=0.0),)
lessons = dict(text=text, batch_size=3, seq_len=64, checkpoint_steps=1, layout=layout)
answers = dict(task=task, prompts_per_step=4, num_generations=4, max_tokens=8, patience=0, checkpoint_steps=1,
               objective=Objective(beta=0.01), layout=layout)
recipe = [
    SFT(name="taught", start=BASE, epochs=2, lr=1e-3, moments="int8", **lessons),
    GRPO(name="rl", start="taught", steps=STEPS, lr=1e-4, reference_steps=2,
         validation=Validation(task=task, problems=6, every_steps=3, max_tokens=6), **answers),
    SFT(name="adapted", start="rl", epochs=2, lr=1e-3, mtp_weight=0.0, adapter=adapter, **lessons),
    GRPO(name="adapted_rl", start="adapted", steps=STEPS, lr=1e-3, adapter=adapter, **answers),
]
"""
RANKS, STEPS = 2, 5  # the most steps of a child before its kill,
PAUSE, START = 1.0, 5.0  # and the most seconds after those steps, or after its start
LIMIT = 300.0  # seconds within which a step must finish


def begin(recipe: Path, runs: Path, log: Path) -> list[int]:
    """Forks the ranks, which run the rest of the recipe; returns their process ids."""
    port, children = free_port(), []
    for rank in range(RANKS):
        child = os.fork()
        if child:
            children.append(child)
            continue
        names = {"RANK": rank, "LOCAL_RANK": rank, "WORLD_SIZE": RANKS, "MASTER_PORT": port, "MASTER_ADDR": "127.0.0.1"}
        os.environ |= {name: str(value) for name, value in names.items()} | {"GLOO_SOCKET_IFNAME": "lo"}
        with log.open("ab") as out:
            os.dup2(out.fileno(), 1)
            os.dup2(out.fileno(), 2)
        try:
            execute.execute(recipes.load(recipe), runs / recipe.stem, 0)
            os._exit(0)
        except BaseException:
            traceback.print_exc()
            os._exit(1)
    return children


def ended(children: list[int]) -> bool:
    """Whether all ranks have ended by themselves, without an error."""
    codes = [os.waitid(os.P_PID, child, os.WEXITED | os.WNOHANG | os.WNOWAIT) for child in children]
    assert all(code is None or code.si_status == 0 for code in codes), "a rank failed: see the log"
    return all(code is not None for code in codes)


def steps(road: Path) -> list[tuple[str, int]]:
    """Every logged step with its stage."""
    logs = sorted(road.glob("*/metrics.jsonl"), key=lambda path: path.stat().st_ctime)
    return [(path.parent.name, line["step"]) for path in logs for line in read_lines(path) if "loss" in line]


def killed(recipe: Path, runs: Path, log: Path, after: int, delay: float) -> bool:
    """Kills the ranks `delay` seconds after so many steps, or after their start; False if they finished first."""
    road, until = runs / recipe.stem, time.monotonic() + LIMIT
    last = steps(road)[-1:]
    children, taken = begin(recipe, runs, log), 0
    while taken < after and not ended(children):
        assert time.monotonic() < until, "no step was logged: see the log"
        time.sleep(0.02)
        if (now := steps(road)[-1:]) and now != last:
            last, taken = now, taken + 1
    time.sleep(delay)
    is_over = ended(children)
    for child in children:
        os.kill(child, signal.SIGKILL)
    for child in children:
        os.waitpid(child, 0)
    return not is_over


def compare(ours: Path, whole: Path) -> list[str]:
    """The differences between two roads."""
    wrong = []
    for stage in ("taught", "rl", "adapted", "adapted_rl"):
        logs = [
            [(r["step"], r["loss"]) for r in read_lines(road / stage / "metrics.jsonl") if "loss" in r]
            for road in (ours, whole)
        ]
        if logs[0] != logs[1]:
            wrong.append(f"{stage}: steps or losses differ")
        one, other = (models.load(road / stage).state_dict() for road in (ours, whole))
        wrong += [f"{stage}: {name} differs" for name in other if not torch.equal(one[name], other[name])]
    return wrong


def main(root: Path, kills: int, seed: int) -> dict[str, Any]:
    """Runs a road with so many kills and one without; returns the kills and the differences."""
    torch.set_num_threads(1)
    root.mkdir(parents=True)
    if not (child := os.fork()):  # torch's threads do not survive a fork
        prepared(root / "given")
        os._exit(0)
    os.waitpid(child, 0)
    for name in ("killed", "whole"):
        text = RECIPE.replace("BASE", repr(str(root / "given/base"))).replace("STEPS", str(max(4, kills // 4)))
        (root / f"{name}.py").write_text(text, encoding="utf-8")
    rng, at, begun = random.Random(seed), list[str](), time.monotonic()
    recipe, runs, log = root / "killed.py", root / "runs", root / "log.txt"
    for number in range(kills):
        after = 0 if number % 5 == 4 else rng.randint(1, STEPS)  # one in five during startup
        if not killed(recipe, runs, log, after, rng.uniform(0, PAUSE if after else START)):
            break
        at.append("{} {}".format(*(steps(runs / "killed") or [("start", 0)])[-1]))
        print(f"{time.monotonic() - begun:.0f} s: killed after {at[-1]}", file=sys.stderr, flush=True)
    for name in ("killed", "whole"):
        for child in begin(root / f"{name}.py", runs, log):
            os.waitpid(child, 0)
    finished = all(
        (runs / "killed" / stage / MANIFEST).is_file() for stage in ("taught", "rl", "adapted", "adapted_rl")
    )
    wrong = compare(runs / "killed", runs / "whole") if finished else ["it did not finish: see the log"]
    found = {"kills": len(at), "at": at, "of_stages": Counter(each.split()[0] for each in at)}
    return found | {"seconds": round(time.monotonic() - begun), "wrong": wrong}


if __name__ == "__main__":
    assert sharded_adapter, "imported before the fork"
    found = main(Path(sys.argv[1]).resolve(), int(sys.argv[2]), int(sys.argv[3]))
    print(json.dumps(found, indent=1))
    sys.exit(bool(found["wrong"]))
