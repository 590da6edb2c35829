"""Pre-training of a model that lies on many ranks by a layout: pipeline stages, shared weights, experts apart."""

import dataclasses
from collections.abc import Iterator
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from finback.checkpoint.distributed import Steps, newest, whole_model
from finback.config import UserError
from finback.model.recompute import use_recompute
from finback.model.transformer import Transformer
from finback.parallel.mesh import World
from finback.runs.folder import StageRun
from finback.stages.compress import bits_by_source
from finback.stages.pretraining import Pretraining
from finback.train import rates
from finback.train.sharded_trainer import Knobs, ShardedTrainer
from finback.train.spikes import Spikes

if TYPE_CHECKING:
    from finback.stages.pretrain import Pretrain

SHARDS = "sharded"  # folder of its checkpoints, dropped with the others


class Sharded(Pretraining):
    """The loop of pre-training over train/sharded_trainer.py: every rank has its share of the model and reads its share of the rows."""

    def __init__(self, stage: "Pretrain", run: StageRun) -> None:
        assert stage.layout is not None, "without a layout there is nothing to share out"
        self.layout = stage.layout
        super().__init__(stage, run)
        self.steps = Steps(run.folder / SHARDS, stage.keep)
        # a step is learnt from before its loss is known here: only one that changed nothing can be called skipped
        self.spikes = Spikes(0.0, stage.spike_patience)

    def set_up(self) -> None:
        """This rank's share of the model and of its optimisers' state."""
        stage, device = self.stage, "cuda" if torch.cuda.is_available() else "cpu"
        self.precision = stage.compute
        if self.precision == "auto":
            self.precision = "bf16" if device == "cuda" else "fp32"
        values: int | Iterator[tuple[str, Tensor]] = self.stage_run.seed("weights")
        if stage.model is not None:
            self.config = dataclasses.replace(stage.model, vocab_size=self.tokenizer.vocab_size)
        else:
            given = self.started()
            self.config = stage.adapted(given.config)
            values = ((name, p.detach()) for name, p in given.named_parameters())
        if not self.world.together:
            raise UserError(
                f"{stage.name}.layout",
                str(self.layout),
                "wants ranks that talk to each other",
                "Use --ranks or torchrun.",
            )
        knobs = Knobs(
            stage.rows,
            stage.length,
            stage.weight_decay,
            stage.clip,
            rates.level(stage.mtp_weight, 0),
            stage.balance_alpha,
            rates.level(stage.bias_speed, 0),
            self.dtype,
        )
        self.many = ShardedTrainer(self.config, self.layout, knobs, values, device)
        for model in self.many.models:
            use_recompute(model, stage.recompute)

    def learn(self, rows: int) -> dict[str, Any]:
        """One step; where its gradient is no number, nothing has changed."""
        stage = self.stage
        self.many.knobs = dataclasses.replace(
            self.many.knobs,
            mtp_weight=rates.level(stage.mtp_weight, self.tokens),
            bias_speed=rates.level(stage.bias_speed, self.tokens),
        )
        tokens = self.loader.batch(rows, self.many.data_rank, self.layout.dp)
        told = self.many.step(tokens.to(self.many.mesh.device), *self.rates)
        verdict = self.judge(told["loss"], told["grad_norm"])
        return told | ({"lr": self.rates[0]} if verdict == "learn" else {"lr": 0.0, "skipped": verdict})

    def save_step(self, meta: dict[str, Any]) -> None:
        """Start writing a checkpoint, while training goes on; the one before it is whole by then."""
        self.steps.begin(self.step, self.many.state(), meta)

    def load_step(self) -> tuple[int, dict[str, Any]] | None:
        """Take back the newest checkpoint, whatever layout wrote it."""
        self.settle()
        return self.many.resume(self.steps)

    def settle(self) -> None:
        """Wait until the checkpoint that is being written is whole."""
        self.steps.finish()

    def put_out(self) -> None:
        """Put the whole model together in the writer's memory, out of the last checkpoint, and write it as any stage does."""
        self.settle()
        if self.stage_run.is_writer:
            self.model = Transformer(self.config)
            self.model.load_state_dict(whole_model(newest(self.steps.folder), self.config))
            self._save(self.stage_run.folder, self.model)

    def bits(self) -> dict[str, float]:
        """By the writer alone, which has the whole model."""
        if not self.stage_run.is_writer:
            return {}
        return bits_by_source(self.model, self.folder, self.loader.shares, World())
