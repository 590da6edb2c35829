"""Pre-training steps of one model on many ranks; the same losses as step.backward and the optimisers on one."""

import math
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn

from finback.checkpoint.distributed import Steps
from finback.model.config import ModelConfig
from finback.model.moe import Router, max_violation
from finback.model.transformer import Transformer
from finback.parallel.experts import spread_experts
from finback.parallel.layout import Layout
from finback.parallel.mesh import Mesh
from finback.parallel.pipeline import Pipeline, PipelineStage, cut, is_twice, sum_copies
from finback.parallel.shard import FullyShard, ShardedParameter, Sharding, ZeroOne, blank, fill, finish, initial_values
from finback.train.optim import is_matrix
from finback.train.sharded_optim import ShardedAdam, ShardedMuon
from finback.train.step import backward, next_tokens


@dataclass(frozen=True)
class Knobs:
    """What of a pre-training step does not change between steps."""

    rows: int  # of a step, over all ranks
    length: int  # tokens per row that the trunk reads
    weight_decay: float = 0.05
    clip: float = 1.0
    mtp_weight: float = 0.3
    balance_alpha: float = 1e-4
    bias_speed: float = 0.003
    compute: torch.dtype = torch.float32


class ShardedTrainer:
    """This rank's share of a model, its optimisers and the steps that train it. Every method is for all ranks at once."""

    def __init__(
        self,
        config: ModelConfig,
        layout: Layout,
        knobs: Knobs,
        values: Iterable[tuple[str, Tensor]] | int,
        device: str = "cpu",
    ) -> None:
        """`values` of all parameters by name, or the seed of random ones; torch.distributed must have been started."""
        layout.check_trainable(config, knobs.rows, dist.get_world_size())
        self.config, self.layout, self.knobs = config, layout, knobs
        self.mesh = Mesh.of(layout, device)
        self.models, roots = self._build(values)
        self.sharding: Sharding = (
            FullyShard(roots, self.models, layout, self.mesh)
            if layout.sharding == "fsdp"
            else ZeroOne(self.models, self.mesh)
        )
        self.parts = [part for stage in self.sharding.parts for part in stage]
        self._mark_copies()
        stages = [root for root in roots if isinstance(root, PipelineStage)]
        self.pipeline = Pipeline(stages, layout, self.mesh, knobs.rows // layout.dp, knobs.length) if stages else None
        self.optimisers = [self._optimisers(stage) for stage in self.sharding.parts]

    def _build(self, values: Iterable[tuple[str, Tensor]] | int) -> tuple[list[Transformer], list[nn.Module]]:
        """This rank's models, one per stage, and what is called in their place."""
        config, knobs, count = self.config, self.knobs, self.layout.stages
        models = [blank(config, knobs.compute) for _ in self.stages]
        roots: list[nn.Module] = list(models)
        if self.layout.pp > 1:
            models = [cut(model, stage, count) for model, stage in zip(models, self.stages, strict=True)]
            weights = knobs.mtp_weight, knobs.balance_alpha
            roots = [
                PipelineStage(model, stage, count, self._loss, weights)
                for model, stage in zip(models, self.stages, strict=True)
            ]
        values = initial_values(config, values) if isinstance(values, int) else values
        fill(models, values, self.mesh, fsdp=self.layout.sharding == "fsdp")
        for model in models:
            spread_experts(model, self.mesh)
            model.train()
        return models, roots

    @property
    def stages(self) -> list[int]:
        """The numbers of this rank's pipeline stages."""
        return list(self.layout.stages_of(self.mesh.pp.get_local_rank()))

    @property
    def data_rank(self) -> int:
        """Which of layout.dp equal shares of a step's rows this rank reads."""
        return self.mesh.dp.get_local_rank()

    def _mark_copies(self) -> None:
        for stage, parts in zip(self.stages, self.sharding.parts, strict=True):
            for part in parts:
                part.is_copy = part.name == "embed" and stage > 0

    def _optimisers(self, parts: list[ShardedParameter]) -> tuple[ShardedMuon, ShardedAdam]:
        matrices = [(p.name, p.value) for p in parts if is_matrix(p.name, p.value)]
        others = [(p.name, p.value) for p in parts if not is_matrix(p.name, p.value)]
        muon = ShardedMuon(matrices, weight_decay=self.knobs.weight_decay, compute=self.knobs.compute)
        adam = ShardedAdam(others, betas=(0.9, 0.95), weight_decay=0.0)
        adam.begin()
        return muon, adam

    def _loss(self, model: Transformer, hidden: Tensor, tokens: Tensor) -> tuple[Tensor, Tensor]:
        """The main and the MTP loss at the end of a pipeline."""
        return next_tokens(model, hidden, tokens, bool(self.knobs.mtp_weight))

    def step(self, tokens: Tensor, muon_lr: float, adam_lr: float) -> dict[str, float]:
        """One step on this rank's rows (rows / data, length + 1 + depths); the same numbers on every rank.

        Losses are means over all tokens of the step, however they are cut: all parts are equally large. Where the norm of
        the gradient is not finite, nothing changes.
        """
        self.sharding.zero()
        losses = self._backward(tokens)
        self.sharding.reduce()
        if self.layout.pp > 1 and is_twice(self.config):
            sum_copies(self.parts, self.mesh, self.layout)
        parts_of_a_step = self.layout.dp * self.layout.micro_batches
        norm = finish(self.parts, 1 / parts_of_a_step, self.knobs.clip)
        if math.isfinite(norm):
            for muon, adam in self.optimisers:
                muon.step(muon_lr)
                adam.step(adam_lr)
            self.sharding.publish()
        violation, idle = self._balance(update=math.isfinite(norm))
        dist.all_reduce(losses)
        main, mtp, balance = (losses / parts_of_a_step).tolist()
        return {
            "loss": main,
            "mtp_loss": mtp,
            "balance": balance,
            "grad_norm": norm,
            "max_violation": violation,
            "idle_experts": idle,
        }

    def _backward(self, tokens: Tensor) -> Tensor:
        """Gradients, and (main, MTP, balance) summed over micro-batches; zeros where another rank has the losses."""
        if self.pipeline is not None:
            return self.pipeline.run(tokens)
        knobs = self.knobs
        found = [
            backward(self.models[0], rows, knobs.mtp_weight, knobs.balance_alpha)
            for rows in tokens.chunk(self.layout.micro_batches)
        ]
        device = self.mesh.device  # a loss that was left out may lie elsewhere
        losses = [torch.stack([t.to(device) for t in (f.main, f.mtp, f.balance)]) for f in found]
        return torch.stack(losses).sum(0)

    def routers(self) -> list[Router]:
        """Those of this rank's stages."""
        return [router for model in self.models for router in model.routers()]

    def _balance(self, update: bool) -> tuple[float, int]:
        """Update every router's bias from the load of the whole step; the largest violation, how many idle experts."""
        routers = self.routers()
        worst = torch.zeros(1, device=self.mesh.device)
        idle = torch.zeros(1, device=self.mesh.device)
        if routers:
            loads = torch.stack([router.load for router in routers])
            dist.all_reduce(loads, group=self.mesh.dp.get_group())
            for router, load in zip(routers, loads, strict=True):
                router.load.copy_(load)
                if update:
                    router.update_bias(self.knobs.bias_speed)
                router.load.zero_()
            worst[0] = max(max_violation(load) for load in loads)
            idle[0] = (loads == 0).sum() / self.layout.dp  # every data rank counts the same
        dist.all_reduce(worst, dist.ReduceOp.MAX)
        dist.all_reduce(idle)
        return worst.item(), round(idle.item())

    def state(self) -> dict[str, Tensor]:
        """All that a checkpoint keeps, under the names that one rank would give it, "model." before the model's.

        Tensors are the state itself: reading a checkpoint into them changes it.
        """
        state = {
            n: t for stage in range(len(self.models)) for n, t in self._state(stage) if not self._is_copy(n, stage)
        }
        for model in self.models:
            names = (n for n, _ in model.named_buffers() if n.endswith("router.bias"))
            state |= {f"model.{name}": model.get_buffer(name) for name in names}
        return state

    def resume(self, steps: Steps) -> tuple[int, dict[str, Any]] | None:
        """Take up the newest checkpoint, whatever layout wrote it; its step and meta, or None where there is none."""
        copies = {n: t for i in range(len(self.models)) for n, t in self._state(i) if self._is_copy(n, i)}
        found = steps.load_newest(self.state(), copies)
        self.sharding.publish()
        return found

    def _is_copy(self, name: str, stage: int) -> bool:
        return self.stages[stage] > 0 and (name == "model.embed" or name.startswith("adam.embed."))

    def _state(self, stage: int) -> Iterator[tuple[str, Tensor]]:
        """Parameters and their optimisers' state; DCP's safetensors have no tensors without a dimension."""
        muon, adam = self.optimisers[stage]
        for part in self.sharding.parts[stage]:
            yield f"model.{part.name}", part.value.detach()
        for name, tensor in (muon.state() | adam.state()).items():
            yield name, tensor if tensor.ndim else tensor.view(1)
