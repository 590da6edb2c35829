"""SFT, distillation and RL of an adapter on a base that is sharded among ranks by a layout.

Every rank holds the whole adapter, except for those of routed experts, of which it holds the ones for its own experts. Files
and checkpoints are the same as on one rank; the first rank gathers them.
"""

import math
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn

from finback.checkpoint import models, peft
from finback.checkpoint.shares import Values
from finback.data.tokenizer import Tokenizer
from finback.kernels.formats import FORMATS
from finback.model.config import ModelConfig
from finback.model.lora import (
    AdaptedTransformer,
    DoraLinear,
    LoRA,
    LoraLinear,
    LoraMoE,
    adapted,
    adapter_parameters,
    matrices,
    put_on_experts,
)
from finback.model.low_rank import LowRank
from finback.model.moe import router_buffers
from finback.model.replace import recast
from finback.model.transformer import Transformer
from finback.parallel.build import build
from finback.parallel.gather import gather, sampled
from finback.parallel.layout import Layout
from finback.parallel.mesh import Mesh, World
from finback.parallel.quantizing import Quantizing
from finback.parallel.served_weights import ServedWeights, whole_copy
from finback.parallel.shard import share_of
from finback.runs.folder import StageRun
from finback.train.lean_adam import adam_of
from finback.train.optim import Gradients, exact_norm
from finback.train.sharded_tuning import TuningOptions, UnevenRows
from finback.train.trainer import ReplicatedTrainer, save


@dataclass(frozen=True)
class Adapter:
    """An adapter to train: its shape, the folders of its base and of the adapter it continues, and the seed of a new one."""

    lora: LoRA
    base: Path
    begun: Path | None
    seed: int


class PartedGradients(Gradients):
    """Gradients of parameters that all ranks hold, and of partitioned ones, which only the ranks of an edp axis share."""

    def __init__(self, common: Sequence[nn.Parameter], parted: Sequence[nn.Parameter], mesh: Mesh) -> None:
        super().__init__([*common, *parted])
        count = sum(p.numel() for p in common)
        self.common, self.parted, self.mesh = self.flat[:count], self.flat[count:], mesh

    def summed(self, world: World) -> float:
        world.sum_(self.common)
        dist.all_reduce(self.parted, group=self.mesh.edp.get_group())
        square = torch.tensor(exact_norm(self.parted) ** 2, dtype=torch.float64, device=self.flat.device)
        dist.all_reduce(square, group=self.mesh.ep.get_group())
        return math.sqrt(exact_norm(self.common) ** 2 + square.item())


