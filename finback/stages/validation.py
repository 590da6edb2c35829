"""A validation set for training: scored every few steps, it decides which model to keep and when to stop.

Its questions come from the task's training side, so no exam asks them, and training leaves them out.
"""

import shutil
from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Any

import torch

from finback.config import check_fields, check_not_negative, check_positive
from finback.data.tokenizer import Tokenizer
from finback.engine.request import SamplingParams
from finback.model.count import forward_flops_of
from finback.parallel.mesh import World
from finback.parallel.served_weights import ServedWeights
from finback.rollouts.drawing import QuestionOrder, Window
from finback.rollouts.generation import Rollouts
from finback.rollouts.here import EngineRollouts
from finback.rollouts.rollouts import rollout
from finback.runs.declaration import Declaration
from finback.runs.folder import BEST, StageRun
from finback.stages.exam_questions import ExamQuestions, askable
from finback.suites.statistics import paired
from finback.tasks import task as tasks
from finback.tasks.task import Problem, Task, canonical
from finback.train.loop import Loop
from finback.train.trainer import Trainer

STATE = "first", "last", "best", "scored", "best_step", "stale"


@dataclass(frozen=True)
class Validation:
    """Distinct problems of a task, answered before the first step, every `every_steps`, and after the last step.

    The stage keeps the model with the best score. After `patience` scores in a row without a new best, GRPO decays its
    learning rate over half as many steps as it has taken; SFT and distillation stop.
    """

    # the task whose problems are asked; training leaves these problems out
    task: Task
    # number of problems
    problems: int = 200
    # steps from one score to the next
    every_steps: int = 20
    # scores in a row without a new best before training stops; 0: train to the last step
    patience: int = 3
    # sampling temperature; 0: greedy
    temperature: float = 0.0
    # start each answer inside the chain of thought
    think: bool = False
    # longest answer, in tokens
    max_tokens: int = 96

    def __post_init__(self) -> None:
        check_fields(self, "validation")
        check_positive(self, "validation", "problems", "every_steps", "max_tokens")
        check_not_negative(self, "validation", "patience", "temperature")

    def questions(self, run: StageRun) -> list[Problem]:
        """The set of problems: the same for the same recipe seed, whichever stage asks, and it includes those that an exam asks."""
        return tasks.distinct(self.task, "train", self.problems, run.seed("validation", self.task.name))

    def keys(self, run: StageRun) -> frozenset[str]:
        """Canonical forms of the questions, which a stage must not train on."""
        return frozenset(key for p in self.questions(run) for key in (p.key, canonical(p.question)))

    def generates(self, steps: int) -> int:
        """Upper bound of the tokens generated over `steps` steps."""
        return (2 + steps // self.every_steps) * self.problems * self.max_tokens


def declared(validation: Validation | None, given: Declaration) -> Declaration:
    """A stage's declaration, extended by what a validation set adds."""
    if validation is None:
        return given
    ledger, results = (*given.ledger, "flops_evaluation"), (*given.results, "validation")
    return replace(given, ledger=ledger, results=results, curves={"validation": ("validation",)} | dict(given.curves))


def training_questions(task: Task, validation: Validation | None, window: Window, run: StageRun) -> QuestionOrder:
    """A task's questions in training order, without those of exams and of the validation set."""
    held_out = frozenset() if validation is None else validation.keys(run)
    return QuestionOrder(
        task, window, run.seed, lambda text: run.say(f"{run.name:10} {text}"), ExamQuestions(run).asks, held_out
    )


def answered(
    rollouts: Rollouts,
    tokenizer: Tokenizer,
    task: Task,
    problems: Sequence[Problem],
    seeds: Sequence[int],
    sampling: SamplingParams,
    think: bool,
    world: World,
) -> tuple[list[float], float]:
    """Whether each problem is answered correctly, 0 or 1, and the FLOPs spent. Ranks share the problems."""
    mine = range(world.rank, len(problems), world.size)
    asked, drawn = [problems[i] for i in mine], [seeds[i] for i in mine]
    judged = rollout(rollouts, tokenizer, task, asked, drawn, sampling, think)
    flops = forward_flops_of(rollouts.model_config, [r.length for r in judged])
    found = torch.zeros(len(problems) + 1, dtype=torch.float64)
    for i, r in zip(mine, judged, strict=True):
        found[i] = float(r.verdict.correct)
    found[-1] = flops
    *right, flops = world.sum_(found).tolist()
    return right, float(flops)


class Validator:
    """Scores the model of one training run, and stores the best one in a subfolder of the stage.

    Without a validation set it scores nothing, and the last model is kept.
    """

    def __init__(
        self,
        validation: Validation | None,
        run: StageRun,
        trainer: Trainer,
        tokenizer: Tokenizer,
        rollouts: Rollouts | None = None,
    ) -> None:
        """rollouts: generates the answers; without it, an engine in this process is opened for each score."""
        self.validation, self.run, self.trainer, self.rollouts = validation, run, trainer, rollouts
        self.tokenizer, self.world = tokenizer, World.of(run)
        self.problems: list[Problem] = []
        # whether each problem was answered correctly: before the first step, by the newest model, by the best model
        self.first: list[float] = []
        self.last: list[float] = []
        self.best: list[float] = []
        self.scored = self.best_step = 0
        # scores in a row without a new best
        self.stale = 0

    @property
    def stopped(self) -> bool:
        """Whether the scores have stopped improving."""
        return self.validation is not None and 0 < self.validation.patience <= self.stale

    def before(self, loop: Loop) -> None:
        """Scores the model that the stage starts from; it is not a candidate for the best one."""
        if self.validation is not None:
            self.first = self._score(self.validation, loop)

    def after(self, loop: Loop, last: bool = False) -> None:
        """Scores the model if this step is due or the last; stores a new best model."""
        validation = self.validation
        if validation is None or self.scored == loop.step or not (last or loop.step % validation.every_steps == 0):
            return
        self.last = self._score(validation, loop)
        self.stale += 1
        if not self.best or _mean(self.last) > _mean(self.best):
            self.best, self.best_step, self.stale = self.last, loop.step, 0
            self.trainer.export(self.run, self.run.folder / BEST, self.tokenizer)
            self.world.barrier()
            loop.checkpoint()  # the stored model and the state now agree

    def _score(self, validation: Validation, loop: Loop) -> list[float]:
        """Answers each problem once with the current model."""
        run, model = self.run, self.trainer.model
        rollouts = self.rollouts or EngineRollouts(ServedWeights(self.trainer.gathered()), model.config, self.tokenizer)
        rollouts.update(loop.step)
        if not self.problems:
            window = Window(self.tokenizer, rollouts.model_config, validation.max_tokens, validation.think)
            self.problems, _ = askable(validation.task, validation.questions(run), window, run, "validation: ")
        sampling = SamplingParams(validation.temperature, validation.max_tokens)
        seeds = [run.seed("validation answer", i) for i in range(len(self.problems))]
        was_training = model.training
        given = self.problems, seeds, sampling, validation.think, self.world
        right, flops = answered(rollouts, self.tokenizer, validation.task, *given)
        model.train(was_training)
        loop.spend(evaluation=flops)
        self.scored = loop.step
        run.log(loop.step, validation=_mean(right))
        known = f" (best {_mean(self.best):.1%}, at step {self.best_step:,})" if self.best else ""
        run.say(f"{self.run.name:10} step {loop.step:,}: validation {_mean(right):.1%}{known}")
        return right

    def finish(self, loop: Loop) -> dict[str, Any]:
        """Writes the best model as the stage's result; warns if training made the model worse. Returns the results."""
        if self.validation is None:
            self.trainer.export(self.run, self.run.folder, self.tokenizer)
            return {}
        self.after(loop, last=True)
        if self.run.is_writer:
            shutil.copytree(self.run.folder / BEST, self.run.folder, dirs_exist_ok=True)
        self.world.barrier()
        before, after = _mean(self.first), _mean(self.best)
        is_worse = paired(self.best, self.first, seed=0).high < 0
        if is_worse:
            text = f"the model is worse than before: validation {before:.1%}, now {after:.1%} at its best"
            self.run.say(f"{self.run.name:10} warning: {text}")
        found = {"problems": len(self.first), "before": before, "after": after, "step": self.best_step}
        return {"validation": found | {"worse": is_worse}}

    def state(self) -> dict[str, Any]:
        """What the next scores depend on."""
        return {name: getattr(self, name) for name in STATE}

    def load_state(self, state: dict[str, Any]) -> None:
        """Restores what `state` returned."""
        for name, value in state.items():
            setattr(self, name, value)


def _mean(right: Sequence[float]) -> float:
    return sum(right) / len(right)
