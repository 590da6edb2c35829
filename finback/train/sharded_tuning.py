"""SFT, distillation and RL of a sharded model without a pipeline; for adapters see sharded_adapter.py.

Unlike in pre-training, a step's rows need not divide among the ranks, and rows are padded for context parallelism. All ranks
make the same number of passes; a rank without rows passes one that has no loss.
"""

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, replace
from functools import partial
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor

from finback.checkpoint.shares import Values
from finback.model.config import ModelConfig
from finback.model.fp4 import Qat, use_fp4
from finback.model.frozen import BaseFormat, base_dtype, freeze
from finback.model.logprobs import text_logprobs
from finback.model.lora import learnt_parameters
from finback.model.moe import Router, router_buffers
from finback.model.quantized import factors_as_parameters
from finback.model.transformer import Transformer
from finback.parallel.build import build
from finback.parallel.context import in_parts, summed_parts, whole_rows
from finback.parallel.layout import Layout
from finback.parallel.mesh import Mesh
from finback.parallel.served_weights import ServedWeights, whole_copy
from finback.parallel.shard import ShardedParameter, Sharding, local
from finback.runs.folder import StageRun
from finback.train import router_health
from finback.train.batch import Batch, idle
from finback.train.lean_adam import Moments
from finback.train.loss import LossTerms, training_losses
from finback.train.optim import BETAS
from finback.train.router_health import Health
from finback.train.sharded_optim import ShardedAdam, ShardedLeanAdam
from finback.train.sharded_options import ShardedOptions
from finback.train.sharded_trainer import ShardedTrainer
from finback.train.trainer import T, Trainer


@dataclass(frozen=True)
class TuningOptions(ShardedOptions):
    """Options for fine-tuning a model, and which of its parameters learn."""

    # weight decay of all parameters that learn
    weight_decay: float = 0.0
    # prefixes of the names of frozen parameters
    frozen: tuple[str, ...] = ()
    # format of the base if an adapter is trained; None: the model itself is trained
    base: BaseFormat | None = None
    moments: Moments = "fp32"

    @property
    def param_dtype(self) -> torch.dtype:
        """The dtype of the sharded parameters."""
        return torch.float32 if self.base is None else base_dtype(self.base)

    def put_on(self, model: Transformer) -> Transformer:
        super().put_on(model)
        if self.base is not None:
            self.freeze(model)
        learnt = dict(learnt_parameters(model))
        for name, parameter in model.named_parameters():
            if name not in learnt or name.startswith(self.frozen):
                parameter.requires_grad_(False)
        return model

    def freeze(self, model: Transformer) -> Transformer:
        """Turns a blank model into the frozen base of an adapter, in place."""
        assert self.base is not None, "only adapters have a base"
        return factors_as_parameters(freeze(model, self.base))


class UnevenRows(Trainer):
    """Passes over rows, whole or split along the sequence; ranks may have different numbers of them, or none."""

    layout: Layout
    mesh: Mesh
    sharding: Sharding
    in_step = True

    def backward(self, batch: Batch | None, terms: LossTerms) -> Tensor:
        """See Trainer.backward; a rank's rows are split into the layout's micro-batches, some of which may be idle."""
        losses, depths = torch.zeros(3, device=self.mesh.device), len(terms.counts) - 1
        passes = self.layout.micro_batches
        given = [] if batch is None else _pieces(batch, passes)
        row_share = 0.0 if batch is None else terms.row_share / len(batch.tokens)
        nothing = [idle(self.layout.cp, depths).to(self.mesh.device)] * (passes - len(given))
        for number, micro in enumerate([*given, *nothing], 1):
            if number == passes:
                self.overlap()
            share = row_share * len(micro.tokens) if number <= len(given) else 0.0
            losses += self._backward(micro, replace(terms, row_share=share))
        dist.all_reduce(losses)
        return losses.cpu()

    def _backward(self, batch: Batch, terms: LossTerms) -> Tensor:
        found = training_losses(self.model, self.part(batch), terms)
        found.total(terms).backward()  # type: ignore[no-untyped-call]
        return found.detached().to(self.mesh.device)

    def part(self, batch: Batch) -> Batch:
        if self.mesh.cp is None:
            return batch
        return batch.widened(self.layout.cp).part(self.mesh.cp.get_local_rank(), self.layout.cp)

    def whole_rows(self, numbers: Tensor, batch: Batch) -> Tensor:
        if batch.shared is not None:
            return summed_parts(numbers, self.mesh.cp)
        return whole_rows(numbers, self.mesh.cp)[:, : batch.seq_len]

    def of_same_rows(self, value: T) -> list[T]:
        if self.mesh.cp is None:
            return [value]
        values: list[T] = [value] * self.layout.cp
        dist.all_gather_object(values, value, group=self.mesh.cp.get_group())
        return values

    def rest(self) -> None:
        self.sharding.rest()

    def text_logprobs(self, tokens: Tensor) -> Tensor:
        found = in_parts(lambda part: text_logprobs(self.model, part), tokens.to(self.mesh.device), self.mesh.cp)
        self.rest()
        return found


