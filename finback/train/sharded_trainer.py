"""Trains a model that is sharded over many ranks by a layout; same losses and updates as ReplicatedTrainer on one rank."""

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor

from finback.checkpoint import resharding
from finback.checkpoint.distributed import Steps
from finback.checkpoint.shares import Seeded, Values
from finback.checkpoint.store import KEEP
from finback.data.tokenizer import Tokenizer
from finback.model.config import ModelConfig
from finback.model.logprobs import text_logprobs
from finback.model.moe import Router, max_violation, router_buffers
from finback.model.transformer import Transformer
from finback.parallel.build import build, shares
from finback.parallel.context import in_parts
from finback.parallel.export import save_shares
from finback.parallel.gather import gather
from finback.parallel.layout import Layout, split_layers
from finback.parallel.mesh import Mesh
from finback.parallel.pipeline import Pipeline, PipelineStage, Rows, is_twice, sum_copies
from finback.parallel.shard import ShardedParameter, global_norm, like, local, share_of
from finback.runs.folder import StageRun
from finback.train.batch import Batch
from finback.train.ema import EMA
from finback.train.heap import return_large_blocks
from finback.train.loss import Losses, LossTerms, token_losses, training_losses
from finback.train.optim import BETAS, clip_scale, is_matrix
from finback.train.router_health import Health
from finback.train.sharded_optim import ShardedAdam, ShardedLeanAdam, ShardedMuon
from finback.train.sharded_options import ShardedOptions
from finback.train.trainer import Stateful, Trainer

PLAIN = ShardedOptions()
WHOLE = "whole copies"  # the name of the layout without sharding
# with at least LARGE_SHARE numbers, a rank returns freed blocks of BLOCK bytes to the system; small models would be slower
LARGE_SHARE, BLOCK = 1 << 25, 1 << 17


