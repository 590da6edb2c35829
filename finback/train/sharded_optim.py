"""Muon and AdamW for sharded parameters. Separate from optim.py because importing DTensor takes half a second."""

import math

import torch
import torch.distributed as dist
from torch import Tensor
from torch.distributed.tensor import DTensor

from finback.kernels.updates import Along, MuonPart, momentum, step_along
from finback.parallel.owners import Owners
from finback.parallel.shard import like, local
from finback.train.lean_adam import LeanAdam
from finback.train.optim import MOMENTUM, MUON_FORMS, Adam, MuonForm, Named, newton_schulz

# numbers of whole parameters updated at a time; bounds the temporary memory of an update
BATCH = 1 << 27


class ShardedMuon:
    """Muon for sharded parameters (DTensors); the momentum is sharded alike.

    Matrices that are whole on this rank, usually experts, need no exchange. Each other matrix is gathered on one rank,
    orthogonalized there and scattered again. A state can be loaded with a different sharding.
    """

    def __init__(self, named: Named, weight_decay: float, compute: torch.dtype, form: MuonForm = "jordan") -> None:
        self.named, self.weight_decay, self.compute, self.form = named, weight_decay, compute, MUON_FORMS[form]
        self.buffers = [torch.zeros_like(local(p.detach())) for _, p in named]
        groups: dict[dist.ProcessGroup, list[int]] = {}
        for index, (_, p) in enumerate(named):
            group = _cut_among(p)
            if group is not None:
                groups.setdefault(group, []).append(index)
        apart = {i for indices in groups.values() for i in indices}
        whole = [i for i in range(len(named)) if i not in apart]
        cut = [(part, group) for group, indices in groups.items() for part in self._parts(indices)]
        # parameters updated at a time, and for split matrices the ranks that gather them
        self.batches: list[tuple[list[int], Owners | None]] = [
            *((indices, Owners(self._shapes(indices), group)) for indices, group in cut),
            *((indices, None) for indices in self._parts(whole)),
        ]

    def _parts(self, indices: list[int]) -> list[list[int]]:
        """Groups of indices in order, of BATCH numbers or one parameter each, the same on all ranks of a mesh."""
        parts: list[list[int]] = []
        filled = BATCH
        for index in indices:
            count = self.named[index][1].numel()
            if filled + count > BATCH:
                parts.append([])
                filled = 0
            parts[-1].append(index)
            filled += count
        return parts

    def _shapes(self, indices: list[int]) -> list[tuple[int, int]]:
        """Shapes of all matrices of these parameters that have rows on this rank."""
        parts = [(self.named[i][1], self.buffers[i]) for i in indices]
        return [(p.size(-2), p.size(-1)) for p, mine in parts for _ in range(len(mine) if p.ndim == 3 else 1)]

    @torch.no_grad()
    def step(self, lr: float, scale: float = 1.0) -> None:
        """Updates this rank's shard of all matrices from its shard of their gradients, multiplied by `scale`."""
        for indices, owners in self.batches:
            directions = self._directions(indices, scale)
            stacks = [direction.reshape(-1, *direction.shape[-2:]) for direction in directions]
            matrices = [matrix for stack in stacks for matrix in stack]
            updates = iter(self._updates(matrices) if owners is None else owners.apply(self._updates, matrices))
            along = []
            for i, stack in zip(indices, stacks, strict=True):
                mine = local(self.named[i][1].detach())
                update = torch.stack([next(updates) for _ in stack]) if len(stack) else stack
                along.append(Along(mine, update.view_as(mine), 1.0))
            step_along(along, lr, self.weight_decay)

    def _directions(self, indices: list[int], scale: float) -> list[Tensor]:
        """Nesterov momentum of this rank's shards of some parameters; also advances the momentum by the gradients."""
        parts, directions = [], []
        for index in indices:
            name, p = self.named[index]
            assert p.grad is not None, f"{name} has no gradient"
            gradient = local(p.grad)
            directions.append(torch.empty_like(gradient, memory_format=torch.contiguous_format))
            parts.append(MuonPart(gradient, self.buffers[index], directions[-1]))
        momentum(parts, MOMENTUM, scale)
        return directions

    def _updates(self, matrices: list[Tensor]) -> list[Tensor]:
        """Orthogonalized and scaled updates; equal shapes are computed as one batch."""
        shapes: dict[torch.Size, list[int]] = {}
        for index, matrix in enumerate(matrices):
            shapes.setdefault(matrix.shape, []).append(index)
        updates: dict[int, Tensor] = {}
        for shape, indices in shapes.items():
            stack = torch.stack([matrices[i] for i in indices]).to(self.compute)
            made = newton_schulz(stack, self.form).float().mul_(self.form.scale * math.sqrt(max(shape)))
            updates.update(zip(indices, made, strict=True))
        return [updates[i] for i in range(len(matrices))]

    def state(self) -> dict[str, Tensor]:
        """Tensors for a checkpoint, sharded like the parameters."""
        return {f"muon.{n}": like(b, p) for (n, p), b in zip(self.named, self.buffers, strict=True)}


def _cut_among(parameter: Tensor) -> dist.ProcessGroup | None:
    """The ranks that hold rows of the same matrices of a parameter; None if matrices are whole."""
    if isinstance(parameter, DTensor):
        for axis, placement in enumerate(parameter.placements):
            if placement.is_shard(parameter.ndim - 2) and parameter.device_mesh.size(axis) > 1:
                return parameter.device_mesh.get_group(axis)
    return None


class ShardedAdam(Adam):
    """AdamW is elementwise, so it updates this rank's shard of each parameter. A checkpoint is loaded into its state in place."""

    def __init__(self, named: Named, betas: tuple[float, float], weight_decay: float) -> None:
        super().__init__(named, betas, weight_decay)
        self.begin()

    def share(self, tensor: Tensor) -> Tensor:
        return local(tensor.detach())

    def state(self) -> dict[str, Tensor]:
        """Tensors for a checkpoint, sharded like the parameters."""
        shared = dict(self.named)
        return {
            key: like(value, shared[key.removeprefix("adam.").rpartition(".")[0]]) if value.ndim else value
            for key, value in super().state().items()
        }


class ShardedLeanAdam(LeanAdam):
    """LeanAdam for sharded parameters; blocks never span ranks."""

    def share(self, tensor: Tensor) -> Tensor:
        return local(tensor.detach())

    def placed(self, stored: Tensor, parameter: Tensor) -> Tensor:
        return like(stored, parameter)
