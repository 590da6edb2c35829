"""The training loop of SFT and distillation; the two differ in the source of batches and in the main loss."""

from abc import ABC, abstractmethod
from typing import TYPE_CHECKING, Any

import torch

from finback.data.tokenizer import Tokenizer
from finback.model.count import forward_flops_of, recomputed_flops_of, training_flops_of
from finback.parallel.mesh import World
from finback.rollouts.generation import Rollouts
from finback.runs.folder import StageRun
from finback.stages.generation_costs import generation_costs
from finback.stages.validation import Validator
from finback.train import rates
from finback.train.batch import Batch
from finback.train.loop import Loop, Training
from finback.train.loss import LossTerms
from finback.train.precision import COMPUTE
from finback.train.trainer import Trainer, demand_finite

if TYPE_CHECKING:
    from finback.stages.sft import SFT
    from finback.stages.teachers import DistillationTeacher


class Batches(ABC):
    """A source of batches for a fine-tuning run."""

    steps: int
    # whether the model generates the lessons itself, which is part of a step's cost
    generates = False
    # generates the lessons
    rollouts: Rollouts | None = None

    def __init__(self, stage: "SFT", run: StageRun, tokenizer: Tokenizer, trainer: Trainer) -> None:
        self.run, self.tokenizer, self.world, self.trainer = run, tokenizer, World.of(run), trainer
        # number of MTP modules that are trained
        self.depths = trainer.model.config.num_nextn_predict_layers if stage.mtp_weight and stage.adapter is None else 0
        # results of the stage that concern its batches
        self.results: dict[str, Any] = {}

    @abstractmethod
    def batch(self, step: int) -> tuple[Batch | None, int]:
        """This rank's rows of a step (counted from 1), None if it has none, and the number of rows over all ranks.

        Ranks with the same data_rank get the same rows.
        """

    def state(self) -> dict[str, Any]:
        """What the rows of the next steps depend on, besides the step's number."""
        return {}

    def load_state(self, state: dict[str, Any]) -> None:  # noqa: B027 - most sources have no state
        """Restores what `state` returned."""

    def metrics(self, step: int) -> dict[str, Any]:
        """Metrics of the rows of a step, besides their loss. Collective: all ranks call it."""
        return {}

    def close(self) -> int:
        """Releases the generator. Returns the tokens that this rank generated for steps which will not be taken."""
        return 0


class FineTuning(Training):
    """The state of one fine-tuning run; a Loop calls `step`."""

    def __init__(
        self, stage: "SFT", trainer: Trainer, batches: Batches, teacher: "DistillationTeacher | None" = None
    ) -> None:
        super().__init__(batches.run, trainer, batches.steps, stage.checkpoint_steps, COMPUTE[stage.compute])
        self.stage, self.tokenizer, self.batches, self.teacher = stage, batches.tokenizer, batches, teacher
        self.config = trainer.model.config
        self.depths, self.tokens = batches.depths, 0
        run, tokenizer = batches.run, batches.tokenizer
        self.validator = Validator(stage.validation, run, trainer, tokenizer, batches.rollouts)

    def finished(self, loop: Loop) -> bool:
        return super().finished(loop) or self.validator.stopped

    def before(self, loop: Loop) -> None:
        self.validator.before(loop)

    def after(self, loop: Loop, metrics: dict[str, Any]) -> None:
        self.validator.after(loop)

    def step(self, loop: Loop) -> dict[str, Any]:
        """One update. The loss is the mean over all labels of the step, for any number of ranks."""
        stage, trainer = self.stage, self.trainer
        batch, rows = self.batches.batch(loop.step)
        labels = self._account(batch, loop)
        main_loss = None if self.teacher is None else self.teacher.loss
        trainer.zero()
        on_device = None if batch is None else batch.to(self.world.device)
        # the auxiliary losses are means over rows; in the last step of an epoch some ranks may have none
        share = 0.0 if batch is None else len(batch.tokens) / rows
        counts = [max(labels, 1.0)] * (1 + self.depths)
        mtp_weight = stage.mtp_weight if self.depths else 0.0
        terms = LossTerms(counts, mtp_weight, stage.balance_alpha, share, main_loss)
        losses = trainer.backward(on_device, terms)
        norm = trainer.finish(stage.max_grad_norm)
        demand_finite(norm, f"{stage.name}.lr", stage.lr, loop.step)
        lr = stage.lr * rates.cosine(loop.step / self.total, stage.warmup, stage.final_lr)
        trainer.update(lr)
        if stage.bias_speed:
            trainer.balance(stage.bias_speed)
        else:  # the loads are not used, so ranks need not sum them
            trainer.forget_loads()
        loss, mtp, _ = losses.tolist()
        costs = generation_costs(self.batches.rollouts, loop) if self.batches.rollouts is not None else {}
        costs |= self.batches.metrics(loop.step)
        return {"loss": loss, "mtp_loss": mtp, "grad_norm": norm, "lr": lr, "labels": labels, **costs}

    def _account(self, batch: Batch | None, loop: Loop) -> float:
        """Number of labels of the step over all ranks; adds its cost to the ledger."""
        mine, policy = torch.zeros(6, dtype=torch.float64), self.stage.recomputes
        if batch is not None:
            lengths = batch.lengths()
            forward = forward_flops_of(self.config, lengths) if self.batches.generates else 0.0
            asked = self.teacher.flops(batch) if self.teacher is not None else 0.0
            training = training_flops_of(self.config, lengths, self.depths > 0, frozen=self.stage.adapter is not None)
            again = recomputed_flops_of(self.config, lengths, policy or "none", self.depths > 0)
            mine += torch.tensor([int(batch.learnt.sum()), sum(lengths), training, forward, asked, again])
        same = self.world.size // self.trainer.data_ranks
        labels, tokens, training, generation, auxiliary, again = (self.world.sum_(mine) / same).tolist()
        self.tokens += int(tokens)
        flops = {"training": training} | ({"recomputed": again} if policy else {})
        if self.batches.generates:
            flops["generation"] = generation
        if self.teacher is not None and self.teacher.knows_flops:
            flops["auxiliary"] = auxiliary
        loop.spend(int(tokens), int(labels) if self.batches.generates else 0, **flops)
        return float(labels)

    def note(self, metrics: dict[str, Any]) -> str:
        return f"loss {metrics['loss']:.3f}"

    def state(self) -> dict[str, Any]:
        return {"tokens": self.tokens, "batches": self.batches.state(), "validator": self.validator.state()}

    def load_state(self, state: dict[str, Any]) -> None:
        self.tokens = state["tokens"]
        self.batches.load_state(state.get("batches", {}))
        self.validator.load_state(state.get("validator", {}))

    def finish(self, loop: Loop) -> dict[str, Any]:
        written = self.validator.finish(loop)
        if unused := sum(self.world.gather(self.batches.close())):
            loop.spend(generated=unused)
            loop.account()
        return {"steps": loop.step, "tokens": self.tokens, **self.batches.results, **written}

    def close(self) -> None:
        """Stops generation and teachers if they are still running."""
        self.batches.close()
        if self.teacher is not None:
            self.teacher.close()
