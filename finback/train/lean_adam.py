"""AdamW with moments that need less device memory: 8 bits each, or in the host's memory. Updates a slice of rows at a time.

The 8-bit format follows Dettmers et al. (arXiv 2110.02861): a block of numbers is scaled by its largest magnitude, and the
levels between 0 and 1 are denser near 0 (dynamic tree quantization). Two differences: a block ends with its row, so ranks
that hold some of the rows have the same blocks as one rank; and a positive second moment is never rounded to 0, because a
block with gradients of very different sizes would then make unbounded steps.
"""

from abc import ABC, abstractmethod
from functools import cache
from typing import Literal

import torch
from torch import Tensor

from finback.kernels.updates import AdamPart, adamw
from finback.train.optim import BETAS, Adam, Named, seed_of

# storage of the moments: fp32 or 8 bits on the device, or fp32 in the host's memory
Moments = Literal["fp32", "int8", "host"]
BLOCK = 256  # most numbers per block
SLICE = 1 << 21  # numbers updated at a time, at least one row
SMALL = 4096  # vectors and smaller tensors stay in fp32
KINDS = "exp_avg", "exp_avg_sq"
LOW_BITS = 15  # bits of a float after its sign, its exponent and 8 bits of its mantissa


class Moment(ABC):
    """Storage of one moment of a parameter."""

    @abstractmethod
    def read(self, part: slice, device: torch.device) -> Tensor:
        """Some of its rows in fp32 on a device; may be a view."""

    @abstractmethod
    def write(self, part: slice, values: Tensor) -> None:
        """Stores rows that `read` returned, after they were updated."""

    @abstractmethod
    def state(self) -> dict[str, Tensor]:
        """Tensors for a checkpoint, by name suffix; the parameter's shape except for the row length."""


class Fp32Moment(Moment):
    """fp32 storage."""

    def __init__(self, shape: torch.Size, device: torch.device) -> None:
        self.values = torch.zeros(shape, device=device)

    def read(self, part: slice, device: torch.device) -> Tensor:
        return _rows(self.values)[part].to(device)

    def write(self, part: slice, values: Tensor) -> None:
        _rows(self.values)[part].copy_(values)

    def state(self) -> dict[str, Tensor]:
        return {"": self.values}


