"""AdamW whose moments take less of the device: in eight bits each, or in the host's memory. Numbers are taken up a slice at a time.

Eight bits as Dettmers et al. have them (arXiv 2110.02861): blocks of 256 numbers share the largest magnitude as their factor, and
levels between 0 and 1 lie the closer the smaller they are (dynamic tree quantization). Other than there a second moment is never
rounded to 0: gradients whose sizes in a block are far apart would make steps without bounds.
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
BLOCK = 256
SLICE = 1 << 21  # numbers that are updated at a time; a multiple of BLOCK
SMALL = 4096  # tensors of fewer numbers stay in fp32
KINDS = "exp_avg", "exp_avg_sq"


class Kept(ABC):
    """One moment of a parameter, flat."""

    @abstractmethod
    def read(self, part: slice, device: torch.device) -> Tensor:
        """Some of it in fp32 on a device; perhaps its very memory."""

    @abstractmethod
    def write(self, part: slice, values: Tensor) -> None:
        """Put back what `read` gave, changed."""

    @abstractmethod
    def state(self) -> dict[str, Tensor]:
        """What a checkpoint keeps, by the end of its name."""


class Exact(Kept):
    """In fp32."""

    def __init__(self, count: int, device: torch.device) -> None:
        self.values = torch.zeros(count, device=device)

    def read(self, part: slice, device: torch.device) -> Tensor:
        return self.values[part].to(device)

    def write(self, part: slice, values: Tensor) -> None:
        self.values[part].copy_(values)

    def state(self) -> dict[str, Tensor]:
        return {"": self.values}


class EightBits(Kept):
    """As the numbers of levels, and a factor for each block."""

    def __init__(self, count: int, device: torch.device, signed: bool) -> None:
        self.signed = signed
        zero = int((levels(signed) == 0).nonzero())
        self.codes = torch.full((count,), zero, dtype=torch.uint8, device=device)
        self.scale = torch.zeros(-(-count // BLOCK), device=device)

    def read(self, part: slice, device: torch.device) -> Tensor:
        return unpack(self.codes[part], self.scale[_blocks(part)], self.signed).to(device)

    def write(self, part: slice, values: Tensor) -> None:
        codes, scale = pack(values, self.signed)
        self.codes[part].copy_(codes)
        self.scale[_blocks(part)].copy_(scale)

    def state(self) -> dict[str, Tensor]:
        return {"": self.codes, ".scale": self.scale}


class LeanAdam:
    """AdamW as torch has it, of moments that are kept otherwise; a state is saved under parameter names."""

    def __init__(self, named: Named, betas: tuple[float, float], weight_decay: float, moments: Moments) -> None:
        self.named, self.betas, self.weight_decay, self.count = named, betas, weight_decay, 0
        self.kept = {name: tuple(_kept(p, kind, moments) for kind in KINDS) for name, p in named}

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
            values, gradient, kept = p.detach().view(-1), p.grad.view(-1), self.kept[name]
            for part in _parts(len(values)):
                moments = [moment.read(part, p.device) for moment in kept]
                done = torch.tensor(float(self.count), device=p.device)
                first, second = ([moment] for moment in moments)
                adamw([values[part]], [gradient[part]], first, second, [], [done], **settings)
                for moment, changed in zip(kept, moments, strict=True):
                    moment.write(part, changed)
        self.count += 1

    def state(self) -> dict[str, Tensor]:
        """What a checkpoint keeps: moments as they lie."""
        found = {"adam.step": torch.tensor(float(self.count))}
        for name, kept in self.kept.items():
            for kind, moment in zip(KINDS, kept, strict=True):
                found |= {f"adam.{name}.{kind}{end}": tensor for end, tensor in moment.state().items()}
        return found

    def load_state(self, tensors: dict[str, Tensor]) -> None:
        """Take moments and steps back from a checkpoint."""
        self.count = int(tensors["adam.step"])
        for name, kept in self.kept.items():
            for kind, moment in zip(KINDS, kept, strict=True):
                for end, mine in moment.state().items():
                    mine.copy_(tensors[f"adam.{name}.{kind}{end}"])


def adam_of(named: Named, weight_decay: float, moments: Moments) -> Adam | LeanAdam:
    """AdamW of fine-tuning and RL."""
    if moments == "fp32":
        return Adam(named, BETAS, weight_decay)
    return LeanAdam(named, BETAS, weight_decay, moments)


def _kept(p: Tensor, kind: str, moments: Moments) -> Kept:
    if moments == "int8" and p.numel() >= SMALL:
        return EightBits(p.numel(), p.device, signed=kind == "exp_avg")
    return Exact(p.numel(), torch.device("cpu") if moments == "host" else p.device)


def _parts(count: int) -> list[slice]:
    return [slice(start, min(start + SLICE, count)) for start in range(0, count, SLICE)]


def _blocks(part: slice) -> slice:
    """The blocks of a slice that begins with one."""
    return slice(part.start // BLOCK, -(-part.stop // BLOCK))


@cache
def levels(signed: bool) -> Tensor:
    """The 256 levels, ascending: of each power of ten down to 1e-7 the middles of twice as many intervals as of the one below."""
    found = [0.0, 1.0]
    for power in range(7):
        bounds = torch.linspace(0.1, 1, 2 ** (power if signed else power + 1) + 1, dtype=torch.float64)
        middles = (10.0 ** (power - 6) * (bounds[1:] + bounds[:-1]) / 2).tolist()
        found += [*middles, *(-m for m in middles)] if signed else middles
    return torch.tensor(sorted(found), dtype=torch.float32)


def pack(values: Tensor, signed: bool) -> tuple[Tensor, Tensor]:
    """Flat numbers (n,) -> the nearest levels' numbers (n,), and factors (n / 256, rounded up)."""
    padded = _in_blocks(values)
    scale, known = padded.abs().amax(1), levels(signed).to(values.device)
    share = padded / scale.clamp_min(torch.finfo(torch.float32).tiny)[:, None]
    codes = torch.bucketize(share, (known[1:] + known[:-1]) / 2, out_int32=True)
    if not signed:  # a second moment that were rounded to nothing would be divided by
        codes.clamp_min_((padded > 0).int())
    return codes.to(torch.uint8).view(-1)[: len(values)], scale


def unpack(codes: Tensor, scale: Tensor, signed: bool) -> Tensor:
    """The numbers that are packed so, in fp32."""
    values = levels(signed).to(codes.device).index_select(0, _in_blocks(codes).view(-1).int())
    return values.view(-1, BLOCK).mul_(scale[:, None]).view(-1)[: len(codes)]


def _in_blocks(values: Tensor) -> Tensor:
    """(n,) -> (blocks, 256), the last one filled up with zeros."""
    short = -len(values) % BLOCK
    return (torch.nn.functional.pad(values, (0, short)) if short else values).view(-1, BLOCK)