class AdapterTuner(UnevenRows, ReplicatedTrainer):
    """Trains an adapter on a frozen, sharded base."""

    model: AdaptedTransformer

    def __init__(
        self,
        config: ModelConfig,
        layout: Layout,
        values: Values,
        adapter: Adapter,
        options: TuningOptions,
        device: str = "cpu",
    ) -> None:
        layout.check_trainable(config, layout.dp * layout.micro_batches, dist.get_world_size())
        self.config, self.layout, self.options = config, layout, options
        self.mesh = Mesh.of(layout, device)
        form = None if options.base is None else FORMATS.get(options.base)
        packing = None if form is None else Quantizing(values, form)
        filled, dtype = packing or values, options.param_dtype
        made = build(config, layout, self.mesh, filled, options.dtype, put_on=options.put_on, dtype=dtype)
        self.sharding, base = made.sharding, made.models[0]
        self.base: dict[str, Tensor] = {part.name: part.value for part in made.sharding.parts[0]}
        places, known = (adapter.base, adapter.begun), packing.samples if packing else {}
        digest = peft.digest(base, lambda matrix, step: sampled(share_of("", matrix), step), known)
        model = peft.put_adapter(base, adapter.lora, places, digest, adapter.seed)
        named = adapter_parameters(model)
        for _, parameter in named:  # it is whole, and not fetched like a base in host memory
            parameter.data = parameter.data.to(self.mesh.device)
        super().__init__(model, self.mesh.world, [adam_of(named, options.weight_decay, options.moments)], named)
        self.parted = _parted(model)
        if self.parted:
            common = [p for name, p in named if name not in self.parted]
            self.gradients = PartedGradients(common, list(self.parted.values()), self.mesh)
        self.data_rank, self.data_ranks = self.mesh.dp.get_local_rank() // layout.cp, layout.dp
        self._whole: ServedWeights | None = None

    def update(self, *lrs: float) -> None:
        super().update(*lrs)
        self._tell()

    def _tell(self) -> None:
        """Marks the served weights as out of date."""
        if self._whole is not None:
            self._whole.learnt()

    # ---- generating ------------------------------------------------------------------------------------------------

    def gathered(self) -> Transformer:
        return self.served()()

    def served(self) -> ServedWeights:
        """The base, gathered once, with the adapter in training, and a copy of the adapter's partitioned parts."""
        if self._whole is None:
            options = self.options
            copy, fills = whole_copy(self.config, options.dtype, options.param_dtype, self.world, options.freeze)
            received = gather(self.base | router_buffers(self.model), self.mesh, copy, fills)
            whole = _under(self.model, copy)
            self._whole = ServedWeights(whole, self._take_over if self.parted else None)
            self._whole.bytes = received
        return self._whole

    @torch.no_grad()
    def _take_over(self, whole: Transformer) -> int:
        """Fills the partitioned parts of a whole adapter from all ranks. Returns the bytes received from others."""
        received, members = 0, self.mesh.ep.size()
        targets = dict(adapter_parameters(whole))
        for name, mine in self.parted.items():
            parts = [torch.empty_like(mine) for _ in range(members)]
            dist.all_gather(parts, mine.detach(), group=self.mesh.ep.get_group())
            targets[name].copy_(torch.cat(parts))
            received += (members - 1) * mine.nbytes
        return received

    # ---- files and checkpoints ---------------------------------------------------------------------------------------

    def together(self, tensors: dict[str, Tensor]) -> dict[str, Tensor]:
        """The whole tensors, in the first rank's host memory; the other ranks send their parts."""
        if not self.parted:
            return tensors
        group, members = self.mesh.ep.get_group(), range(self.mesh.ep.size())
        found = dict(tensors)
        for name, tensor in tensors.items() if self.mesh.edp.get_local_rank() == 0 else ():
            if self._is_parted(name, tensor):
                mine = tensor.detach().cpu()
                parts = [torch.empty_like(mine) for _ in members] if self.mesh.ep.get_local_rank() == 0 else None
                dist.gather(mine, parts, group=group, group_dst=0)
                if parts is not None:
                    found[name] = torch.cat(parts)
        return found

    def own(self, tensors: dict[str, Tensor]) -> dict[str, Tensor]:
        members, member = self.mesh.ep.size(), self.mesh.ep.get_local_rank()
        return {n: t.chunk(members)[member] if self._is_parted(n, t) else t for n, t in tensors.items()}

    def _is_parted(self, name: str, tensor: Tensor) -> bool:
        """Whether a checkpoint's tensor has a row per expert: adapters of experts, their moments, and those of the reference model."""
        ours = name.partition(".")[2]
        return tensor.ndim > 0 and any(ours.startswith(part) for part in self.parted)

    def resume(self, run: StageRun) -> tuple[int, dict[str, Any]] | None:
        found = super().resume(run)
        self._tell()
        return found

    def export(self, run: StageRun, folder: Path, tokenizer: Tokenizer) -> None:
        tensors = self.together(models.tensors_of(self.model))
        if run.is_writer:
            with torch.device("meta"):
                bare = Transformer(self.config)
            whole = _under(self.model, bare)
            models.restore(whole, tensors)
            save(folder, whole, tokenizer)


def _parted(model: Transformer) -> dict[str, nn.Parameter]:
    """The adapter's parameters whose rows are distributed over ranks, by name."""
    parts = [(name, m) for name, m in model.named_modules() if isinstance(m, LowRank) and m.is_part]
    return {f"{name}.{leaf}": p for name, module in parts for leaf, p in module.named_parameters()}


def _under(learnt: AdaptedTransformer, whole: Transformer) -> AdaptedTransformer:
    """A whole base with another model's adapter: shares its memory, with zeros in place of partitioned parts."""
    for (_, module, _, _), (_, other, _, _) in zip(matrices(whole), matrices(learnt), strict=True):
        if isinstance(other, LoraLinear):
            recast(module, DoraLinear if isinstance(other, DoraLinear) else LoraLinear).adapter = other.adapter
        elif isinstance(other, LoraMoE):
            ours = other.gate_up_adapter, other.down_adapter
            experts = recast(module, LoraMoE)
            if ours[0].is_part:
                put_on_experts(experts, (ours[0].a.size(1), ours[1].a.size(1)), ours[0].scale)
            else:
                experts.gate_up_adapter, experts.down_adapter = ours
    found = adapted(whole, learnt.lora)
    found.base, found.base_digest = learnt.base, learnt.base_digest
    return found
