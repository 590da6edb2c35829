"""Supervised fine-tuning: the next token of what an assistant said, in packed rows, over some epochs (R1 B.4.2).

Lessons come from traces that a reject stage kept, from JSONL dialogues, from the hub, from the packaged dialogues, and
from the gold answers of tasks.
Rows hold several lessons that do not see each other; the loss is the mean over all tokens to be learnt of a step,
whatever the number of ranks.
"""

import math
import random
import time
from collections.abc import Iterator
from dataclasses import dataclass, field
from typing import Any, Literal

import torch
from torch import Tensor

from finback.checkpoint import models, store
from finback.config import UserError, check_not_negative, check_positive, check_share
from finback.data.messages import Lesson, lessons
from finback.data.sources import Chitchat, Document, Files, Hub
from finback.data.tokenizer import Tokenizer
from finback.data.tuning import Packed, arrange, packed
from finback.kernels.probe import gemm_peak
from finback.model.count import training_flops
from finback.parallel.mesh import World
from finback.runs.declaration import Declaration
from finback.runs.folder import Interrupted, StageRun
from finback.runs.ledger import spent
from finback.runs.progress import Progress
from finback.runs.recipe import Stage, Work
from finback.stages.prepare import TaskText, origin
from finback.train import rates, router_health
from finback.train.loss import cross_entropy
from finback.train.optim import Adam, Gradients
from finback.train.precision import COMPUTE


@dataclass(frozen=True, kw_only=True)
class SFT(Stage):
    """Teach a model dialogues; R1 took 2 to 3 epochs of cosine 5e-5 -> 5e-6, here for models a thousandth as large."""

    start: str
    kept: tuple[str, ...] = ()  # reject stages whose traces are lessons
    text: tuple[Chitchat | Files | Hub | TaskText, ...] = field(default_factory=tuple)
    limits: dict[str, int] = field(default_factory=dict, hash=False)  # source -> dialogues of it, drawn at random
    chains: bool = True  # False: leave the chains out and teach the bare answers
    epochs: int = 2
    rows: int = 8  # packed rows per step, over all ranks
    length: int = 512  # tokens per row; longer lessons are left out, and counted
    lr: float = 1e-3
    final_lr: float = 0.1
    warmup: float = 0.03  # share of the steps
    weight_decay: float = 0.0
    grad_clip: float = 1.0
    mtp_weight: float = 0.3
    balance_alpha: float = 1e-4
    bias_speed: float = 0.0  # of the routers' biases
    compute: Literal["fp32", "bf16"] = "fp32"
    checkpoint_steps: int = 50

    def __post_init__(self) -> None:
        super().__post_init__()
        check_positive(self, self.name, "epochs", "rows", "length", "checkpoint_steps", "lr", "grad_clip")
        check_share(self, self.name, "warmup", "final_lr")
        check_not_negative(self, self.name, "weight_decay", "mtp_weight", "balance_alpha", "bias_speed")
        known = [*self.kept, *(source.name for source in self.text)]
        if len(set(known)) < len(known):
            raise UserError(f"{self.name}.text", known, "two sources have one name", "Rename one of them.")
        for name in self.limits:
            if name not in known:
                raise UserError(f"{self.name}.limits", name, "no such source", f"Known: {', '.join(known)}.")

    def inputs(self) -> tuple[str, ...]:
        return (self.start, *self.kept)

    def work(self) -> Work:
        return Work()  # known only when the lessons are

    def declaration(self) -> Declaration:
        results = ("steps", "tokens", "lessons", "rows", "filled", "lessons_by_source", "too_long")
        return Declaration(
            "fine-tuning",
            objective="next token of given answers",
            ledger=("tokens_trained", "flops", "flops_training"),
            results=(*results, "sources") if self.text else results,
            curves={"loss": ("loss", "mtp_loss")},
        )

    def run(self, run: StageRun) -> dict[str, Any]:
        return Tuning(self, run).run()


