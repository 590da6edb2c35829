"""Muon for matrices, AdamW for the rest; gradients in one buffer, so that ranks exchange them in one all-reduce."""

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, Literal

import torch
from torch import Tensor, nn

from finback.parallel.mesh import World, flat_gradients

MOMENTUM = 0.95
BETAS = (0.9, 0.95)  # AdamW's, in every kind of training
NORM_ROW = 1024  # numbers whose squares are summed in fp32
Named = Sequence[tuple[str, nn.Parameter]]  # parameters by name


@dataclass(frozen=True)
class NewtonSchulz:
    """How Muon orthogonalizes: the coefficients a, b, c of each step, and what sqrt(max(rows, columns)) is multiplied by."""

    steps: tuple[tuple[float, float, float], ...]
    scale: float


MuonForm = Literal["jordan", "v4"]
# Jordan's coefficients are fast and leave singular values in about 0.7..1.2; V4 (algorithm 1) brings them to 1 by two steps more
_FAST, _EXACT = (3.4445, -4.7750, 2.0315), (2.0, -1.5, 0.5)
MUON_FORMS: dict[MuonForm, NewtonSchulz] = {
    "jordan": NewtonSchulz(5 * (_FAST,), 0.2),
    "v4": NewtonSchulz(8 * (_FAST,) + 2 * (_EXACT,), 0.18),
}


class Gradients:
    """All gradients of some parameters, as views of one flat fp32 buffer."""

    def __init__(self, parameters: list[nn.Parameter]) -> None:
        self.flat = flat_gradients(parameters)

    def zero(self) -> None:
        """Sets all gradients to zero."""
        self.flat.zero_()

    def finish(self, world: World, max_norm: float) -> float:
        """Sums over ranks and clips to the global norm `max_norm`. Returns the norm before clipping."""
        norm = self.summed(world)
        if math.isfinite(norm) and norm > max_norm:
            self.flat.mul_(max_norm / norm)
        return norm

    def summed(self, world: World) -> float:
        """Sums over ranks. Returns the global norm."""
        world.sum_(self.flat)
        return exact_norm(self.flat)


def exact_norm(flat: Tensor) -> float:
    """The Euclidean norm of many numbers (n,): fp32 within rows, then fp64 over the norms of rows.

    On a CPU, torch sums the squares of a float tensor in a few fp32 accumulators: the norm of 1.4 M numbers is off by a
    relative 2e-5, that of 200 M by 3 %.
    """
    whole = len(flat) // NORM_ROW * NORM_ROW
    rows = flat[:whole].view(-1, NORM_ROW).norm(dim=1)
    return float(torch.cat([rows, flat[whole:]]).double().norm())


def is_matrix(name: str, parameter: Tensor) -> bool:
    """Whether Muon updates it: hidden matrices and expert stacks, not embeddings, head, norms, routers or position biases."""
    other = "router" in name or name.endswith("position_bias") or name in ("embed", "head.weight")
    return parameter.ndim >= 2 and not other


