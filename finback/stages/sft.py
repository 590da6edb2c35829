"""Supervised fine-tuning: next-token loss on an assistant's messages in packed rows, over a few epochs (R1 B.4.2).

Lessons come from the traces of a reject stage, files of records in the forms of data/dialogues.py, the hub, the
packaged dialogues, and the reference answers of tasks. Dialogues with questions of the recipe's exams are left out.
A row holds several lessons, which do not attend to each other.
"""

import random
from dataclasses import dataclass, field
from typing import Any, Literal

from finback.config import UserError, check_not_negative, check_positive, check_share
from finback.data.messages import Lesson
from finback.data.rows import arrange
from finback.data.sources import Chitchat, Files, Hub
from finback.data.tokenizer import Tokenizer
from finback.model.fp4 import Qat
from finback.model.lora import LoRA
from finback.model.recompute import Policy, policy_of
from finback.parallel.layout import Layout
from finback.runs.declaration import Declaration
from finback.runs.folder import StageRun
from finback.runs.recipe import Stage
from finback.stages import validation
from finback.stages.fine_tuning import Batches, FineTuning
from finback.stages.lessons import LessonReader
from finback.stages.prepare import TaskText
from finback.stages.tuning_setup import check_layout, trainer_of
from finback.stages.validation import Validation
from finback.train import loop
from finback.train.batch import Batch, of_lessons
from finback.train.lean_adam import Moments
from finback.train.precision import Weights
from finback.train.trainer import Trainer


@dataclass(frozen=True, kw_only=True)
class SFT(Stage):
    """Trains a model on dialogues. The amount of work depends on the lessons.

    R1 used 2 to 3 epochs with a cosine from 5e-5 to 5e-6; the defaults here suit models a thousand times smaller.
    """

    # a stage, a run, a Hugging Face folder or a .gguf file
    start: str
    # reject stages whose traces are lessons
    traces: tuple[str, ...] = ()
    # other sources of dialogues
    text: tuple[Chitchat | Files | Hub | TaskText, ...] = field(default_factory=tuple)
    # source name -> number of its dialogues, sampled at random
    limits: dict[str, int] = field(default_factory=dict, hash=False)
    # False: leave out the chains and train on the bare answers
    chains: bool = True
    # passes over the lessons
    epochs: int = 2
    # packed rows per step, over all ranks
    batch_size: int = 8
    # tokens per row; longer lessons are left out and counted
    seq_len: int = 512
    # peak learning rate of the cosine
    lr: float = 1e-3
    # learning rate at the end of the cosine, as a share of lr
    final_lr: float = 0.1
    # warm-up, as a share of the steps
    warmup: float = 0.03
    # AdamW's weight decay
    weight_decay: float = 0.0
    # clip the gradient to this norm
    max_grad_norm: float = 1.0
    # weight of the multi-token prediction loss
    mtp_weight: float = 0.3
    # weight of the balance loss within a sequence
    balance_alpha: float = 1e-4
    # update speed of the routers' biases; 0: they stay as they are
    bias_speed: float = 0.0
    # decides when to stop and which model to keep
    validation: Validation | None = None
    # precision of matrix products
    compute: Literal["fp32", "bf16"] = "fp32"
    # dtype of hidden matrices; bf16: no fp32 masters, updates are rounded stochastically; needs compute="bf16" and no layout
    weights: Weights = "fp32"
    # quantization-aware training: routed experts, and the queries and keys of V4's indexers, are rounded to FP4 in every pass
    qat: Qat = "none"
    # train an adapter on a frozen base instead of all weights; MTP modules are then frozen
    adapter: LoRA | None = None
    # how a model too large for one rank is sharded; None: a full copy on each rank
    layout: Layout | None = None
    # activation recomputation in the backward pass; None: "blocks" with an adapter, else "none"
    recompute: Policy | None = None
    # fuse elementwise operations with torch.compile: faster steps, but the first may take a minute longer; not for adapters
    compile: bool = False
    # AdamW's moments: on the device in fp32 or 8 bits, or "host": in the host's memory, moved to the device when used
    moments: Moments = "fp32"
    # steps from one checkpoint to the next
    checkpoint_steps: int = 50

    def __post_init__(self) -> None:
        super().__post_init__()
        counts = ("epochs", "batch_size", "seq_len", "checkpoint_steps")
        check_positive(self, self.name, *counts, "lr", "max_grad_norm")
        check_share(self, self.name, "warmup", "final_lr")
        check_not_negative(self, self.name, "weight_decay", "mtp_weight", "balance_alpha", "bias_speed")
        if self.adapter is not None and self.bias_speed:
            raise self.wrong("bias_speed", "would move biases of the base, which an adapter leaves frozen", "Use 0.")
        check_layout(self)
        known = [*self.traces, *(source.name for source in self.text)]
        if len(set(known)) < len(known):
            raise UserError(f"{self.name}.text", known, "two sources have the same name", "Rename one of them.")
        for name in self.limits:
            if name not in known:
                raise UserError(f"{self.name}.limits", name, "no such source", f"Known: {', '.join(known)}.")

    @property
    def recomputes(self) -> Policy | None:
        """The recomputation policy, None if nothing is recomputed."""
        policy = policy_of(self.recompute, self.adapter is not None)
        return None if policy == "none" else policy

    def inputs(self) -> tuple[str, ...]:
        return (*super().inputs(), *self.traces)

    def declaration(self) -> Declaration:
        counts = ("lessons_by_source", "too_long", "unusable", "contaminated", "empty_answers")
        results: tuple[str, ...] = ("steps", "tokens", "lessons", "rows", "filled", *counts)
        if self.text:
            results = (*results, "sources")
        given = Declaration(
            "fine-tuning",
            objective="next token of given answers",
            ledger=("tokens_trained", "flops", "flops_training", *(("flops_recomputed",) if self.recomputes else ())),
            results=results,
            curves={"loss": ("loss", "mtp_loss")},
        )
        return validation.declared(self.validation, given)

    def run(self, run: StageRun) -> dict[str, Any]:
        training = self.training(run)
        try:
            return loop.run(training)
        finally:
            training.close()

    def training(self, run: StageRun) -> FineTuning:
        """The training that `run` executes."""
        trainer, tokenizer = trainer_of(self, run, self.weight_decay), Tokenizer(run.input(self.start))
        batches = LessonBatches(self, run, tokenizer, trainer)
        return FineTuning(self, trainer, batches)


