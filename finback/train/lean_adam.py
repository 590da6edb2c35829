"""AdamW whose moments take less of the device: in eight bits each, or in the host's memory. Some rows are taken up at a time.

Eight bits as Dettmers et al. have them (arXiv 2110.02861): blocks of numbers share the largest magnitude as their factor, and
levels between 0 and 1 lie the closer the smaller they are (dynamic tree quantization). Other than there a block ends with its
row, so that ranks that have some of the rows have one rank's blocks, and a second moment is never rounded to 0: gradients
whose sizes in a block are far apart would make steps without bounds.
"""

from abc import ABC, abstractmethod
from functools import cache
from typing import Any, Literal

import torch
from torch import Tensor
from torch.optim.adamw import adamw

from finback.train.optim import BETAS, Adam, Named

# where and how the moments lie: on the device in fp32 or in eight bits, or in fp32 in the host's memory
Moments = Literal["fp32", "int8", "host"]
BLOCK = 256  # numbers of a block at most
SLICE = 1 << 21  # numbers that are updated at a time, one row at least
SMALL = 4096  # vectors, and tensors of fewer numbers, stay in fp32
KINDS = "exp_avg", "exp_avg_sq"
LOW_BITS = 15  # of a float, those behind its sign, its exponent and 8 bits of its fraction


class Kept(ABC):
    """One moment of a parameter."""

    @abstractmethod
    def read(self, part: slice, device: torch.device) -> Tensor:
        """Some of its rows in fp32 on a device; perhaps its very memory."""

    @abstractmethod
    def write(self, part: slice, values: Tensor) -> None:
        """Put back what `read` gave, changed."""

    @abstractmethod
    def state(self) -> dict[str, Tensor]:
        """What a checkpoint keeps, by the end of its name; in the parameter's shape but for the length of rows."""


class Exact(Kept):
    """In fp32."""

    def __init__(self, shape: torch.Size, device: torch.device) -> None:
        self.values = torch.zeros(shape, device=device)

    def read(self, part: slice, device: torch.device) -> Tensor:
        return _rows(self.values)[part].to(device)

    def write(self, part: slice, values: Tensor) -> None:
        _rows(self.values)[part].copy_(values)

    def state(self) -> dict[str, Tensor]:
        return {"": self.values}


class EightBits(Kept):
    """As the numbers of levels, and a factor for each block."""

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
    """AdamW as torch has it, of moments that are kept otherwise; a state is saved under parameter names."""

    def __init__(self, named: Named, betas: tuple[float, float], weight_decay: float, moments: Moments) -> None:
        self.named, self.betas, self.weight_decay = named, betas, weight_decay
        # taken so far; a tensor, into which a checkpoint can be read
        self.steps = torch.zeros(())
        self.kept = {name: tuple(self._kept(p, kind, moments) for kind in KINDS) for name, p in named}

    def _kept(self, p: Tensor, kind: str, moments: Moments) -> Kept:
        shape = self.share(p).shape
        if moments == "int8" and p.ndim > 1 and p.numel() >= SMALL:
            return EightBits(shape, p.device, signed=kind == "exp_avg")
        return Exact(shape, torch.device("cpu") if moments == "host" else p.device)

    def share(self, tensor: Tensor) -> Tensor:
        """What of a parameter, or of its gradient, is updated here."""
        return tensor.detach()

    def placed(self, kept: Tensor, parameter: Tensor) -> Tensor:
        """What is kept of a parameter's moment, as a checkpoint takes it."""
        return kept

    @torch.no_grad()
    def step(self, lr: float) -> None:
        """Update all parameters from their gradients."""
        settings: dict[str, Any] = {
            **{"lr": lr, "beta1": self.betas[0], "beta2": self.betas[1], "weight_decay": self.weight_decay},
            **{"eps": 1e-8, "amsgrad": False, "maximize": False, "fused": True},
        }
        for name, p in self.named:
            if p.grad is None:
                continue
            values, gradient, kept = _rows(self.share(p)), _rows(self.share(p.grad)), self.kept[name]
            for part in _parts(values):
                moments = [moment.read(part, p.device) for moment in kept]
                done = self.steps.to(p.device, copy=True)
                first, second = ([moment] for moment in moments)
                adamw([values[part]], [gradient[part]], first, second, [], [done], **settings)
                for moment, changed in zip(kept, moments, strict=True):
                    moment.write(part, changed)
        self.steps += 1

    def state(self) -> dict[str, Tensor]:
        """What a checkpoint keeps: moments as they lie."""
        found = {"adam.step": self.steps}
        for name, p in self.named:
            for kind, moment in zip(KINDS, self.kept[name], strict=True):
                kept = moment.state().items()
                found |= {f"adam.{name}.{kind}{end}": self.placed(tensor, p) for end, tensor in kept}
        return found

    def load_state(self, tensors: dict[str, Tensor]) -> None:
        """Take moments and steps back from a checkpoint."""
        for name, mine in self.state().items():
            mine.copy_(tensors[name].view(mine.shape))