class Muon:
    """Momentum, then the nearest orthogonal matrix (Jordan 2024; update RMS matched to AdamW's, arXiv 2502.16982).

    torch.optim.Muon takes single matrices; here matrices of the same shape, expert stacks included, go through Newton-Schulz
    as one batch. Ranks share that work: each orthogonalizes its part, and a sum over ranks combines the parts.
    `compute` is the dtype of Newton-Schulz, whose result need only be roughly orthogonal: bf16 where that is fast.
    """

    momentum = MOMENTUM

    def __init__(
        self,
        named: Named,
        world: World,
        weight_decay: float = 0.05,
        compute: torch.dtype = torch.float32,
        form: MuonForm = "jordan",
    ) -> None:
        self.named, self.world, self.weight_decay, self.compute = named, world, weight_decay, compute
        self.form = MUON_FORMS[form]
        self.buffers = {name: torch.zeros_like(p) for name, p in named}
        shapes: dict[tuple[int, ...], list[int]] = {}
        for index, (_, p) in enumerate(named):
            shapes.setdefault(tuple(p.shape[-2:]), []).append(index)
        self.groups = list(shapes.values())

    @torch.no_grad()
    def step(self, lr: float) -> None:
        """Updates all matrices from their gradients."""
        if not self.named:
            return
        directions = [torch.cat([self._direction(*self.named[i]) for i in group]) for group in self.groups]
        for group, update in zip(self.groups, self._orthogonal(directions), strict=True):
            update.mul_(self.form.scale * math.sqrt(max(update.shape[-2:])))
            start = 0
            for i in group:
                p = self.named[i][1]
                count = p.numel() // (p.size(-1) * p.size(-2))
                p.mul_(1 - lr * self.weight_decay).add_(update[start : start + count].view_as(p), alpha=-lr)
                start += count

    def _direction(self, name: str, p: nn.Parameter) -> Tensor:
        """Nesterov momentum of one parameter, as a stack of matrices; also advances the momentum by the gradient."""
        assert p.grad is not None, f"{name} has no gradient"
        buffer = self.buffers[name].mul_(self.momentum).add_(p.grad)
        return p.grad.add(buffer, alpha=self.momentum).reshape(-1, *p.shape[-2:])

    def _orthogonal(self, stacks: list[Tensor]) -> list[Tensor]:
        """Newton-Schulz on this rank's share of each stack (n, a, b); one all-reduce gives every rank the full result."""
        sizes = [stack.numel() for stack in stacks]
        flat = torch.zeros(sum(sizes), device=stacks[0].device)
        parts = flat.split(sizes)
        wholes = [part.view_as(stack) for part, stack in zip(parts, stacks, strict=True)]
        for stack, whole in zip(stacks, wholes, strict=True):
            share = math.ceil(len(stack) / self.world.size)
            mine = slice(self.world.rank * share, (self.world.rank + 1) * share)
            if len(stack[mine]):
                whole[mine] = newton_schulz(stack[mine].to(self.compute), self.form).float()
        self.world.sum_(flat)
        return wholes

    def state(self) -> dict[str, Tensor]:
        """Tensors for a checkpoint."""
        return {f"muon.{name}": t for name, t in self.buffers.items()}

    def load_state(self, tensors: dict[str, Tensor]) -> None:
        """Restores the momentum from a checkpoint."""
        for name, buffer in self.buffers.items():
            buffer.copy_(tensors[f"muon.{name}"])


def newton_schulz(stack: Tensor, form: NewtonSchulz = MUON_FORMS["jordan"]) -> Tensor:
    """Approximately U V^T of each matrix (n, a, b): singular values driven towards 1 by an odd quintic."""
    tall = stack.size(1) > stack.size(2)
    x = stack.transpose(1, 2) if tall else stack
    x = x / (x.norm(dim=(1, 2), keepdim=True) + 1e-7)
    for a, b, c in form.steps:
        gram = torch.bmm(x, x.transpose(1, 2))
        x = torch.baddbmm(x, torch.baddbmm(gram, gram, gram, beta=b, alpha=c), x, beta=a)
    return x.transpose(1, 2) if tall else x


class Adam:
    """torch's fused AdamW with a state that is saved under parameter names."""

    def __init__(self, named: Named, betas: tuple[float, float], weight_decay: float) -> None:
        self.named = named
        self.mine = [self.share(p) for _, p in named]
        self.inner = torch.optim.AdamW(self.mine, lr=0.0, betas=betas, weight_decay=weight_decay, fused=True)

    def share(self, parameter: nn.Parameter) -> Tensor:
        """The part of a parameter that this rank updates."""
        return parameter

    def step(self, lr: float) -> None:
        """Updates all parameters from their gradients."""
        for group in self.inner.param_groups:
            group["lr"] = lr
        self.inner.step()

    def state(self) -> dict[str, Tensor]:
        """Tensors for a checkpoint; empty before the first step."""
        state = {}
        for (name, _), mine in zip(self.named, self.mine, strict=True):
            for key, value in self.inner.state.get(mine, {}).items():
                state[f"adam.{name}.{key}"] = value
        return state

    def load_state(self, tensors: dict[str, Tensor]) -> None:
        """Restores moments and step counts from a checkpoint."""
        for name, p in self.named:
            prefix = f"adam.{name}."
            entry: dict[str, Any] = {k.removeprefix(prefix): v for k, v in tensors.items() if k.startswith(prefix)}
            if entry:
                self.inner.state[p] = {k: v.to(p.device, copy=True) for k, v in entry.items()}