class Int8Moment(Moment):
    """Storage as level indices and one scale per block."""

    def __init__(self, shape: torch.Size, device: torch.device, signed: bool) -> None:
        self.signed = signed
        zero = int((levels(signed) == 0).nonzero())
        self.codes = torch.full(shape, zero, dtype=torch.uint8, device=device)
        self.scale = torch.zeros(*shape[:-1], -(-shape[-1] // BLOCK), device=device)

    def read(self, part: slice, device: torch.device) -> Tensor:
        return unpack(_rows(self.codes)[part], _rows(self.scale)[part], self.signed).to(device)

    def write(self, part: slice, values: Tensor) -> None:
        codes, scale = pack(values, self.signed)
        _rows(self.codes)[part].copy_(codes)
        _rows(self.scale)[part].copy_(scale)

    def state(self) -> dict[str, Tensor]:
        return {"": self.codes, ".scale": self.scale}


class LeanAdam:
    """AdamW with other storage of its moments; the state is saved under parameter names. `seed` as for Adam."""

    def __init__(
        self, named: Named, betas: tuple[float, float], weight_decay: float, moments: Moments, seed: int = 0
    ) -> None:
        self.named, self.betas, self.weight_decay = named, betas, weight_decay
        self.seeds = {name: seed_of(name, seed) for name, _ in named}
        # steps taken so far; a tensor, so that a checkpoint can be loaded into it
        self.steps = torch.zeros(())
        self.moments = {name: tuple(self._moment(p, kind, moments) for kind in KINDS) for name, p in named}

    def _moment(self, p: Tensor, kind: str, moments: Moments) -> Moment:
        shape = self.share(p).shape
        if moments == "int8" and p.ndim > 1 and p.numel() >= SMALL:
            return Int8Moment(shape, p.device, signed=kind == "exp_avg")
        return Fp32Moment(shape, torch.device("cpu") if moments == "host" else p.device)

    def share(self, tensor: Tensor) -> Tensor:
        """The part of a parameter, or of its gradient, that this rank updates."""
        return tensor.detach()

    def placed(self, stored: Tensor, parameter: Tensor) -> Tensor:
        """A tensor of a moment in the form that a checkpoint needs."""
        return stored

    @torch.no_grad()
    def step(self, lr: float, scale: float = 1.0) -> None:
        """Updates all parameters from their gradients, which are multiplied by `scale`."""
        for name, p in self.named:
            if p.grad is None:
                continue
            mine, moments = self.share(p), self.moments[name]
            values, gradient = _rows(mine), _rows(self.share(p.grad))
            for part in _parts(values):
                first, second = (moment.read(part, p.device) for moment in moments)
                done, before = self.steps.to(p.device, copy=True), part.start * values.size(1)
                rows = AdamPart(values[part], gradient[part], first, second, done, self.seeds[name], before)
                adamw([rows], lr, self.betas, self.weight_decay, scale)
                for moment, changed in zip(moments, (first, second), strict=True):
                    moment.write(part, changed)
            if values.data_ptr() != mine.data_ptr():
                mine.copy_(values.view_as(mine))
        self.steps += 1

    def state(self) -> dict[str, Tensor]:
        """Tensors for a checkpoint: the moments as stored."""
        found = {"adam.step": self.steps}
        for name, p in self.named:
            for kind, moment in zip(KINDS, self.moments[name], strict=True):
                stored = moment.state().items()
                found |= {f"adam.{name}.{kind}{end}": self.placed(tensor, p) for end, tensor in stored}
        return found

    def load_state(self, tensors: dict[str, Tensor]) -> None:
        """Restores moments and step count from a checkpoint."""
        for name, mine in self.state().items():
            mine.copy_(tensors[name].view(mine.shape))


def adam_of(named: Named, weight_decay: float, moments: Moments, seed: int = 0) -> Adam | LeanAdam:
    """The AdamW of fine-tuning and RL; `seed`: for rounding bf16 parameters."""
    if moments == "fp32":
        return Adam(named, BETAS, weight_decay, seed)
    return LeanAdam(named, BETAS, weight_decay, moments, seed)


def _rows(tensor: Tensor) -> Tensor:
    """A tensor's rows, as a view where possible: not for some rows of each expert."""
    return tensor.reshape(-1, tensor.size(-1))


def _parts(rows: Tensor) -> list[slice]:
    each = max(1, SLICE // rows.size(1))
    return [slice(start, start + each) for start in range(0, len(rows), each)]


@cache
def levels(signed: bool) -> Tensor:
    """The 256 levels, ascending. Each decade down to 1e-7 holds the midpoints of twice as many intervals as the one below."""
    found = [0.0, 1.0]
    for power in range(7):
        bounds = torch.linspace(0.1, 1, 2 ** (power if signed else power + 1) + 1, dtype=torch.float64)
        middles = (10.0 ** (power - 6) * (bounds[1:] + bounds[:-1]) / 2).tolist()
        found += [*middles, *(-m for m in middles)] if signed else middles
    return torch.tensor(sorted(found), dtype=torch.float32)


@cache
def _nearest(signed: bool) -> tuple[Tensor, Tensor]:
    """Two tables indexed by all but the LOW_BITS of a float: the level nearest to the lowest float with this index, and the float
    above which the next level is nearer (infinity if none is). Reference: `bucketize` of the float, which takes ten times as long."""
    known = levels(signed)
    middles = (known[1:] + known[:-1]) / 2
    bits = torch.arange(1 << 32 - LOW_BITS, dtype=torch.int32) << LOW_BITS
    ends = torch.stack([bits, bits | (1 << LOW_BITS) - 1]).view(torch.float32)
    first, last = (torch.bucketize(end, middles) for end in (ends.amin(0), ends.amax(0)))
    bounds = torch.where(last > first, middles[first.clamp(max=len(middles) - 1)], torch.inf)
    return first.to(torch.uint8), bounds


def pack(values: Tensor, signed: bool) -> tuple[Tensor, Tensor]:
    """values (..., n) -> indices of the nearest levels (..., n), and scales (..., blocks), with as few blocks as possible."""
    padded = _in_blocks(values)
    scale = padded.abs().amax(-1)
    share = padded / scale.clamp_min(torch.finfo(torch.float32).tiny)[..., None]
    first, bounds = (each.to(values.device) for each in _nearest(signed))
    bits = (share.view(torch.int32) >> LOW_BITS).bitwise_and_((1 << 32 - LOW_BITS) - 1).view(-1)
    codes = first.index_select(0, bits).add_(share.view(-1) > bounds.index_select(0, bits))
    if not signed:  # a second moment rounded to 0 would become a divisor
        codes.clamp_min_((padded > 0).to(torch.uint8).view(-1))
    return codes.view_as(padded).flatten(-2)[..., : values.size(-1)], scale


def unpack(codes: Tensor, scale: Tensor, signed: bool) -> Tensor:
    """The inverse of `pack`, in fp32."""
    padded = _in_blocks(codes)
    values = levels(signed).to(codes.device).index_select(0, padded.view(-1).int())
    return values.view_as(padded).mul_(scale[..., None]).flatten(-2)[..., : codes.size(-1)]


def _in_blocks(values: Tensor) -> Tensor:
    """(..., n) -> (..., blocks, numbers): as few blocks as possible, of equal length, padded with zeros."""
    length = values.size(-1)
    blocks = -(-length // BLOCK)
    short = -length % blocks
    padded = torch.nn.functional.pad(values, (0, short)) if short else values
    return padded.contiguous().unflatten(-1, (blocks, -1))
