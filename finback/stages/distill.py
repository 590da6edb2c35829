"""Distillation on a teacher's probabilities: over the traces of a reject stage, or over the student's own answers.

R1 distilled by SFT on traces alone, which is the SFT stage. Where teacher and student share a tokenizer there is more to
learn from: what else the teacher might have said at every token. On-policy (GKD, 2306.13649) the student answers the
questions of a task and the teacher corrects it where it actually goes.
"""

import dataclasses
import random
from dataclasses import dataclass
from typing import Any, Literal

import torch
from torch import Tensor

from finback.checkpoint import models
from finback.config import UserError, check_not_negative, check_positive, check_share
from finback.data.messages import IGNORE, Lesson
from finback.data.tokenizer import Tokenizer
from finback.data.tuning import Packed, packed
from finback.engine.engine import Engine
from finback.engine.request import SamplingParams
from finback.model.count import forward_flops
from finback.parallel.mesh import World
from finback.runs.declaration import Declaration
from finback.runs.folder import StageRun
from finback.runs.recipe import Work
from finback.stages.rollout import rollout
from finback.stages.sft import SFT, Tuning, summed_cross_entropy
from finback.tasks import task as tasks
from finback.tasks.task import Task
from finback.train.loss import distillation

CHUNK = 512  # tokens whose logits, the student's and the teacher's, are held at once


@dataclass(frozen=True, kw_only=True)
class Distill(SFT):
    """SFT's knobs, with the teacher's probabilities as targets; with `task` the student's own answers are the lessons."""

    teacher: str
    divergence: Literal["forward", "reverse"] = "forward"
    top_k: int = 0  # told apart; 0: the whole vocabulary
    hard: float = 0.0  # share of the loss that stays SFT's
    task: Task | None = None  # on-policy
    steps: int = 100  # on-policy: as many, with `prompts` questions each
    prompts: int = 32
    temperature: float = 1.0
    max_tokens: int = 96

    def __post_init__(self) -> None:
        super().__post_init__()
        check_positive(self, self.name, "steps", "prompts", "max_tokens")
        check_share(self, self.name, "hard")
        check_not_negative(self, self.name, "top_k", "temperature")
        if self.task is not None and (self.kept or self.text):
            raise UserError(
                f"{self.name}.task",
                self.task.name,
                "the lessons are the student's answers or given ones, not both",
                "Leave out task, or kept and text.",
            )

    def inputs(self) -> tuple[str, ...]:
        return (*super().inputs(), self.teacher)

    def work(self) -> Work:
        tokens = self.steps * self.prompts * self.max_tokens if self.task else 0
        return Work(tokens_trained=tokens, tokens_generated=tokens)

    def declaration(self) -> Declaration:
        given = super().declaration()
        spent, results = (*given.ledger, "flops_auxiliary"), given.results
        if self.task is not None:  # the student samples its lessons
            spent, results = (*spent, "tokens_generated", "flops_generation"), ("steps", "tokens")
        return dataclasses.replace(given, objective="a teacher's probabilities", ledger=spent, results=results)

    def run(self, run: StageRun) -> dict[str, Any]:
        return _Distillation(self, run).run()


class _Distillation(Tuning):
    stage: Distill

    def __init__(self, stage: Distill, run: StageRun) -> None:
        folder = run.input(stage.teacher)
        self.teacher = models.load(folder).eval()
        assert isinstance(run.ranks, World), "training exchanges gradients over a World"
        self.teacher.to(run.ranks.device)
        self.teacher_tokenizer = Tokenizer(folder)
        super().__init__(stage, run)

    def _check_length(self) -> None:
        if self.stage.task is None:  # on-policy every answer has a row of its own
            super()._check_length()
        longest = self.stage.length if self.stage.task is None else self.stage.max_tokens
        window = self.teacher.config.max_position_embeddings
        if longest > window:
            raise UserError(
                f"{self.stage.name}.teacher",
                self.stage.teacher,
                f"reads {window} tokens, lessons may have {longest}",
                "Shorten length or max_tokens, or take another teacher.",
            )

    def set_up(self) -> None:
        """Lessons as SFT's, or an engine to make them."""
        if self.tokenizer.as_json() != self.teacher_tokenizer.as_json():
            raise UserError(
                f"{self.stage.name}.teacher",
                self.stage.teacher,
                "has another tokenizer than the student",
                "Their probabilities cannot be compared: sample traces with a reject stage and use SFT.",
            )
        if self.stage.task is None:
            super().set_up()
            return
        self.steps = self.stage.steps
        self.engine = Engine(self.model, self.tokenizer.stops)

    def rows(self) -> Packed | None:
        """SFT's rows, or the student's answers to this step's questions."""
        stage, run = self.stage, self.stage_run
        if stage.task is None:
            return super().rows()
        rng = random.Random(run.seed("questions", self.step))
        problems = [tasks.draw(stage.task, "train", rng) for _ in range(stage.prompts)]
        mine = range(self.world.rank, stage.prompts, self.world.size)
        seeds = [run.seed("answer", self.step, i) for i in mine]
        sampling = SamplingParams(stage.temperature, stage.max_tokens)
        answers = rollout(self.engine, self.tokenizer, stage.task, [problems[i] for i in mine], seeds, sampling)
        made = [Lesson(r.prompt + r.completion.tokens, [IGNORE] * len(r.prompt) + r.completion.tokens) for r in answers]
        self.model.train()
        if not made:
            return None
        batch = packed([[lesson] for lesson in made], self.depths)
        batch.rows = stage.prompts
        return batch

    def beside(self, read: int, taught: int) -> dict[str, float]:
        """The teacher's passes, and on-policy the student's own answers."""
        stage = self.stage
        context = (stage.length if stage.task is None else stage.max_tokens) / 4
        spent = {"flops_auxiliary": read * forward_flops(self.teacher.config, context)}
        if stage.task is not None:
            made = read * forward_flops(self.model.config, context)
            spent |= {"tokens_generated": taught, "flops_generation": made}
        return spent

    def main_loss(self, hidden: Tensor, batch: Packed) -> Tensor:
        """The divergence summed over tokens to be learnt, SFT's loss mixed in as asked."""
        stage, wanted = self.stage, batch.targets >= 0
        with torch.no_grad():
            told = self.teacher(batch.tokens[:, : batch.real.size(1)], document_ids=batch.documents)[wanted]
        ours = hidden[wanted]
        vocab = self.tokenizer.vocab_size  # heads may be padded, and differently
        parts = [
            distillation(
                self.model.logits(ours[i : i + CHUNK])[:, :vocab],
                self.teacher.logits(told[i : i + CHUNK])[:, :vocab],
                stage.divergence,
                stage.top_k,
            ).sum()
            for i in range(0, len(ours), CHUNK)
        ]
        soft = torch.stack(parts).sum() if parts else hidden.sum() * 0
        if not stage.hard:
            return soft
        return (1 - stage.hard) * soft + stage.hard * summed_cross_entropy(
            hidden, self.model.head.weight, batch.targets
        )
