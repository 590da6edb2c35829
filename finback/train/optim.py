"""Muon for matrices, AdamW for the rest; gradients in one buffer, so that ranks exchange them in one all-reduce."""

import hashlib
import math
from collections.abc import Sequence
from dataclasses import dataclass
from itertools import accumulate, pairwise
from typing import Literal

import torch
from torch import Tensor, nn

from finback.kernels.updates import AdamPart, Along, MuonPart, adamw, momentum, step_along
from finback.parallel.mesh import World, flat_gradients

MOMENTUM = 0.95
BETAS = (0.9, 0.95)  # AdamW's, in every kind of training
KEPT = "step", "exp_avg", "exp_avg_sq"  # AdamW's state of a parameter, under torch's names
STEP = "muon.step"  # in checkpoints with bf16 parameters, whose rounding depends on it
NORM_ROW = 1024  # numbers whose squares are summed in fp32
Named = Sequence[tuple[str, nn.Parameter]]  # parameters by name


@dataclass(frozen=True)
class NewtonSchulz:
    """How Muon orthogonalizes: the coefficients a, b, c of each step, and the factor of sqrt(max(rows, columns))."""

    steps: tuple[tuple[float, float, float], ...]
    scale: float


MuonForm = Literal["jordan", "v4"]
# Jordan's coefficients are fast and leave singular values in about 0.7..1.2; V4's last two steps bring them to 1 (algorithm 1)
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

    def summed(self, world: World) -> float:
        """Sums over ranks. Returns the global norm."""
        world.sum_(self.flat)
        return exact_norm(self.flat)


def seed_of(name: str, seed: int) -> int:
    """The seed of a parameter's rounding: 56 bits."""
    return int.from_bytes(hashlib.blake2b(f"{seed} {name}".encode(), digest_size=7).digest(), "big")


def clip_scale(norm: float, max_norm: float) -> float:
    """The factor of gradients with this global norm in an update, so that their norm becomes at most `max_norm`."""
    return max_norm / norm if math.isfinite(norm) and norm > max_norm else 1.0


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


@dataclass(frozen=True)
class MatrixGroup:
    """Parameters whose matrices have the same shape and are numbered consecutively."""

    # indices of the parameters, and the numbers of the matrices of each
    members: list[tuple[int, range]]
    # the number of matrices, and those that this rank orthogonalizes
    count: int
    mine: range

    @classmethod
    def of(cls, indices: list[int], named: Named, world: World) -> "MatrixGroup":
        """The group of some parameters, shared among ranks."""
        ends = list(accumulate((math.prod(named[i][1].shape[:-2]) for i in indices), initial=0))
        share = math.ceil(ends[-1] / world.size)
        first, last = (min(rank * share, ends[-1]) for rank in (world.rank, world.rank + 1))
        return cls(
            [(i, range(*ends)) for i, ends in zip(indices, pairwise(ends), strict=True)], ends[-1], range(first, last)
        )


