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
    """A stage's training, run by the loop; `total` is the amount of work, in `unit`."""

    unit = "steps"
    # number of checkpoints to keep, newest first
    keep = store.KEEP

    def __init__(
        self, run: StageRun, trainer: Trainer, total: float, checkpoint_steps: int, dtype: torch.dtype
    ) -> None:
        """dtype: that of the matrix products, for MFU. checkpoint_steps: steps between checkpoints."""
        self.run, self.world, self.trainer, self.total = run, World.of(run), trainer, float(total)
        self.checkpoint_steps, self.dtype = checkpoint_steps, dtype

    def loop(self) -> "Loop":
        """A loop that runs this training."""
        return Loop(self)

    def done(self, loop: "Loop") -> float:
        """How much of `total` is done."""
        return loop.step

    def finished(self, loop: "Loop") -> bool:
        """Whether no step is left."""
        return self.done(loop) >= self.total

    def before(self, loop: "Loop") -> None:  # noqa: B027 - most stages do not evaluate here
        """Evaluates the model before the first step."""

    @abstractmethod
    def step(self, loop: "Loop") -> dict[str, Any]:
        """Takes step number loop.step and returns its metrics. Its cost goes to loop.spend."""

    @abstractmethod
    def note(self, metrics: dict[str, Any]) -> str:
        """Text about the step for the progress line."""

    def after(self, loop: "Loop", metrics: dict[str, Any]) -> None:  # noqa: B027 - most stages do not evaluate here
        """Evaluates the model, or raises UserError, after the step is logged and before it is saved."""

    @abstractmethod
    def state(self) -> dict[str, Any]:
        """What the next step depends on besides tensors and its number, as JSON."""

    @abstractmethod
    def load_state(self, state: dict[str, Any]) -> None:
        """Restores what `state` returned."""

    @abstractmethod
    def finish(self, loop: "Loop") -> dict[str, Any]:
        """Writes the final model and returns the stage's results."""


def run(training: Training) -> dict[str, Any]:
    """Trains to the end, from the newest checkpoint if there is one. Returns the stage's results."""
    loop = training.loop()
    loop.train()
    return training.finish(loop)


class Loop:
    """Runs a stage's training, from the newest checkpoint if there is one."""

    def __init__(self, training: Training) -> None:
        self.training, self.run, self.trainer = training, training.run, training.trainer
        self.step = self.saved = 0
        # spent since the last row of the ledger: FLOPs by purpose, and `flops`, the ones that MFU counts
        self.usage: defaultdict[str, float] = defaultdict(float)
        self.mark = time.perf_counter()

    @cached_property
    def peak(self) -> float:
        """Peak FLOP/s of all ranks, from the matrix products measured on this one."""
        return gemm_peak(self.training.dtype, self.training.world.device) * self.training.world.size

    def spend(self, tokens: int = 0, generated: int = 0, **flops: float) -> None:
        """Accounts for tokens trained on and generated, and for FLOPs by purpose (runs/ledger.py), summed over ranks."""
        self.usage["tokens_trained"] += tokens
        if generated:
            self.usage["tokens_generated"] += generated
        for purpose, count in flops.items():
            self.usage[f"flops_{purpose}"] += count
            if purpose in ("training", "generation"):
                self.usage["flops"] += count

    def train(self) -> None:
        """Steps until the training is finished; raises Interrupted at a safe point if the user asks to stop."""
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
            progress.total = training.total  # a validation set may shorten it
            stop = run.check_stop()
            if stop or self.step % training.checkpoint_steps == 0:
                self.checkpoint()
            if stop:
                self.trainer.settle()
                raise Interrupted
        self.checkpoint()

    def advance(self, since: float | None = None) -> dict[str, Any]:
        """One step and its metrics. Time is measured from `since` (a perf_counter), evaluation included."""
        peak = self.peak  # measured before the clock runs
        begin, before = since or time.perf_counter(), dict(self.usage)
        self.step += 1
        metrics = self.training.step(self)
        seconds = time.perf_counter() - begin
        tokens = self.usage["tokens_trained"] - before.get("tokens_trained", 0)
        flops = self.usage["flops"] - before.get("flops", 0)
        return metrics | {"seconds": seconds, "tokens_per_second": tokens / seconds, "mfu": flops / (seconds * peak)}

    def checkpoint(self, always: bool = False) -> None:
        """Saves what the next step depends on, unless it is already saved, and writes the ledger."""
        if always or self.step != self.saved:
            self.trainer.save(self.run, self.step, self.training.state(), self.training.keep)
            self.saved = self.step
        self.account()

    def account(self) -> None:
        """Writes what was spent since the last call into the ledger. Collective."""
        self.run.gather_external()
        now = time.perf_counter()
        self.run.account(peak_flops=(now - self.mark) * self.peak, **{"tokens_trained": 0} | self.usage)
        self.mark = now
        self.usage.clear()

    def restore(self) -> dict[str, Any] | None:
        """Restores the newest checkpoint. Returns the stage's own state in it, None if there is no checkpoint."""
        found = self.trainer.resume(self.run)
        if found is None:
            return None
        self.step, state = found
        self.saved = self.step
        return state
