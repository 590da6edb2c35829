"""Distillation on a teacher's probabilities, over the traces of a reject stage or over the student's own answers.

R1 distilled by SFT on traces only, which the SFT stage does. If teacher and student share a tokenizer, the student can
learn from the teacher's full distribution at every token. On-policy (GKD, 2306.13649), the student answers the questions
of a task, and the teacher supplies its distribution for each of their tokens; with several teachers, as in V4, the
specialist for the question's domain does.
"""

import random
from dataclasses import dataclass, field, replace
from typing import Any, Literal

import torch

from finback.config import UserError, check_not_negative, check_positive, check_share, did_you_mean
from finback.data.messages import IGNORE, Lesson
from finback.data.tokenizer import Tokenizer
from finback.engine.request import Completion, SamplingParams
from finback.rollouts.asking_ahead import AskingAhead, staleness
from finback.rollouts.drawing import Window
from finback.rollouts.fleet import Fleet
from finback.rollouts.generation import PolicyModel
from finback.rollouts.here import Here
from finback.rollouts.rollouts import Rollout, rollout
from finback.rollouts.servers import Servers
from finback.runs.declaration import Declaration
from finback.runs.folder import StageRun
from finback.runs.recipe import Work
from finback.stages.fine_tuning import Batches, FineTuning
from finback.stages.sft import SFT, LessonBatches
from finback.stages.teachers import DistillationTeacher
from finback.stages.tuning_setup import trainer_of
from finback.stages.validation import training_questions
from finback.tasks.task import Mixture, Problem, Task, part_of
from finback.train.batch import Batch, of_lessons
from finback.train.trainer import Trainer


@dataclass(frozen=True, kw_only=True)
class Distill(SFT):
    """SFT with the teacher's probabilities as labels. With `task`, the lessons are the student's own answers."""

    # a stage, a run, a Hugging Face folder or a .gguf file with the same vocabulary; servers, which report their top_k likeliest tokens;
    # or, on-policy, one teacher per domain: a dict from the name of a task in the mixture `task` to the teacher of its questions
    teacher: str | Servers | dict[str, str | Servers] = field(hash=False)
    # forward: KL(teacher, student), which covers every mode of the teacher; reverse: KL(student, teacher), which seeks its main mode
    divergence: Literal["forward", "reverse"] = "forward"
    # compare only the k likeliest tokens, and the rest as one; 0: the whole vocabulary
    top_k: int = 0
    # weight of SFT's cross-entropy in the loss, 0 to 1
    hard: float = 0.0
    # on-policy: the task whose questions the student answers
    task: Task | None = None
    # on-policy: number of steps
    steps: int = 100
    # on-policy: questions per step
    prompts_per_step: int = 32
    # on-policy: sampling temperature of the student's answers
    temperature: float = 1.0
    # on-policy: longest answer, in tokens
    max_tokens: int = 96
    # on-policy: where answers are generated, by an engine in each rank or by servers
    rollouts: Here | Servers | Fleet = Here()
    # on-policy: how many updates old the weights that generated a token may be, as for GRPO
    max_staleness: int = 0
    # answers in progress when the weights change: "continue" with the new weights, or "drop" and restart
    in_flight: Literal["continue", "drop"] = "continue"

    def __post_init__(self) -> None:
        super().__post_init__()
        check_positive(self, self.name, "steps", "prompts_per_step", "max_tokens")
        check_share(self, self.name, "hard")
        check_not_negative(self, self.name, "top_k", "temperature", "max_staleness")
        if self.task is not None and (self.traces or self.text):
            problem = "lessons are either the student's own answers or given ones"
            raise UserError(f"{self.name}.task", self.task.name, problem, "Leave out task, or traces and text.")

        if self.task is None and self.rollouts != Here():
            raise self.wrong(
                "rollouts", "the lessons are given, so nothing is generated", "Give a task, or leave it out."
            )

        self.rollouts.check_ahead(f"{self.name}.rollouts", self.max_staleness)
        self._check_teachers()

    def _check_teachers(self) -> None:
        """Raises UserError if a domain has no teacher, or a teacher does not support the other knobs."""
        if isinstance(self.teacher, dict):
            if self.task is None:
                raise self.wrong("teacher", "given lessons have no domains", "Name one teacher, or give a task.")
            names = {part.name for part in (self.task.tasks if isinstance(self.task, Mixture) else (self.task,))}
            if lacking := sorted(names - {*self.teacher}):
                problem = f"no teacher for the domain {lacking[0]!r}"
                raise UserError(f"{self.name}.teacher", sorted(self.teacher), problem, "Name one for each task.")
            if unknown := sorted({*self.teacher} - names):
                problem = "no task has that name"
                raise UserError(f"{self.name}.teacher", unknown[0], problem, did_you_mean(unknown[0], names))
        if any(isinstance(teacher, Servers) for teacher in self.teachers.values()):
            if not self.top_k:
                problem = "servers report only their likeliest tokens"
                raise self.wrong("top_k", problem, "Set their number; vLLM allows 20 unless --max-logprobs is higher.")
            if self.layout is not None and self.layout.cp > 1:
                problem = "servers read whole rows"
                raise UserError(f"{self.name}.layout.cp", self.layout.cp, problem, "Use dp and ep.")

    @property
    def teachers(self) -> dict[str, str | Servers]:
        """Teachers by domain; the key is "" if one teaches all."""
        return self.teacher if isinstance(self.teacher, dict) else {"": self.teacher}

    @property
    def knows_flops(self) -> bool:
        """Whether the FLOPs of a teacher are counted; those of servers are unknown."""
        return any(isinstance(teacher, str) for teacher in self.teachers.values())

    def inputs(self) -> tuple[str, ...]:
        folders = (teacher for teacher in self.teachers.values() if isinstance(teacher, str))
        return (*super().inputs(), *dict.fromkeys(folders))

    def work(self) -> Work:
        tokens = self.steps * self.prompts_per_step * self.max_tokens if self.task else 0
        return Work(tokens_trained=tokens, tokens_generated=tokens)

    def declaration(self) -> Declaration:
        given = super().declaration()
        spent, results = (*given.ledger, "flops_auxiliary"), given.results
        if self.task is not None:  # the student samples its lessons
            spent = (*spent, "tokens_generated", "flops_generation")
            results = ("steps", "tokens", "too_long", "contaminated")
            results += ("validation",) * (self.validation is not None)
        return replace(given, objective="a teacher's probabilities", ledger=spent, results=results)

    def training(self, run: StageRun) -> FineTuning:
        trainer, tokenizer = trainer_of(self, run, self.weight_decay), Tokenizer(run.input(self.start))
        teacher = DistillationTeacher(self, run, trainer, tokenizer)
        batches: Batches = (
            LessonBatches(self, run, tokenizer, trainer)
            if self.task is None  # on-policy, every answer has its own row
            else OnPolicyBatches(self, run, tokenizer, trainer)
        )
        return FineTuning(self, trainer, batches, teacher)