class Tuning:
    """The state of one fine-tuning run between its steps; Distill puts another loss and other lessons into it."""

    def __init__(self, stage: SFT, run: StageRun) -> None:
        self.stage, self.stage_run = stage, run
        assert isinstance(run.ranks, World), "training exchanges gradients over a World"
        self.world = run.ranks
        folder = run.input(stage.start)
        self.tokenizer = Tokenizer(folder)
        self.model = models.load(folder, COMPUTE[stage.compute]).to(self.world.device)
        self._check_length()
        named = list(self.model.named_parameters())
        self.gradients = Gradients([p for _, p in named])
        self.adam = Adam(named, betas=(0.9, 0.95), weight_decay=stage.weight_decay)
        self.depths = len(self.model.mtp) if stage.mtp_weight else 0
        self.step, self.tokens = 0, 0
        self.saved_tokens, self.mark = 0, time.perf_counter()
        self.spoken = 0  # tokens to be learnt since the last line of the ledger
        self.results: dict[str, Any] = {}
        self.set_up()

    def _check_length(self) -> None:
        window = self.model.config.max_position_embeddings
        if self.stage.length > window:
            raise UserError(
                f"{self.stage.name}.length", self.stage.length, f"the model reads {window} tokens", "Lower it."
            )

    def set_up(self) -> None:
        """Read the lessons and arrange them into the rows of all epochs."""
        taught = self._lessons()
        rng = random.Random(self.stage_run.seed("rows"))
        lengths = [len(lesson.ids) for lesson in taught]
        rows = [row for _ in range(self.stage.epochs) for row in arrange(lengths, self.stage.length, rng)]
        self.order = [rows[i : i + self.stage.rows] for i in range(0, len(rows), self.stage.rows)]
        self.taught, self.steps = taught, len(self.order)
        filled = sum(lengths) * self.stage.epochs / (len(rows) * self.stage.length)
        self.results |= {"lessons": len(taught), "rows": len(rows), "filled": round(filled, 4)}

    def _lessons(self) -> list[Lesson]:
        """All lessons that fit into a row, and how many there are of each source."""
        found: list[Lesson] = []
        counts: dict[str, int] = {}
        for name, documents in self._sources():
            here = [lesson for d in documents for lesson in lessons(self._messages(d), self.tokenizer)]
            counts[name] = len(here)
            found += here
        fits = [lesson for lesson in found if len(lesson.ids) <= self.stage.length]
        if not fits:
            raise UserError(
                f"{self.stage.name}.kept",
                list(counts),
                f"no lesson of at most {self.stage.length} tokens",
                "Give it traces or text, or longer rows.",
            )
        self.results |= {"lessons_by_source": counts, "too_long": len(found) - len(fits)}
        self.stage_run.say(
            f"{self.stage.name:10} {len(fits):,} lessons: {', '.join(f'{k} {v:,}' for k, v in counts.items())}"
            + (f"; {len(found) - len(fits):,} longer than a row left out" if len(found) > len(fits) else "")
        )
        return fits

    def _messages(self, document: Document) -> list[Any]:
        if not document.messages:
            raise UserError(
                f"{self.stage.name}.text", document.text[:60], "text without turns", "SFT learns from dialogues."
            )
        if self.stage.chains:
            return list(document.messages)
        return [type(m)(m.role, m.content) for m in document.messages]

    def _sources(self) -> Iterator[tuple[str, list[Document]]]:
        kept = [Files((str(self.stage_run.input(s) / "kept.jsonl"),), name=s) for s in self.stage.kept]
        for source in (*kept, *self.stage.text):
            seed = self.stage_run.seed("tasks", source.name)
            given = source.generate(seed) if isinstance(source, TaskText) else source.documents()
            documents = [d for d in given if not d.messages or any(m.role == "assistant" for m in d.messages)]
            if source.name not in self.stage.kept:
                self.results.setdefault("sources", {})[source.name] = origin(source, len(documents))
            limit = self.stage.limits.get(source.name)
            if limit is not None:
                random.Random(self.stage_run.seed("limit", source.name)).shuffle(documents)
                documents = documents[:limit]
            yield source.name, documents

    def rows(self) -> Packed | None:
        """This rank's rows of the current step (numbered from 1), None when there are fewer rows than ranks."""
        mine = self.order[self.step - 1][self.world.rank :: self.world.size]
        if not mine:
            return None
        batch = packed([[self.taught[i] for i in row] for row in mine], self.depths)
        batch.rows = len(self.order[self.step - 1])
        return batch

    def run(self) -> dict[str, Any]:
        """Train to the end, from wherever an interrupted call left off."""
        stage, run = self.stage, self.stage_run
        self._resume()
        self.peak = gemm_peak(COMPUTE[stage.compute], self.world.device)
        progress = Progress(run, self.steps, "steps", spent(run.folder)["seconds"])
        self.model.train()
        while self.step < self.steps:
            begin = time.perf_counter()
            metrics = self._train_step()
            run.log(self.step, **metrics, seconds=time.perf_counter() - begin)
            progress.show(self.step, f"loss {metrics['loss']:.3f}")
            stop = run.check_stop()
            if stop or self.step % stage.checkpoint_steps == 0:
                self._checkpoint()
            if stop:
                raise Interrupted
        self._checkpoint()
        if run.is_writer:
            models.save(run.folder, self.model)
            self.tokenizer.save(run.folder)
        return {"steps": self.step, "tokens": self.tokens, **self.results}

    def _train_step(self) -> dict[str, Any]:
        stage, world = self.stage, self.world
        self.step += 1
        batch = self.rows()
        counts = torch.zeros(2, dtype=torch.float64)
        if batch is not None:
            counts += torch.tensor([int((batch.targets >= 0).sum()), int(batch.real.sum())])
        taught, read = world.sum_(counts).tolist()
        self.gradients.zero()
        device = world.device
        sums = self.backward(batch.to(device), max(taught, 1.0)).cpu() if batch is not None else torch.zeros(2)
        norm = self.gradients.finish(world, 1.0, stage.grad_clip)
        if not math.isfinite(norm):
            raise UserError(
                f"{stage.name}.lr", stage.lr, f"the gradient is not finite at step {self.step}", "Lower it."
            )
        factor = rates.cosine(self.step / self.steps, stage.warmup, stage.final_lr)
        self.adam.step(stage.lr * factor)
        routers = self.model.routers()
        if stage.bias_speed:
            router_health.balance(routers, world, stage.bias_speed)
        else:  # nobody asks for the loads, so ranks need not add them up
            router_health.forget(routers)
        loss, further = world.sum_(sums).tolist()
        self.tokens += int(read)
        self.spoken += int(taught)
        return {"loss": loss, "mtp_loss": further, "grad_norm": norm, "lr": stage.lr * factor, "tokens_taught": taught}

    def backward(self, batch: Packed, taught: float) -> Tensor:
        """Add the gradients of this rank's rows; its parts of the mean losses: main and MTP's."""
        hidden = self.model(
            batch.tokens[:, : batch.real.size(1)], padding_mask=batch.real, document_ids=batch.documents
        )
        main = self.main_loss(hidden, batch) / taught
        further = self.further_loss(hidden, batch) / taught if self.depths else torch.zeros_like(main)
        # a mean over rows, of which the last step of an epoch has fewer than ranks want
        balance = self.model.balance_loss() * (len(batch.tokens) / batch.rows)
        (main + self.stage.mtp_weight * further + self.stage.balance_alpha * balance).backward()  # type: ignore[no-untyped-call]
        return torch.stack([main.detach(), further.detach()]).float()

    def main_loss(self, hidden: Tensor, batch: Packed) -> Tensor:
        """The loss summed over this rank's tokens to be learnt."""
        return summed_cross_entropy(hidden, self.model.head.weight, batch.targets)

    def further_loss(self, hidden: Tensor, batch: Packed) -> Tensor:
        """MTP's losses, summed over tokens and averaged over depths (V3 eq. 24-25)."""
        states = self.model.mtp_hidden_states(hidden, batch.tokens, batch.real, batch.documents)
        losses = [
            summed_cross_entropy(state, self.model.head.weight, batch.further(depth))
            for depth, state in enumerate(states, start=1)
        ]
        return torch.stack(losses).mean()

    def _checkpoint(self) -> None:
        new = self.tokens - self.saved_tokens
        self.saved_tokens = self.tokens
        if self.stage_run.is_writer and new:
            tensors = models.tensors_of(self.model) | self.adam.state()
            store.save_step(self.stage_run.folder, self.step, tensors, {"tokens": self.tokens, **self.state()})
        flops = new * training_flops(self.model.config, self.stage.length / 4, mtp=self.depths > 0)
        peak, self.mark = (time.perf_counter() - self.mark) * self.peak * self.world.size, time.perf_counter()
        spoken, self.spoken = self.spoken, 0
        self.stage_run.account(
            tokens_trained=new, flops=flops, peak_flops=peak, flops_training=flops, **self.beside(new, spoken)
        )

    def beside(self, read: int, taught: int) -> dict[str, float]:
        """What else was spent on so many tokens read, of which so many were learnt from, for the ledger."""
        return {}

    def state(self) -> dict[str, Any]:
        """What else a checkpoint keeps."""
        return {}

    def load_state(self, meta: dict[str, Any]) -> None:
        """Take back what `state` gave."""

    def _resume(self) -> None:
        found = store.load_newest(self.stage_run.folder, self.stage_run.say)
        if found is not None:
            self.step, tensors, meta = found
            self.tokens = self.saved_tokens = int(meta["tokens"])
            models.restore(self.model, tensors)
            self.adam.load_state(tensors)
            self.load_state(meta)
            self.stage_run.say(f"{self.stage.name:10} resumed at step {self.step}")
        self.stage_run.rewind(self.step + 1)


def summed_cross_entropy(hidden: Tensor, head: Tensor, targets: Tensor) -> Tensor:
    """Cross-entropy summed over targets (rows, length) that are not -1, from hidden (rows, length, d)."""
    kept = (targets >= 0).sum()
    return cross_entropy(hidden.flatten(0, 1), head, targets.flatten()) * kept
