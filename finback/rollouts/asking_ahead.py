"""Asynchronous rollouts: a thread generates the next steps' answers while the trainer learns (max_staleness)."""

import threading
import time
from collections.abc import Callable, Sequence
from typing import Any, Generic, TypeVar

import torch

from finback.engine.request import Completion
from finback.parallel.mesh import World
from finback.rollouts.answer_journal import FOLDER, AnswerJournal, JournaledRollouts
from finback.rollouts.generation import Rollouts
from finback.runs.folder import StageRun

T = TypeVar("T")
LEAVING = 5.0  # seconds to wait for the thread to end


class AskingAhead(Generic[T]):
    """Prepares steps in order, each as early as allowed: `max_staleness` updates before the one that learns from it.

    So no token is older than `max_staleness` updates when it is learned from. Answers are stored in a journal; a run that
    resumes after a kill reads them there, including those for steps after its checkpoint.
    """

    def __init__(self, run: StageRun, steps: int, max_staleness: int) -> None:
        self.world, self.steps, self.max_staleness = World.of(run), steps, max_staleness
        self.journal = AnswerJournal(run.folder / FOLDER, self.world.rank)
        self._changed = threading.Condition()
        self._made: dict[int, tuple[T, dict[str, Any]]] = {}
        self._failure: BaseException | None = None
        self._thread: threading.Thread | None = None
        self._ended = False
        # number of updates of the current weights
        self._version = 0
        # state of the questions after the last step taken; and the steps of this and the last checkpoint
        self._state: dict[str, Any] = {}
        self._taken = self._saved = 0
        # since the last step: seconds in which the trainer waited for answers, and in which this thread waited for the trainer
        self._waits, self._idles, self._mark = 0.0, 0.0, time.perf_counter()

    def asked(self, rollouts: Rollouts) -> JournaledRollouts:
        """The rollouts to prepare steps with."""
        return JournaledRollouts(rollouts, self.journal)

    def take(self, step: int, make: Callable[[int], tuple[T, dict[str, Any]]]) -> T:
        """Returns a step, waiting for it if needed; from now on weights after step - 1 updates generate.

        make: called in the thread; returns a step and the state of the questions after it.
        """
        begin = time.perf_counter()
        with self._changed:
            self._version = step - 1
            self._changed.notify_all()
            if self._thread is None:
                self._thread = threading.Thread(target=self._run, args=(step, make), name="asking ahead", daemon=True)
                self._thread.start()
            while step not in self._made and self._failure is None:
                self._changed.wait()
            if step not in self._made and self._failure is not None:
                raise self._failure
            made, self._state = self._made.pop(step)
            self._taken = step
            self._waits += time.perf_counter() - begin
        return made

    def take_idle(self) -> dict[str, float]:
        """Shares of the time since the last call in which the trainer and the generators were idle."""
        now = time.perf_counter()
        with self._changed:
            seconds, waits, idles = now - self._mark, self._waits, self._idles
            self._waits, self._idles, self._mark = 0.0, 0.0, now
        most = self.world.gather((waits / seconds, min(idles / seconds, 1.0)))
        trainer, engines = (sum(shares) / len(most) for shares in zip(*most, strict=True))
        return {"trainer_idle": trainer, "engines_idle": engines}

    def state(self) -> dict[str, Any]:
        """State of the questions after the last step taken; deletes journals older than the last checkpoint."""
        self.journal.forget(self._saved)
        self._saved = self._taken
        return self._state

    def load_state(self, state: dict[str, Any]) -> None:
        """Restores the state of the questions, at the start or after a checkpoint."""
        self._state = state

    def close(self) -> int:
        """Stops generation. Returns the tokens that were generated for steps which will not be taken."""
        with self._changed:
            self._ended = True
            self._changed.notify_all()
        return self.journal.tokens(after=self._taken)

    def join(self) -> None:
        """Waits a while for the thread to end."""
        if self._thread is not None:
            self._thread.join(LEAVING)

    def _run(self, step: int, make: Callable[[int], tuple[T, dict[str, Any]]]) -> None:
        try:
            while step <= self.steps and self._may_begin(step):
                self.journal.begin(step)
                made = make(step)
                with self._changed:
                    self._made[step] = made
                    self._changed.notify_all()
                step += 1
        except BaseException as error:  # raised again by `take`
            with self._changed:
                self._failure = error
                self._changed.notify_all()
        self.journal.close()

    def _may_begin(self, step: int) -> bool:
        """Waits until the weights are new enough for a step. Returns False if it is no longer wanted."""
        begin = time.perf_counter()
        with self._changed:
            while not self._ended and self._version < step - 1 - self.max_staleness:
                self._changed.wait()
            self._idles += time.perf_counter() - max(begin, self._mark)
            return not self._ended


def staleness(completions: Sequence[Completion], version: int, most: int, world: World) -> dict[str, Any]:
    """How many updates behind the trainer the weights of a step's tokens are, over all ranks: mean, maximum, shares of 0, 1, …,
    `most`, and the number of different versions."""
    counts = torch.zeros(most + 1, dtype=torch.float64)
    for completion in completions:
        for made, first, end in completion.versions:
            counts[min(max(version - made, 0), most)] += end - first
    counts = world.sum_(counts)
    shares = (counts / counts.sum().clamp(min=1)).tolist()
    ages = [age for age, share in enumerate(shares) if share]
    mean = sum(age * share for age, share in enumerate(shares))
    return {"staleness": mean, "staleness_max": max(ages, default=0), "staleness_shares": shares, "versions": len(ages)}
