"""Muon and AdamW for parameters of which a rank holds a share. Apart from optim.py: DTensor takes half a second to import."""

import math

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed.tensor import DTensor

from finback.parallel.owners import Owners
from finback.parallel.shard import like, local
from finback.train.lean_adam import LeanAdam
from finback.train.optim import MOMENTUM, Adam, Named, newton_schulz

# numbers of whole parameters that are updated at a time: it bounds what an update needs beside the state
BATCH = 1 << 27


class ShardedMuon:
    """Muon for parameters of which this rank holds a share (DTensors); momentum is held for that share alone.

    Matrices that are whole on this rank, experts as a rule, need no exchange. The others are put together on one rank
    each, orthogonalised there and handed back. A state can be loaded on ranks that share parameters otherwise.
    """

    def __init__(self, named: Named, weight_decay: float, compute: torch.dtype) -> None:
        self.named, self.weight_decay, self.compute = named, weight_decay, compute
        self.buffers = [torch.zeros_like(local(p.detach())) for _, p in named]
        groups: dict[dist.ProcessGroup, list[int]] = {}
        for index, (_, p) in enumerate(named):
            group = _cut_among(p)
            if group is not None:
                groups.setdefault(group, []).append(index)
        apart = {i for indices in groups.values() for i in indices}
        whole = [i for i in range(len(named)) if i not in apart]
        cut = [(part, group) for group, indices in groups.items() for part in self._parts(indices)]
        # what is updated at a time, and who puts the matrices together where they are cut
        self.batches: list[tuple[list[int], Owners | None]] = [
            *((indices, Owners(self._shapes(indices), group)) for indices, group in cut),
            *((indices, None) for indices in self._parts(whole)),
        ]

    def _parts(self, indices: list[int]) -> list[list[int]]:
        """In order, BATCH numbers or one parameter each, the same on all ranks of a mesh."""
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
        """Those of all matrices of these parameters, of which this rank has some rows."""
        parts = [(self.named[i][1], self.buffers[i]) for i in indices]
        return [(p.size(-2), p.size(-1)) for p, mine in parts for _ in range(len(mine) if p.ndim == 3 else 1)]

    @torch.no_grad()
    def step(self, lr: float) -> None:
        """Update this rank's share of all matrices from its share of their gradients."""
        for indices, owners in self.batches:
            directions = [self._direction(i) for i in indices]
            stacks = [direction.reshape(-1, *direction.shape[-2:]) for direction in directions]
            matrices = [matrix for stack in stacks for matrix in stack]
            updates = iter(self._updates(matrices) if owners is None else owners.apply(self._updates, matrices))
            for i, stack in zip(indices, stacks, strict=True):
                mine = local(self.named[i][1].detach())
                update = torch.stack([next(updates) for _ in stack]) if len(stack) else stack
                mine.mul_(1 - lr * self.weight_decay).add_(update.view_as(mine), alpha=-lr)

    def _direction(self, index: int) -> Tensor:
        """Nesterov momentum of this rank's share of a parameter; it moves on by the gradient."""
        name, p = self.named[index]
        assert p.grad is not None, f"{name} has no gradient"
        gradient = local(p.grad)
        buffer = self.buffers[index].mul_(MOMENTUM).add_(gradient)
        return gradient.add(buffer, alpha=MOMENTUM)

    def _updates(self, matrices: list[Tensor]) -> list[Tensor]:
        """Orthogonalised and scaled, equal shapes as one batch."""
        shapes: dict[torch.Size, list[int]] = {}
        for index, matrix in enumerate(matrices):
            shapes.setdefault(matrix.shape, []).append(index)
        updates: dict[int, Tensor] = {}
        for shape, indices in shapes.items():
            stack = torch.stack([matrices[i] for i in indices]).to(self.compute)
            made = newton_schulz(stack).float().mul_(0.2 * math.sqrt(max(shape)))
            updates.update(zip(indices, made, strict=True))
        return [updates[i] for i in range(len(matrices))]

    def state(self) -> dict[str, Tensor]:
        """What a checkpoint keeps: shares of the whole, as the parameters are."""
        return {f"muon.{n}": like(b, p) for (n, p), b in zip(self.named, self.buffers, strict=True)}


def _cut_among(parameter: Tensor) -> dist.ProcessGroup | None:
    """The ranks that hold rows of the same matrices of a parameter; None where matrices are whole."""
    if isinstance(parameter, DTensor):
        for axis, placement in enumerate(parameter.placements):
            if placement.is_shard(parameter.ndim - 2) and parameter.device_mesh.size(axis) > 1:
                return parameter.device_mesh.get_group(axis)
    return None


class ShardedAdam(Adam):
    """AdamW works number by number: of a shared parameter it is given this rank's share."""

    def __init__(self, named: Named, betas: tuple[float, float], weight_decay: float) -> None:
        super().__init__(named, betas, weight_decay)
        self.begin()

    def share(self, parameter: nn.Parameter) -> Tensor:
        """This rank's share, the parameter's own memory."""
        return local(parameter.detach()) if isinstance(parameter, DTensor) else parameter

    def step(self, lr: float) -> None:
        """Update this rank's shares from their gradients."""
        for (_, p), mine in zip(self.named, self.mine, strict=True):
            if mine is not p and p.grad is not None:
                mine.grad = local(p.grad)
        super().step(lr)
        for (_, p), mine in zip(self.named, self.mine, strict=True):
            if mine is not p:  # or it would lie here beside the next step's
                mine.grad = None

    def begin(self) -> None:
        """Make the state that the first step would make, so that a checkpoint can be loaded into it."""
        for p in self.mine:
            entry = {"exp_avg": torch.zeros_like(p), "exp_avg_sq": torch.zeros_like(p)}
            self.inner.state[p] = {"step": torch.zeros((), device=p.device), **entry}

    def state(self) -> dict[str, Tensor]:
        """Shares of the whole, as the parameters are."""
        shared = dict(self.named)
        return {
            key: like(value, shared[key.removeprefix("adam.").rpartition(".")[0]]) if value.ndim else value
            for key, value in super().state().items()
        }


class ShardedLeanAdam(LeanAdam):
    """The same of moments that are kept otherwise: as shares of the whole too, in blocks that no rank parts."""

    def share(self, tensor: Tensor) -> Tensor:
        return local(tensor.detach())

    def placed(self, kept: Tensor, parameter: Tensor) -> Tensor:
        return like(kept, parameter)