class Muon:
    """Momentum, then the nearest orthogonal matrix (Jordan 2024; update RMS matched to AdamW's, arXiv 2502.16982).

    torch.optim.Muon takes single matrices; here matrices of the same shape, expert stacks included, go through Newton-Schulz
    as one batch. Ranks share that work: each orthogonalizes its part, and a sum over ranks combines the parts.
    `compute` is the dtype of Newton-Schulz, whose result need only be roughly orthogonal: bf16 where that is fast.
    `seed`: for rounding bf16 parameters.
    """

    momentum = MOMENTUM

    def __init__(
        self,
        named: Named,
        world: World,
        weight_decay: float = 0.05,
        compute: torch.dtype = torch.float32,
        form: MuonForm = "jordan",
        seed: int = 0,
    ) -> None:
        self.named, self.world, self.weight_decay, self.compute = named, world, weight_decay, compute
        self.form, self.seed, self.steps = MUON_FORMS[form], seed, 0
        self.buffers = {name: torch.zeros_like(p, dtype=torch.float32) for name, p in named}
        shapes: dict[tuple[int, ...], list[int]] = {}
        for index, (_, p) in enumerate(named):
            shapes.setdefault(tuple(p.shape[-2:]), []).append(index)
        self.groups = [MatrixGroup.of(indices, named, world) for indices in shapes.values()]

    @torch.no_grad()
    def step(self, lr: float, scale: float = 1.0) -> None:
        """Updates all matrices from their gradients, which are multiplied by `scale`."""
        if not self.named:
            return
        self.steps += 1
        stacks, parts = [], list[MuonPart]()
        for group in self.groups:
            like = self.named[group.members[0][0]][1]
            stack = like.new_empty(len(group.mine), *like.shape[-2:], dtype=self.compute)
            for index, numbers in group.members:
                parts += self._parts(index, numbers, group.mine, stack)
            stacks.append(stack)
        momentum(parts, self.momentum, scale)
        updates = self._whole(
            [newton_schulz(stack, self.form).float() if len(stack) else stack.float() for stack in stacks]
        )
        along = []
        for group, update in zip(self.groups, updates, strict=True):
            factor = self.form.scale * math.sqrt(max(update.shape[-2:]))
            for index, numbers in group.members:
                name, p = self.named[index]
                direction = update[numbers.start : numbers.stop].view_as(p)
                along.append(Along(p.detach(), direction, factor, seed_of(name, self.seed) + self.steps))
        step_along(along, lr, self.weight_decay)

    def _parts(self, index: int, numbers: range, mine: range, stack: Tensor) -> list[MuonPart]:
        """A parameter's matrices, split at the ends of this rank's share, whose directions go to `stack`."""
        name, p = self.named[index]
        assert p.grad is not None, f"{name} has no gradient"
        gradient, buffer = (t.view(-1, *p.shape[-2:]) for t in (p.grad, self.buffers[name]))
        low, high = (min(max(end, numbers.start), numbers.stop) for end in (mine.start, mine.stop))
        found = []
        for first, last in pairwise((numbers.start, low, high, numbers.stop)):
            if first < last:
                rows = slice(first - numbers.start, last - numbers.start)
                out = stack[first - mine.start : last - mine.start] if low <= first < high else None
                found.append(MuonPart(gradient[rows], buffer[rows], out))
        return found

    def _whole(self, shares: list[Tensor]) -> list[Tensor]:
        """This rank's share of each group's updates (n, a, b) -> all of them; one all-reduce for all groups."""
        if self.world.size == 1:
            return shares
        sizes = [group.count * math.prod(share.shape[1:]) for group, share in zip(self.groups, shares, strict=True)]
        flat = torch.zeros(sum(sizes), device=shares[0].device)
        wholes = [part.view(-1, *share.shape[1:]) for part, share in zip(flat.split(sizes), shares, strict=True)]
        for group, share, whole in zip(self.groups, shares, wholes, strict=True):
            whole[group.mine.start : group.mine.stop] = share
        self.world.sum_(flat)
        return wholes

    def state(self) -> dict[str, Tensor]:
        """Tensors for a checkpoint."""
        found = {f"muon.{name}": t for name, t in self.buffers.items()}
        rounds = any(p.dtype == torch.bfloat16 for _, p in self.named)
        return found | ({STEP: torch.tensor(float(self.steps))} if rounds else {})

    def load_state(self, tensors: dict[str, Tensor]) -> None:
        """Restores the momentum from a checkpoint."""
        for name, buffer in self.buffers.items():
            buffer.copy_(tensors[f"muon.{name}"])
        self.steps = int(tensors.get(STEP, torch.zeros(())))


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
    """AdamW with a state that is saved under parameter names. `seed`: for rounding bf16 parameters."""

    def __init__(self, named: Named, betas: tuple[float, float], weight_decay: float, seed: int = 0) -> None:
        self.named, self.betas, self.weight_decay = named, betas, weight_decay
        self.seeds = {name: seed_of(name, seed) for name, _ in named}
        # of each parameter: steps taken, and both moments; from the first step on
        self.moments: dict[str, tuple[Tensor, Tensor, Tensor]] = {}

    def share(self, tensor: Tensor) -> Tensor:
        """The part of a parameter, or of its gradient, that this rank updates."""
        return tensor.detach()

    def begin(self) -> None:
        """Creates the state of parameters that have none yet."""
        for name, p in self.named:
            if name not in self.moments:
                mine = self.share(p)
                first, second = (torch.zeros_like(mine, dtype=torch.float32) for _ in range(2))
                self.moments[name] = torch.zeros((), device=p.device), first, second

    @torch.no_grad()
    def step(self, lr: float, scale: float = 1.0) -> None:
        """Updates all parameters from their gradients, which are multiplied by `scale`."""
        self.begin()
        parts = []
        for name, p in self.named:
            if p.grad is not None:
                steps, first, second = self.moments[name]
                parts.append(AdamPart(self.share(p), self.share(p.grad), first, second, steps, self.seeds[name]))
        adamw(parts, lr, self.betas, self.weight_decay, scale)

    def state(self) -> dict[str, Tensor]:
        """Tensors for a checkpoint; empty before the first step."""
        return {
            f"adam.{name}.{key}": value
            for name, kept in self.moments.items()
            for key, value in zip(KEPT, kept, strict=True)
        }

    def load_state(self, tensors: dict[str, Tensor]) -> None:
        """Restores moments and step counts from a checkpoint."""
        for name, p in self.named:
            found = [tensors.get(f"adam.{name}.{key}") for key in KEPT]
            if all(t is not None for t in found):
                step, first, second = (t.to(p.device, copy=True) for t in found if t is not None)
                self.moments[name] = step, first, second