def _pieces(batch: Batch, parts: int) -> list[Batch]:
    """Rows in at most `parts` batches, as even as possible, none of them empty."""
    size = -(-len(batch.tokens) // parts)
    return batch.chunk(-(-len(batch.tokens) // size))


class ShardedTuner(UnevenRows, ShardedTrainer):
    """Trains all weights; gradients and optimizer states are sharded like them."""

    options: TuningOptions

    def __init__(
        self, config: ModelConfig, layout: Layout, values: Values, options: TuningOptions, device: str = "cpu"
    ) -> None:
        # any number of rows is allowed
        super().__init__(config, layout, layout.dp * layout.micro_batches, values, options, device)
        self.world = self.mesh.world
        self._served: ServedWeights | None = None
        if "mtp." in options.frozen:
            self.routers = [m for m in self.model.blocks.modules() if isinstance(m, Router)]

    @property
    def learnt(self) -> list[ShardedParameter]:
        """This rank's shards of the parameters that learn."""
        return self._learnt(self.parts)

    def _optimizers(self, parts: list[ShardedParameter]) -> tuple[ShardedAdam | ShardedLeanAdam, ...]:
        """One optimizer for all parameters that learn."""
        named, decay = ([(part.name, part.value) for part in self._learnt(parts)], self.options.weight_decay)
        if self.options.moments == "fp32":
            return (ShardedAdam(named, BETAS, decay),)
        return (ShardedLeanAdam(named, BETAS, decay, self.options.moments),)

    def update(self, *lrs: float) -> None:
        super().update(*lrs)
        self._tell()

    def resume(self, run: StageRun) -> tuple[int, dict[str, Any]] | None:
        found = super().resume(run)
        self._tell()
        return found

    def _tell(self) -> None:
        """Marks the served weights as out of date."""
        if self._served is not None:
            self._served.learnt()

    def balance(self, speed: float) -> Health:
        """See Trainer.balance; only for routers that are trained."""
        return router_health.balance(self.routers, self.world, speed)

    @property
    def _serves_itself(self) -> bool:
        """Whether this rank generates with the model that it trains."""
        return self.layout.is_whole and self.options.qat == "none"

    def gathered(self) -> Transformer:
        return self.model if self._serves_itself else super().gathered()

    def served(self) -> ServedWeights:
        if self._served is None and self._serves_itself:
            self._served = ServedWeights(self.model)
        if self._served is None:
            model, fills = whole_copy(self.config, self.options.dtype, self.options.dtype, self.world)
            self._served = ServedWeights(model, partial(self._gather, fills=fills))
        return self._served


class FrozenShare:
    """A frozen model that is sharded by FSDP2 over the trainer's mesh: a teacher or a reference model."""

    def __init__(
        self,
        config: ModelConfig,
        trainer: UnevenRows,
        values: Values,
        compute: torch.dtype,
        prefix: str = "frozen",
        qat: Qat = "none",
    ) -> None:
        """prefix: starts its names in a checkpoint. qat: how its weights are rounded, as in ShardedOptions."""
        trainer.layout.check(config, trainer.layout.dp * trainer.layout.micro_batches)
        freezing = lambda model: (model if qat == "none" else use_fp4(model)).requires_grad_(False)  # noqa: E731
        made = build(config, trainer.layout.sharded(), trainer.mesh, values, compute, put_on=freezing)
        self.model, self.sharding, self.prefix = made.models[0].eval(), made.sharding, prefix
        self.policy = trainer.sharding.parts[0]

    @contextmanager
    def asked(self) -> Iterator[Transformer]:
        """A context in which the model can be used."""
        yield self.model
        self.sharding.rest()

    @torch.no_grad()
    def refresh(self, model: Transformer) -> None:
        """Copies what the trainer's model has learned, shard by shard."""
        theirs: dict[str, Tensor] = {part.name: part.value for part in self.policy} | router_buffers(model)
        for name, mine in self.state().items():
            local(mine).copy_(local(theirs[name.removeprefix(f"{self.prefix}.")]))

    def state(self) -> dict[str, Tensor]:
        """Its shards, under the names of a single rank."""
        mine: dict[str, Tensor] = {part.name: part.value.detach() for part in self.sharding.parts[0]}
        return {f"{self.prefix}.{name}": tensor for name, tensor in (mine | router_buffers(self.model)).items()}

    def load_state(self, tensors: dict[str, Tensor]) -> None:
        """Restores them, unless they were loaded in place."""
        for name, mine in self.state().items():
            local(mine).copy_(local(tensors[name]))
