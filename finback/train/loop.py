"""The one loop of all training stages: resume, step, log, progress, stop, checkpoint, ledger."""

import time
from abc import ABC, abstractmethod
from collections import defaultdict
from functools import cached_property
from typing import Any

import torch

from finback.checkpoint import store
from finback.kernels.probe import gemm_peak
from finback.parallel.mesh import World
from finback.runs.folder import Interrupted, StageRun
from finback.runs.ledger import spent
from finback.runs.progress import Progress
from finback.train.trainer import Trainer


class Training(ABC):
    """What a stage hands the loop; `total` says how much there is to do, in `unit`."""

    unit = "steps"
    # checkpoints that stay, the newest
    keep = store.KEEP

    def __init__(
        self, run: StageRun, trainer: Trainer, total: float, checkpoint_steps: int, dtype: torch.dtype
    ) -> None:
        """dtype: of the matrix products, for MFU. checkpoint_steps: steps between checkpoints."""
        self.run, self.world, self.trainer, self.total = run, World.of(run), trainer, float(total)
        self.checkpoint_steps, self.dtype = checkpoint_steps, dtype

    def loop(self) -> "Loop":
        """The loop that runs it."""
        return Loop(self)

    def done(self, loop: "Loop") -> float:
        """How much of `total` is done."""
        return loop.step

    def finished(self, loop: "Loop") -> bool:
        """Whether there is no step left to take."""
        return self.done(loop) >= self.total

    def before(self, loop: "Loop") -> None:  # noqa: B027 - most do not look
        """Look at the model before the first step."""

    @abstractmethod
    def step(self, loop: "Loop") -> dict[str, Any]:
        """One step, number loop.step; its metrics. What it costs goes to loop.spend."""

    @abstractmethod
    def note(self, metrics: dict[str, Any]) -> str:
        """What the progress line says of the step."""

    def after(self, loop: "Loop", metrics: dict[str, Any]) -> None:  # noqa: B027 - most do not look
        """Look at the model, or raise UserError, once the step is logged and before it is saved."""

    @abstractmethod
    def state(self) -> dict[str, Any]:
        """What the next step depends on besides tensors and its number, as JSON."""

    @abstractmethod
    def load_state(self, state: dict[str, Any]) -> None:
        """Take back what `state` gave."""

    @abstractmethod
    def finish(self, loop: "Loop") -> dict[str, Any]:
        """Write the model once training is finished; the stage's results."""


def run(training: Training) -> dict[str, Any]:
    """Train to the end, from wherever an interrupted run left off; the stage's results."""
    loop = training.loop()
    loop.train()
    return training.finish(loop)


class Loop:
    """Runs a stage's training from wherever an interrupted run left off."""

    def __init__(self, training: Training) -> None:
        self.training, self.run, self.trainer = training, training.run, training.trainer
        self.step = self.saved = 0
        # spent since the last line of the ledger; FLOPs by purpose, and `flops`, those that MFU is of
        self.usage: defaultdict[str, float] = defaultdict(float)
        self.mark = time.perf_counter()

    @cached_property
    def peak(self) -> float:
        """FLOPs per second of all ranks, by the matrix products measured on this one."""
        return gemm_peak(self.training.dtype, self.training.world.device) * self.training.world.size

    def spend(self, tokens: int = 0, generated: int = 0, **flops: float) -> None:
        """Account for tokens trained on and generated, and for FLOPs by purpose (runs/ledger.py), of all ranks."""
        self.usage["tokens_trained"] += tokens
        if generated:
            self.usage["tokens_generated"] += generated
        for purpose, count in flops.items():
            self.usage[f"flops_{purpose}"] += count
            if purpose in ("training", "generation"):
                self.usage["flops"] += count

    def train(self) -> None:
        """Step until the training is finished; Interrupted at a safe point when the user asks."""
        run, training = self.run, self.training
        state = self.restore()
        if state is not None:
            training.load_state(state)
            run.say(f"{run.name:10} resumed at step {self.step:,}")
        run.rewind(self.step + 1 if state is not None else 0)
        if state is None:
            training.before(self)
        progress = Progress(run, training.total, training.unit, spent(run.folder)["seconds"])
        mark = time.perf_counter()
        while not training.finished(self):
            metrics = self.advance(mark)
            mark = time.perf_counter()
            run.log(self.step, **metrics)
            progress.show(training.done(self), training.note(metrics))
            training.after(self, metrics)
            progress.total = training.total  # which a validation set may shorten
            stop = run.check_stop()
            if stop or self.step % training.checkpoint_steps == 0:
                self.checkpoint()
            if stop:
                self.trainer.settle()
                raise Interrupted
        self.checkpoint()

    def advance(self, since: float | None = None) -> dict[str, Any]:
        """One step and its metrics; its seconds and speed are from `since` on (a perf_counter), looks at the model included."""
        peak = self.peak  # measured before the clock runs
        begin, before = since or time.perf_counter(), dict(self.usage)
        self.step += 1
        metrics = self.training.step(self)
        seconds = time.perf_counter() - begin
        tokens = self.usage["tokens_trained"] - before.get("tokens_trained", 0)
        flops = self.usage["flops"] - before.get("flops", 0)
        return metrics | {"seconds": seconds, "tokens_per_second": tokens / seconds, "mfu": flops / (seconds * peak)}

    def checkpoint(self, always: bool = False) -> None:
        """Save what the next step depends on, if it is not saved yet, and account for what was spent since then."""
        if always or self.step != self.saved:
            self.trainer.save(self.run, self.step, self.training.state(), self.training.keep)
            self.saved = self.step
        self.account()

    def account(self) -> None:
        """Write what was spent since the last time into the ledger."""
        now = time.perf_counter()
        self.run.account(peak_flops=(now - self.mark) * self.peak, **{"tokens_trained": 0} | self.usage)
        self.mark = now
        self.usage.clear()

    def restore(self) -> dict[str, Any] | None:
        """Go back to the newest checkpoint; the stage's own state in it, None where there is none."""
        found = self.trainer.resume(self.run)
        if found is None:
            return None
        self.step, state = found
        self.saved = self.step
        return state