class LessonBatches(Batches):
    """A stage's lessons, arranged into the rows of all epochs."""

    def __init__(self, stage: SFT, run: StageRun, tokenizer: Tokenizer, trainer: Trainer) -> None:
        window = trainer.model.config.max_position_embeddings
        if stage.seq_len > window:
            raise stage.wrong("seq_len", f"the model reads {window} tokens", "Lower it.")
        super().__init__(stage, run, tokenizer, trainer)
        self.stage = stage
        self.lessons = self._lessons()
        rng = random.Random(run.seed("rows"))
        lengths = [len(lesson.ids) for lesson in self.lessons]
        rows = [row for _ in range(stage.epochs) for row in arrange(lengths, stage.seq_len, rng)]
        self.order = [rows[i : i + stage.batch_size] for i in range(0, len(rows), stage.batch_size)]
        self.steps = len(self.order)
        filled = sum(lengths) * stage.epochs / (len(rows) * stage.seq_len)
        self.results |= {"lessons": len(self.lessons), "rows": len(rows), "filled": round(filled, 4)}

    def batch(self, step: int) -> tuple[Batch | None, int]:
        """This rank's rows of a step; None if there are fewer rows than ranks."""
        rows = self.order[step - 1]
        mine = rows[self.trainer.data_rank :: self.trainer.data_ranks]
        batch = of_lessons([[self.lessons[i] for i in row] for row in mine], self.depths) if mine else None
        return batch, len(rows)

    def _lessons(self) -> list[Lesson]:
        """All lessons that fit into a row; also stores the number of lessons of each source."""
        reader = LessonReader(self.stage, self.run, self.tokenizer)
        by_source = reader.read()
        counts = {name: len(here) for name, here in by_source.items()}
        found = [lesson for here in by_source.values() for lesson in here]
        fits = [lesson for lesson in found if len(lesson.ids) <= self.stage.seq_len]
        if not fits:
            problem = f"no lesson of at most {self.stage.seq_len} tokens"
            remedy = "Add traces or text, or raise seq_len."
            raise UserError(f"{self.stage.name}.traces", list(counts), problem, remedy)
        self.results |= reader.results | {"lessons_by_source": counts, "too_long": len(found) - len(fits)}
        self.run.say(
            f"{self.stage.name:10} {len(fits):,} lessons: {', '.join(f'{k} {v:,}' for k, v in counts.items())}"
            + (f"; {len(found) - len(fits):,} longer than a row are left out" if len(found) > len(fits) else "")
        )
        return fits