def adam_of(named: Named, weight_decay: float, moments: Moments) -> Adam | LeanAdam:
    """AdamW of fine-tuning and RL."""
    if moments == "fp32":
        return Adam(named, BETAS, weight_decay)
    return LeanAdam(named, BETAS, weight_decay, moments)


def _rows(tensor: Tensor) -> Tensor:
    """A tensor as one of two dimensions, the same memory."""
    return tensor.view(-1, tensor.size(-1))


def _parts(rows: Tensor) -> list[slice]:
    each = max(1, SLICE // rows.size(1))
    return [slice(start, start + each) for start in range(0, len(rows), each)]


@cache
def levels(signed: bool) -> Tensor:
    """The 256 levels, ascending: of each power of ten down to 1e-7 the middles of twice as many intervals as of the one below."""
    found = [0.0, 1.0]
    for power in range(7):
        bounds = torch.linspace(0.1, 1, 2 ** (power if signed else power + 1) + 1, dtype=torch.float64)
        middles = (10.0 ** (power - 6) * (bounds[1:] + bounds[:-1]) / 2).tolist()
        found += [*middles, *(-m for m in middles)] if signed else middles
    return torch.tensor(sorted(found), dtype=torch.float32)


@cache
def _nearest(signed: bool) -> tuple[Tensor, Tensor]:
    """By all bits of a float but LOW_BITS: the number of the level that is nearest to the lowest of these floats, and above which
    of them it is the next level, infinity where it is not. Twin: `bucketize` of the float itself, which takes ten times as long."""
    known = levels(signed)
    middles = (known[1:] + known[:-1]) / 2
    bits = torch.arange(1 << 32 - LOW_BITS, dtype=torch.int32) << LOW_BITS
    ends = torch.stack([bits, bits | (1 << LOW_BITS) - 1]).view(torch.float32)
    first, last = (torch.bucketize(end, middles) for end in (ends.amin(0), ends.amax(0)))
    bounds = torch.where(last > first, middles[first.clamp(max=len(middles) - 1)], torch.inf)
    return first.to(torch.uint8), bounds


def pack(values: Tensor, signed: bool) -> tuple[Tensor, Tensor]:
    """values (..., n) -> the nearest levels' numbers (..., n), and factors (..., blocks), of as few blocks as n allows."""
    padded = _in_blocks(values)
    scale = padded.abs().amax(-1)
    share = padded / scale.clamp_min(torch.finfo(torch.float32).tiny)[..., None]
    first, bounds = (each.to(values.device) for each in _nearest(signed))
    bits = (share.view(torch.int32) >> LOW_BITS).bitwise_and_((1 << 32 - LOW_BITS) - 1).view(-1)
    codes = first.index_select(0, bits).add_(share.view(-1) > bounds.index_select(0, bits))
    if not signed:  # a second moment that were rounded to nothing would be divided by
        codes.clamp_min_((padded > 0).to(torch.uint8).view(-1))
    return codes.view_as(padded).flatten(-2)[..., : values.size(-1)], scale


def unpack(codes: Tensor, scale: Tensor, signed: bool) -> Tensor:
    """The numbers that are packed so, in fp32."""
    padded = _in_blocks(codes)
    values = levels(signed).to(codes.device).index_select(0, padded.view(-1).int())
    return values.view_as(padded).mul_(scale[..., None]).flatten(-2)[..., : codes.size(-1)]


def _in_blocks(values: Tensor) -> Tensor:
    """(..., n) -> (..., blocks, numbers), as few blocks as can be, of equal lengths; filled up with zeros."""
    length = values.size(-1)
    blocks = -(-length // BLOCK)
    short = -length % blocks
    padded = torch.nn.functional.pad(values, (0, short)) if short else values
    return padded.contiguous().unflatten(-1, (blocks, -1))
