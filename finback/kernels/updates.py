"""Updates of parameters: AdamW, Muon's momentum and the step along its direction, each one pass in C++ if a kernel applies.

The plain forms use torch's operations, and both forms give the same bits (tests/test_updates.py). Parameters are fp32,
or bf16 with stochastic rounding: away from zero with a probability equal to the fraction that is cut off, so that the mean
over many steps is that of fp32.
"""

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any, TypeVar

import torch
from torch import Tensor
from torch.optim.adamw import adamw as torch_adamw

from finback.kernels import native

EPS = 1e-8
WORD = (1 << 32) - 1


@dataclass(frozen=True)
class AdamPart:
    """A parameter or some rows of one, its gradient and moments in fp32, all of one shape, and the steps taken so far ()."""

    value: Tensor
    gradient: Tensor
    first: Tensor
    second: Tensor
    steps: Tensor
    # for rounding a bf16 parameter: the seed, and the index of this part's first number in the parameter
    seed: int = 0
    offset: int = 0


@dataclass(frozen=True)
class MuonPart:
    """Some matrices of a parameter: gradient and momentum in fp32, and the output for their direction, or None."""

    gradient: Tensor
    momentum: Tensor
    direction: Tensor | None


@dataclass(frozen=True)
class Along:
    """A parameter, its orthogonal direction in fp32, the factor of the direction, and a seed for rounding bf16."""

    value: Tensor
    direction: Tensor
    scale: float
    seed: int = 0


Part = TypeVar("Part", AdamPart, MuonPart, Along)


@torch.no_grad()
def adamw(
    parts: Sequence[AdamPart], lr: float, betas: tuple[float, float], weight_decay: float, scale: float = 1.0
) -> None:
    """One step of AdamW (arXiv 1711.05101) with gradients multiplied by `scale`; counts it in `steps`."""
    swift, plain = _sorted(parts, lambda p: (p.value, p.gradient, p.first, p.second))
    if swift:
        torch._foreach_add_([p.steps for p in swift], 1)
        done = torch.stack([p.steps for p in swift]).double().tolist()
        table = [
            [*_places(p.value, p.gradient, p.first, p.second), p.value.numel(), _is_bf16(p.value), p.offset, _key(p, n)]
            for p, n in zip(swift, done, strict=True)
        ]
        factors = [[math.sqrt(1 - betas[1] ** n), lr / (1 - betas[0] ** n)] for n in done]
        given = torch.tensor(table), torch.tensor(factors, dtype=torch.float64)
        native.call("adamw", *given, len(swift), scale, 1 - lr * weight_decay, *betas, EPS)
    for device in {p.value.device for p in plain}:
        _plain_adamw([p for p in plain if p.value.device == device], lr, betas, weight_decay, scale)
    _mark_changed(parts)


def _plain_adamw(
    parts: Sequence[AdamPart], lr: float, betas: tuple[float, float], weight_decay: float, scale: float
) -> None:
    gradients = [p.gradient if scale == 1 else p.gradient * scale for p in parts]
    values = [p.value.float() for p in parts]  # no copies of fp32 parameters
    moments = [p.first for p in parts], [p.second for p in parts]
    torch_adamw(
        values,
        gradients,
        *moments,
        [],
        [p.steps for p in parts],
        fused=True,
        amsgrad=False,
        maximize=False,
        lr=lr,
        beta1=betas[0],
        beta2=betas[1],
        weight_decay=weight_decay,
        eps=EPS,
    )
    for p, value in zip(parts, values, strict=True):
        if value is not p.value:
            key = _key(p, float(p.steps))
            p.value.copy_(stochastically_rounded(value, key, p.offset))


@torch.no_grad()
def momentum(parts: Sequence[MuonPart], decay: float, scale: float = 1.0) -> None:
    """Nesterov momentum b <- decay · b + g, direction g + decay · b, with g multiplied by `scale`."""
    swift, plain = _sorted(parts, lambda p: (p.direction, p.gradient, p.momentum))
    if swift:
        table = [
            [*_places(p.gradient, p.momentum, p.direction), p.gradient.numel(), _is_bf16(p.direction)] for p in swift
        ]
        native.call("momentum", torch.tensor(table), len(swift), scale, decay)
    for p in plain:
        gradient = p.gradient if scale == 1 else p.gradient * scale
        p.momentum.mul_(decay).add_(gradient)
        if p.direction is not None:
            p.direction.copy_(gradient.add(p.momentum, alpha=decay))