class ShardedTrainer(Trainer):
    """This rank's shard of a model and of its optimizers."""

    def __init__(
        self,
        config: ModelConfig,
        layout: Layout,
        rows: int,
        values: Values | int,
        options: ShardedOptions = PLAIN,
        device: str = "cpu",
    ) -> None:
        """rows: rows of a full step over all ranks.

        `values`: parameters and router biases, or the seed of random ones. torch.distributed must be initialized.
        """
        layout.check_trainable(config, rows, dist.get_world_size())
        self.config, self.layout, self.rows, self.options = config, layout, rows, options
        self.mesh = Mesh.of(layout, device)
        self.data_rank, self.data_ranks = self.mesh.dp.get_local_rank() // layout.cp, layout.dp
        # of the current step, for the loss at the end of a pipeline
        self.terms = LossTerms([1.0])
        values = Seeded(config, values) if isinstance(values, int) else values
        self.models, self.roots, self.sharding = build(
            config, layout, self.mesh, values, options.dtype, self._loss, options.put_on
        )
        self.model = self.models[0]
        self.routers: list[Router] = [router for model in self.models for router in model.routers()]
        self.parts = [part for stage in self.sharding.parts for part in stage]
        for number, parts in zip(self.stages, self.sharding.parts, strict=True):
            for part in parts:
                part.is_copy = part.name == "embed" and number > 0
        if sum(local(part.value).numel() for part in self.parts) >= LARGE_SHARE:
            return_large_blocks(BLOCK)
        stages = [root for root in self.roots if isinstance(root, PipelineStage)]
        for stage in stages:
            stage.is_compiled = options.compile
        self.pipeline = Pipeline(stages, layout, self.mesh) if stages else None
        self.optimizers = [self._optimizers(stage) for stage in self.sharding.parts]
        self.extras: list[Stateful] = []
        if options.ema_decay:
            stages_of_parts = [[(p.name, local(p.value)) for p in parts] for parts in self.sharding.parts]
            self.averages = [EMA(named, options.ema_decay, self.mesh.device) for named in stages_of_parts]
        self._steps: Steps | None = None

    @property
    def stages(self) -> list[int]:
        """Indices of this rank's pipeline stages."""
        return list(self.layout.stages_of(self.mesh.pp.get_local_rank()))

    def _optimizers(self, parts: list[ShardedParameter]) -> tuple[ShardedMuon | ShardedAdam | ShardedLeanAdam, ...]:
        """Optimizers of the hidden matrices, and of the rest."""
        learnt = [(part.name, part.value) for part in self._learnt(parts)]
        matrices, others = ([named for named in learnt if is_matrix(*named) == is_one] for is_one in (True, False))
        options, adam = self.options, ShardedAdam(others, betas=BETAS, weight_decay=0.0)
        if options.optimizer == "adamw":
            return ShardedAdam(matrices, betas=BETAS, weight_decay=options.weight_decay), adam
        return ShardedMuon(matrices, options.weight_decay, options.dtype, options.muon_form), adam

    @staticmethod
    def _learnt(parts: list[ShardedParameter]) -> list[ShardedParameter]:
        return [part for part in parts if part.value.requires_grad]

    # ---- one step --------------------------------------------------------------------------------------------------

    def zero(self) -> None:
        self.sharding.zero()

    def backward(self, batch: Batch | None, terms: LossTerms) -> Tensor:
        """See Trainer.backward; this rank's rows are split into the layout's micro-batches."""
        assert batch is not None, "on a layout every rank has rows in every step"
        if self.mesh.cp is not None:
            batch = batch.part(self.mesh.cp.get_local_rank(), self.layout.cp)
        layout = self.layout.at(len(batch.tokens) * self.data_ranks, self.rows)
        parts = layout.micro_batches
        self.terms = terms = replace(terms, row_share=terms.row_share / parts)
        if self.pipeline is not None:
            assert terms.main_loss is None, "a pipeline supports cross-entropy only"
            losses = self.pipeline.run(batch.tensors(), layout)
        else:
            losses = torch.zeros(3, device=self.mesh.device)
            for number, micro in enumerate(batch.chunk(parts), 1):
                if number == parts:
                    self.overlap()
                found = training_losses(self.model, micro, terms)
                found.total(terms).backward()  # type: ignore[no-untyped-call]
                losses += found.detached().to(losses.device)
        dist.all_reduce(losses)
        return losses.cpu()

    def _loss(
        self, model: Transformer, hidden: Tensor, rows: Rows, of_layers: Callable[[bool], tuple[Tensor, Tensor]]
    ) -> tuple[Tensor, Tensor]:
        """The loss at the end of a pipeline, and its parts (3,)."""
        terms = self.terms
        tensors: dict[str, Any] = dict(rows)
        main, mtp = token_losses(model, hidden, Batch(**tensors, seq_len=hidden.size(1)), terms)
        balance, divergence = (loss * terms.row_share for loss in of_layers(terms.mtp_weight > 0))
        losses = Losses(main, mtp, balance, divergence if self.config.index_topk else None)
        return losses.total(terms), losses.detached()

    def overlap(self) -> None:
        self.sharding.overlap()

    def finish(self, max_norm: float) -> float:
        self.sharding.reduce()
        if self.layout.pp > 1 and is_twice(self.config):
            sum_copies(self.parts, self.mesh, self.layout)
        norm = global_norm(self._learnt(self.parts))
        self.scale = clip_scale(norm, max_norm)
        return norm

    def update(self, *lrs: float) -> None:
        """lrs: learning rates of the hidden matrices and of the rest."""
        for stage in self.optimizers:
            for optimizer, lr in zip(stage, lrs, strict=True):
                optimizer.step(lr, self.scale)
        self.sharding.publish()

    def balance(self, speed: float) -> Health:
        """See Trainer.balance."""
        loads = self._by_layer([router.load for router in self.routers])
        if len(loads):
            dist.all_reduce(loads)
        for layer, router in zip(self._moe_layers(), self.routers, strict=True):
            router.load.copy_(loads[layer])
            router.update_bias(speed)
        return Health(max(map(max_violation, loads), default=0.0), int((loads == 0).sum()), list(loads))

    def biases(self) -> list[Tensor]:
        biases = self._by_layer([router.bias for router in self.routers])
        if len(biases):
            dist.all_reduce(biases, group=self.mesh.pp.get_group())
        return list(biases)

    def _moe_layers(self) -> list[int]:
        """Indices, among the layers with experts, of those on this rank; MTP modules are the last."""
        c, stages = self.config, split_layers(self.config, self.layout.stages)
        layers = [layer for number in self.stages for layer in stages[number].layers]
        return [layer - c.first_k_dense_replace for layer in layers if c.is_moe(layer)]

    def _by_layer(self, mine: list[Tensor]) -> Tensor:
        """A tensor per local router -> one for all routers (layers, experts), zeros for those on other ranks."""
        c = self.config
        layers = sum(map(c.is_moe, range(c.num_hidden_layers + c.num_nextn_predict_layers)))
        found = torch.zeros(layers, c.n_routed_experts, device=self.mesh.device)
        for layer, tensor in zip(self._moe_layers(), mine, strict=True):
            found[layer] = tensor
        return found

    # ---- evaluation ------------------------------------------------------------------------------------------------

    def text_logprobs(self, tokens: Tensor) -> Tensor:
        """Shard by shard, as in training."""
        for root in self.roots:
            root.eval()
        read = partial(text_logprobs, self.model) if self.pipeline is None else self.pipeline.text_logprobs
        logp = in_parts(read, tokens.to(self.mesh.device), self.mesh.cp)
        for root in self.roots:
            root.train()
        self.sharding.rest()
        return logp

    def gathered(self) -> Transformer:
        model = self.options.whole(self.config).to(self.mesh.device)
        self._gather(model)
        return model

    def _gather(self, model: Transformer, fills: bool = True) -> int:
        held: dict[str, Tensor] = {p.name: self.options.read(p) for p in self.parts if not p.is_copy}
        return gather(held | self._biases(), self.mesh, model, fills)

    @contextmanager
    def averaged(self) -> Iterator[None]:
        with super().averaged():
            self.sharding.publish()
            yield
        self.sharding.publish()

    # ---- checkpoints -----------------------------------------------------------------------------------------------

    def steps(self, run: StageRun) -> Steps:
        """The run's checkpoints; created at the first call, on all ranks."""
        self._steps = self._steps or Steps(run.folder / resharding.SHARDED, say=run.say)
        return self._steps

    def save(self, run: StageRun, step: int, meta: dict[str, Any], keep: int = KEEP) -> None:
        """Starts writing a checkpoint in the background; the previous one is complete by then."""
        steps = self.steps(run)
        steps.keep = keep
        steps.begin(step, self.state(), meta | {"layout": str(self.layout)})

    def settle(self) -> None:
        if self._steps is not None:
            self._steps.finish()

    def export(self, run: StageRun, folder: Path, tokenizer: Tokenizer) -> None:
        """Written by all ranks, shard by shard."""
        self.settle()
        mine = self.options.written(shares(self.models, self.mesh))
        save_shares(self.config, mine, folder, tokenizer.save)

    def resume(self, run: StageRun) -> tuple[int, dict[str, Any]] | None:
        """Restores the newest checkpoint, no matter which layout or single rank wrote it."""
        self.settle()
        steps, (of_one, of_many) = self.steps(run), resharding.newest(run.folder)
        found = self._load_whole(run) if of_one > of_many else self.load(steps)
        before, now = ("" if found is None else found[1].get("layout", WHOLE)), str(self.layout)
        if found is not None and before != now:
            run.say(f"{run.name:10} resumes as {now}, was {before}: the same within rounding, but not bit-exact")
        return found

    def _load_whole(self, run: StageRun) -> tuple[int, dict[str, Any]] | None:
        states = (self.state(), self._state(copies=True))
        mine = [share_of(name, tensor) for state in states for name, tensor in state.items()]
        found = resharding.fill(run.folder, mine, run.say)
        self.sharding.publish()
        return found

    def load(self, steps: Steps) -> tuple[int, dict[str, Any]] | None:
        """Restores the newest of these checkpoints."""
        found = steps.load_newest(self.state(), self._state(copies=True))
        self.sharding.publish()
        return found

    def state(self) -> dict[str, Tensor]:
        """All tensors of a checkpoint, under the names of a single rank, the model's with the prefix "model.".

        The tensors are the state itself: loading a checkpoint into them changes it.
        """
        return self._state(copies=False) | {f"model.{name}": bias for name, bias in self._biases().items()}

    def _biases(self) -> dict[str, Tensor]:
        """Biases of the routers on this rank."""
        return {name: bias for model in self.models for name, bias in router_buffers(model).items()}

    def _state(self, copies: bool) -> dict[str, Tensor]:
        """Parameters, their averages and optimizer states: only those that an earlier stage also has, or all others."""
        found: dict[str, Tensor] = {}
        everything = zip(self.stages, self.sharding.parts, self.optimizers, strict=True)
        for at, (number, parts, optimizers) in enumerate(everything):
            tensors = {f"model.{part.name}": part.value.detach() for part in parts}
            for kept in (*optimizers, *(self.extras if at == 0 else ())):
                tensors |= kept.state()
            for average in self.averages[at : at + 1]:
                averages = zip(average.state().items(), parts, strict=True)
                tensors |= {name: like(tensor, part.value) for (name, tensor), part in averages}
            for name, tensor in tensors.items():
                twice = name in ("model.embed", "average.embed") or name.startswith("adam.embed.")
                if copies == (number > 0 and twice):
                    # DCP's safetensors cannot store 0-dimensional tensors
                    found[name] = tensor if tensor.ndim else tensor.view(1)
        return found