# answers, and the number of questions left out so far
_Answers = tuple[list[Rollout], int]


class OnPolicyBatches(Batches):
    """The student's own answers to each step's questions."""

    generates = True

    def __init__(self, stage: Distill, run: StageRun, tokenizer: Tokenizer, trainer: Trainer) -> None:
        super().__init__(stage, run, tokenizer, trainer)
        self.stage, self.student, self.steps = stage, trainer.model, stage.steps
        self.sampling = SamplingParams(stage.temperature, stage.max_tokens)
        in_flight = stage.in_flight if stage.max_staleness else "none"
        policy = PolicyModel(trainer.served(), trainer.model.config, tokenizer, run, stage.compute, in_flight=in_flight)
        self.rollouts = stage.rollouts.open(policy, self.sampling)
        # generates while the student learns; None: generation and learning alternate
        self.ahead = AskingAhead[_Answers](run, stage.steps, stage.max_staleness) if stage.max_staleness else None
        self.generator = self.rollouts if self.ahead is None else self.ahead.asked(self.rollouts)
        # completions of the step taken last
        self.made: list[Completion] = []
        assert stage.task is not None, "on-policy distillation answers a task"
        window = Window(tokenizer, trainer.model.config, stage.max_tokens)
        self.order = training_questions(stage.task, stage.validation, window, run)
        self.results["contaminated"] = dict(self.order.contaminated)

    def state(self) -> dict[str, Any]:
        return self.order.state() if self.ahead is None else self.ahead.state()

    def load_state(self, state: dict[str, Any]) -> None:
        self.order.load_state(state)
        if self.ahead is not None:
            self.ahead.load_state(self.order.state())

    def batch(self, step: int) -> tuple[Batch | None, int]:
        """This rank's answers to the questions of a step."""
        assert self.rollouts is not None, "opened in __init__"
        self.rollouts.update(step - 1)
        answers, self.results["too_long"] = (
            self._answers(step) if self.ahead is None else self.ahead.take(step, self._made)
        )
        self.rollouts.rest()
        self.made = [r.completion for r in answers]
        read = [(r.prompt, r.completion.tokens, self._teacher(r.problem)) for r in answers]
        rows = [row for some in self.trainer.of_same_rows(read) for row in some]
        made = [[Lesson(prompt + tokens, [IGNORE] * len(prompt) + tokens)] for prompt, tokens, _ in rows]
        self.student.train()
        if not made:
            return None, self.stage.prompts_per_step
        numbers = torch.tensor([number for _, _, number in rows]) if len(self.stage.teachers) > 1 else None
        return replace(of_lessons(made, self.depths), teachers=numbers), self.stage.prompts_per_step

    def _teacher(self, problem: Problem) -> int:
        """Index of the teacher for a problem's domain."""
        domains, task = list(self.stage.teachers), self.stage.task
        assert task is not None, "checked at the beginning"
        return domains.index(part_of(task, problem).name) if len(domains) > 1 else 0

    def _made(self, step: int) -> tuple[_Answers, dict[str, Any]]:
        return self._answers(step), self.order.state()

    def _answers(self, step: int) -> _Answers:
        """This rank's answers to the questions of a step, and how many questions have been too long so far."""
        stage, run = self.stage, self.run
        assert stage.task is not None, "checked in __init__"
        rng = random.Random(run.seed("questions", step))
        problems = [self.order.draw(rng) for _ in range(stage.prompts_per_step)]
        too_long = self.order.too_long
        mine = range(self.world.rank, stage.prompts_per_step, self.world.size)
        seeds = [run.seed("answer", step, i) for i in mine]
        asked = [problems[i] for i in mine]
        return rollout(self.generator, self.tokenizer, stage.task, asked, seeds, self.sampling), too_long

    def metrics(self, step: int) -> dict[str, Any]:
        if self.ahead is None:
            return {}
        old = staleness(self.made, step - 1, self.stage.max_staleness, self.world)
        return old | self.ahead.take_idle()

    def close(self) -> int:
        unused = 0 if self.ahead is None else self.ahead.close()
        if self.rollouts is not None:
            self.rollouts.close()
        if self.ahead is not None:
            self.ahead.join()
        return unused