@torch.no_grad()
def step_along(parts: Sequence[Along], lr: float, weight_decay: float) -> None:
    """value <- (1 - lr · weight_decay) · value - lr · scale · direction."""
    decay = 1 - lr * weight_decay
    swift, plain = _sorted(parts, lambda p: (p.value, p.direction))
    if swift:
        table = [
            [*_places(p.value, p.direction), p.value.numel(), _is_bf16(p.value), _signed(mixed(p.seed))] for p in swift
        ]
        scales = torch.tensor([p.scale for p in swift], dtype=torch.float64)
        native.call("along", torch.tensor(table), scales, len(swift), decay, lr)
    for p in plain:
        if p.value.dtype == torch.float32:
            p.value.mul_(decay).add_(p.direction * p.scale, alpha=-lr)
        else:
            value = p.value.float().mul_(decay).add_(p.direction * p.scale, alpha=-lr)
            p.value.copy_(stochastically_rounded(value, mixed(p.seed)))
    _mark_changed(parts)


# ---- rounding ----------------------------------------------------------------------------------------------------------


def mixed(number: int) -> int:
    """Hashes a number to 64 bits, about half of which differ between neighbouring numbers (SplitMix64's finalizer)."""
    z = (number + 0x9E3779B97F4A7C15) & ((1 << 64) - 1)
    z = (z ^ z >> 30) * 0xBF58476D1CE4E5B9 & ((1 << 64) - 1)
    z = (z ^ z >> 27) * 0x94D049BB133111EB & ((1 << 64) - 1)
    return z ^ z >> 31


def stochastically_rounded(values: Tensor, key: int, offset: int = 0) -> Tensor:
    """Rounds fp32 values to bf16, away from zero with a probability equal to the fraction that is cut off.

    The random bits depend only on a value's index, from `offset` on, and on a key of 64 bits.
    """
    bits = values.contiguous().view(torch.int32).view(-1).long() & WORD
    x = (torch.arange(offset, offset + bits.numel(), device=bits.device) + (key & WORD)) & WORD
    for turn in range(2):
        x = (x ^ x >> 16) * 0x7FEB352D & WORD
        x = (x ^ x >> 15) * 0x846CA68B & WORD
        x = x ^ x >> 16
        if turn == 0:
            x = x ^ (key >> 32 & WORD)
    usual = (bits & 0x7F800000) != 0x7F800000
    high = (bits + usual * (x >> 16)) >> 16
    return high.to(torch.int32).to(torch.uint16).view(torch.bfloat16).view(values.shape)


def _key(part: AdamPart, steps: float) -> int:
    return _signed(mixed(part.seed + int(steps) * 0x632BE59BD9B4E019)) if _is_bf16(part.value) else 0


def _signed(key: int) -> int:
    """The same 64 bits as a signed number, for tables of int64."""
    return key - (1 << 64) if key >> 63 else key


# ---- choice of the form --------------------------------------------------------------------------------------------------


def _sorted(parts: Sequence[Part], tensors: Callable[[Part], tuple[Any, ...]]) -> tuple[list[Part], list[Part]]:
    """Splits parts into those that the C++ form takes (first tensor fp32 or bf16, others fp32), and the rest."""
    swift: list[Part] = []
    plain: list[Part] = []
    for part in parts:
        first, *others = tensors(part)
        fits = first is None or (first.is_contiguous() and native.serves(first))
        fits = fits and all(t.is_contiguous() and t.dtype == torch.float32 and native.serves(t) for t in others)
        (swift if fits else plain).append(part)
    return swift, plain


def _mark_changed(parts: Sequence[AdamPart] | Sequence[Along]) -> None:
    """Counts the change in the tensors' versions, by which engines notice new weights; kernels write by address."""
    torch.autograd.graph.increment_version([p.value for p in parts])


def _places(*tensors: Tensor | None) -> list[int]:
    return [0 if t is None else t.data_ptr() for t in tensors]


def _is_bf16(tensor: Tensor | None) -> bool:
    return tensor is not None and tensor.dtype == torch.bfloat16
