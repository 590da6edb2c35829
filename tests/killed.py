"""Trains a stage in child processes that it kills -9 at random moments: `python -m tests.killed ROOT KILLS SEED`.

Children are forked instead of started anew, so that a hundred kills take a minute. Prints what happened as JSON.
"""

import json
import os
import random
import signal
import sys
import time
import traceback
from pathlib import Path
from typing import Any

import torch

from finback.checkpoint import store
from finback.parallel.mesh import World
from finback.runs.folder import StageRun
from finback.stages.pretrain import Pretrain
from finback.stages.pretrain_setup import set_up
from finback.train import loop
from finback.train.rates import Phase
from tests.toy import CONFIG

STEPS = 1500


def stage(name: str, checkpoint_steps: int) -> Pretrain:
    """A run of STEPS steps with everything that a checkpoint must save."""
    return Pretrain(
        name=name,
        data="prepare",
        mixture={"words": 1.0},
        model=CONFIG,
        batch_size=2,
        seq_len=16,
        compute="fp32",
        ema_decay=0.99,
        phases=(Phase(32 * STEPS // 2, 0.0, 1.0), Phase(32 * STEPS // 2, 1.0, 0.1, "cosine")),
        checkpoint_steps=checkpoint_steps,
        muon_lr=1e-3,
        adam_lr=1e-3,
    )


def sit(root: Path, name: str, checkpoint_steps: int, pipe: int | None = None) -> None:
    """Trains to the end from the last checkpoint; writes a byte to the pipe when the first step begins."""
    run = StageRun(root, name, 0, World(), quiet=True)
    run.folder.mkdir(exist_ok=True)
    training = set_up(stage(name, checkpoint_steps), run)
    step, told = training.step, pipe is None

    def telling(at: loop.Loop) -> dict[str, Any]:
        nonlocal told
        if not told and pipe is not None:
            os.write(pipe, b"!")
        told = True
        return step(at)

    training.step = telling  # type: ignore[method-assign]
    run.finish(loop.run(training))


def killed(root: Path, delay: float, at_once: bool) -> bool:
    """Kills a child `delay` seconds after its first step began, or after its start; False if it finished first."""
    reader, writer = os.pipe()
    child = os.fork()
    if child == 0:
        try:
            sit(root, "killed", 1, writer)
            os._exit(0)
        except BaseException:
            traceback.print_exc()
            os._exit(1)
    os.close(writer)
    if not at_once:
        os.read(reader, 1)
    time.sleep(delay)
    os.close(reader)
    os.kill(child, signal.SIGKILL)
    _, status = os.waitpid(child, 0)
    assert not os.WIFEXITED(status) or os.WEXITSTATUS(status) == 0, "a child failed"
    return os.WIFSIGNALED(status)


def main() -> None:
    root, kills, rng = Path(sys.argv[1]), int(sys.argv[2]), random.Random(int(sys.argv[3]))
    torch.set_num_threads(1)
    hit, half_written, at = 0, 0, []
    for number in range(kills):
        # one in five during startup or while it reads its checkpoint
        if not killed(root, rng.uniform(0.0, 0.2), at_once=number % 5 == 4):
            break
        hit += 1
        files = sorted((root / "killed").glob("step-*.safetensors"))
        for path in files:
            store.load(path)  # a file under its final name is always complete
        half_written += len(list((root / "killed").glob("*.part")))
        at.append(int(files[-1].stem.removeprefix("step-")) if files else 0)
    sit(root, "killed", 1)
    sit(root, "whole", STEPS)
    print(json.dumps({"kills": hit, "half_written": half_written, "at": at}))


if __name__ == "__main__":
    main()
