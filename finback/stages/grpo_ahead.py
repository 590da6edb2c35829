"""GRPO's asking ahead: a thread has the next steps answered and checked while the trainer learns from this one (max_staleness)."""

import threading
import time
from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

import torch

from finback.data.tokenizer import Tokenizer
from finback.parallel.mesh import World
from finback.rollouts.answer_journal import FOLDER, AnswerJournal, JournaledRollouts
from finback.rollouts.generation import Rollouts
from finback.rollouts.rollouts import Rollout
from finback.runs.folder import StageRun
from finback.stages.grpo_sampling import Group, GroupSampler

if TYPE_CHECKING:
    from finback.stages.grpo import GRPO

LEAVING = 5.0  # seconds for a thread that has nothing more to ask

# all groups of a step that were asked, those that are learnt from, and the order of questions behind them
_Step = tuple[list[Group], list[Group], dict[str, Any]]


class AheadSampler(GroupSampler):
    """Samples steps in their order, each as soon as it may: `max_staleness` updates before the one that its answers are for.

    A token is never older than that when it is learnt from, for none of a step is made by weights from before. Answers go into
    a journal as they come; a run that was killed finds them there again, those of steps after its checkpoint included.
    """

    def __init__(self, stage: "GRPO", run: StageRun, rollouts: Rollouts, tokenizer: Tokenizer) -> None:
        world = World.of(run)
        if stage.resample and world.size > 1:
            problem = "ranks draw other questions together, and may be at different steps"
            raise stage.wrong("resample", problem, "Use 0, or max_staleness=0.")
        self.journal = AnswerJournal(run.folder / FOLDER, world.rank)
        super().__init__(stage, run, JournaledRollouts(rollouts, self.journal), tokenizer)
        self._changed = threading.Condition()
        self._made: dict[int, _Step] = {}
        self._failure: BaseException | None = None
        self._thread: threading.Thread | None = None
        self._ended = False
        # after how many updates the weights are that answer
        self._version = 0
        # the order of questions behind the step that was taken last, and the steps of this and of the last checkpoint
        self._state: dict[str, Any] = self.order.state()
        self._taken = self._saved = 0
        # seconds since the last step was taken in which the trainer has waited for answers, and this for the trainer
        self._waits, self._idles, self._mark = 0.0, 0.0, time.perf_counter()

    def sample(self, step: int) -> tuple[list[Group], list[Group]]:
        """The groups of a step, once they are there; from now on weights after step - 1 updates answer."""
        begin = time.perf_counter()
        with self._changed:
            self._version = step - 1
            self._changed.notify_all()
            if self._thread is None:
                self._thread = threading.Thread(target=self._run, args=(step,), name="asking ahead", daemon=True)
                self._thread.start()
            while step not in self._made and self._failure is None:
                self._changed.wait()
            if step not in self._made and self._failure is not None:
                raise self._failure
            asked, groups, self._state = self._made.pop(step)
            self._taken = step
            self._waits += time.perf_counter() - begin
        return asked, groups

    def take_idle(self) -> dict[str, float]:
        """The shares of the time since the last call in which the trainer and those who answer had nothing to do."""
        now = time.perf_counter()
        with self._changed:
            seconds, waits, idles = now - self._mark, self._waits, self._idles
            self._waits, self._idles, self._mark = 0.0, 0.0, now
        most = self.world.gather((waits / seconds, min(idles / seconds, 1.0)))
        trainer, engines = (sum(shares) / len(most) for shares in zip(*most, strict=True))
        return {"trainer_idle": trainer, "engines_idle": engines}

    def state(self) -> dict[str, Any]:
        """The order of questions behind the last step that was taken; what is older than the last checkpoint is let go of."""
        self.journal.forget(self._saved)
        self._saved = self._taken
        return self._state

    def load_state(self, state: dict[str, Any]) -> None:
        self.order.load_state(state)
        self._state = self.order.state()

    def close(self) -> int:
        """Ask nothing more; tokens that were made for steps that nobody will take."""
        with self._changed:
            self._ended = True
            self._changed.notify_all()
        return self.journal.tokens(after=self._taken)

    def join(self) -> None:
        """Wait a while for the thread, once nothing answers it any more."""
        if self._thread is not None:
            self._thread.join(LEAVING)

    def _run(self, step: int) -> None:
        try:
            while step <= self.stage.steps and self._may_begin(step):
                self.journal.begin(step)
                asked, groups = super().sample(step)
                with self._changed:
                    self._made[step] = asked, groups, self.order.state()
                    self._changed.notify_all()
                step += 1
        except BaseException as error:  # raised where the step is wanted
            with self._changed:
                self._failure = error
                self._changed.notify_all()
        self.journal.close()

    def _may_begin(self, step: int) -> bool:
        """Wait until weights answer that are new enough for a step; False where nobody wants it any more."""
        begin = time.perf_counter()
        with self._changed:
            while not self._ended and self._version < step - 1 - self.stage.max_staleness:
                self._changed.wait()
            self._idles += time.perf_counter() - max(begin, self._mark)
            return not self._ended


def staleness(rollouts: Sequence[Rollout], version: int, most: int, world: World) -> dict[str, Any]:
    """How many updates the weights that have made a step's tokens are behind those that learn: mean, most, and shares of
    0, 1, …, `most` updates; and how many versions there are among them. Of all ranks' answers."""
    counts = torch.zeros(most + 1, dtype=torch.float64)
    for r in rollouts:
        for made, first, end in r.completion.versions:
            counts[min(max(version - made, 0), most)] += end - first
    counts = world.sum_(counts)
    shares = (counts / counts.sum().clamp(min=1)).tolist()
    ages = [age for age, share in enumerate(shares) if share]
    mean = sum(age * share for age, share in enumerate(shares))
    return {"staleness": mean, "staleness_max": max(ages, default=0), "staleness_shares": shares, "versions": len(ages)}
