"""Formats of frozen weights: each quantizes matrices (..., rows, columns) to values and factors, and dequantizes them.

fp8   E4M3, a factor per block of 128 x 128 (kernels/fp8.py)
int8  integers -127..127, a factor per row
int4  integers 0..15, two in a byte; groups of a row's numbers share a factor and a zero point
mxfp4 two E2M1 numbers in a byte, the first in the low half; per 32 numbers of a row a power of two, stored as an E8M0 byte
      (OCP MX 1.0; experts of DeepSeek-V4 and gpt-oss)
nf4   two numbers in a byte, each one of 16 levels at the quantiles of a normal distribution; a factor per 64 numbers of a
      row (QLoRA, arXiv 2305.14314; the bytes equal those of bitsandbytes if rows consist of whole blocks)
"""

from collections.abc import Callable
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor

from finback.kernels import fp8

NF4_BLOCK = 64
MXFP4_BLOCK = 32
E2M1 = (0.0, 0.5, 1.0, 1.5, 2.0, 3.0, 4.0, 6.0)
INT4_GROUP = 128
NF4_LEVELS = (
    *(-1.0, -0.6961928009986877, -0.5250730514526367, -0.39491748809814453, -0.28444138169288635, -0.18477343022823334),
    *(-0.09105003625154495, 0.0, 0.07958029955625534, 0.16093020141124725, 0.24611230194568634, 0.33791524171829224),
    *(0.44070982933044434, 0.5626170039176941, 0.7229568362236023, 1.0),
)


@dataclass(frozen=True)
class Format:
    """A format's name and its two directions."""

    name: str
    # weight (..., rows, columns) -> values and factors, both with the weight's leading dimensions and its rows or row blocks
    quantize: Callable[[Tensor], tuple[Tensor, Tensor]]
    # values, factors and a dtype -> the weight
    dequantize: Callable[[Tensor, Tensor, torch.dtype], Tensor]


def int8(weight: Tensor) -> tuple[Tensor, Tensor]:
    """weight (..., rows, columns) -> int8 values of that shape and factors (..., rows, 1), fp32: largest magnitude / 127."""
    fp32 = weight.float()
    scale = fp32.abs().amax(dim=-1, keepdim=True).clamp(min=1e-12) / 127
    return (fp32 / scale).round_().to(torch.int8), scale


def from_int8(values: Tensor, scale: Tensor, dtype: torch.dtype) -> Tensor:
    """Dequantizes what `int8` returns."""
    return values.float().mul_(scale).to(dtype)


def int4(weight: Tensor) -> tuple[Tensor, Tensor]:
    """weight (..., rows, columns) -> bytes (..., rows, columns / 2), the first number in the high half of each, and factors
    (..., rows, groups, 2), fp32: step and zero point per INT4_GROUP numbers, or per row if INT4_GROUP does not divide it."""
    group = INT4_GROUP if weight.size(-1) % INT4_GROUP == 0 else weight.size(-1)
    fp32 = weight.float().unflatten(-1, (-1, group))
    low, high = fp32.amin(-1).clamp(max=0), fp32.amax(-1).clamp(min=0)
    step = ((high - low) / 15).clamp(min=1e-12)
    zero = (-low / step).round()
    q = ((fp32 / step[..., None]).round_() + zero[..., None]).clamp_(0, 15).to(torch.uint8).flatten(-2)
    return q[..., ::2] << 4 | q[..., 1::2], torch.stack([step, zero], dim=-1)


def from_int4(values: Tensor, scale: Tensor, dtype: torch.dtype) -> Tensor:
    """Dequantizes what `int4` returns, for any group size."""
    q = torch.stack([values >> 4, values & 15], dim=-1).flatten(-2).float().unflatten(-1, (scale.size(-2), -1))
    return q.sub_(scale[..., 1:]).mul_(scale[..., :1]).flatten(-2).to(dtype)


def nf4(weight: Tensor) -> tuple[Tensor, Tensor]:
    """weight (..., rows, columns) -> bytes (..., rows, columns / 2), the first number in the high half of each, and factors
    (..., rows, ⌈columns / 64⌉), fp32: a block's largest magnitude. `columns` must be even."""
    columns = weight.size(-1)
    assert columns % 2 == 0, "two numbers share a byte"
    fp32 = F.pad(weight.float(), (0, -columns % NF4_BLOCK)).unflatten(-1, (-1, NF4_BLOCK))
    scale = fp32.abs().amax(dim=-1)
    levels = torch.tensor(NF4_LEVELS, device=weight.device)
    unit = (fp32 / scale.clamp(min=1e-30)[..., None]).flatten(-2)[..., :columns].contiguous()
    # the nearest level; the midpoints between levels are the boundaries
    codes = torch.bucketize(unit, (levels[1:] + levels[:-1]) / 2).to(torch.uint8)
    return codes[..., ::2] << 4 | codes[..., 1::2], scale


def from_nf4(values: Tensor, scale: Tensor, dtype: torch.dtype) -> Tensor:
    """Dequantizes what `nf4` returns."""
    levels = torch.tensor(NF4_LEVELS, device=values.device)
    pairs = torch.cartesian_prod(levels, levels)  # the two numbers of each possible byte
    flat = pairs.index_select(0, values.flatten().int())
    numbers = flat.view(*values.shape[:-1], 2 * values.size(-1))
    columns = numbers.size(-1)
    if columns % NF4_BLOCK:
        return numbers.mul_(scale.repeat_interleave(NF4_BLOCK, dim=-1)[..., :columns]).to(dtype)
    numbers.unflatten(-1, (-1, NF4_BLOCK)).mul_(scale[..., None])
    return numbers.to(dtype)


def mxfp4(weight: Tensor) -> tuple[Tensor, Tensor]:
    """weight (..., rows, columns) -> bytes (..., rows, columns / 2) and E8M0 bytes (..., rows, columns / 32).

    Quantizes as V4's release does: the factor 2^⌈log2(max(largest, 6 · 2^-126) / 6)⌉ scales a block to at most 6, and ties go
    to even codes.
    """
    assert weight.size(-1) % MXFP4_BLOCK == 0, "columns must be a multiple of 32"
    level, unit, scale = _nearest_e2m1(weight, MXFP4_BLOCK)
    codes = (level.to(torch.uint8) | unit.signbit().to(torch.uint8) << 3).flatten(-2)
    return codes[..., 1::2] << 4 | codes[..., ::2], torch.frexp(scale).exponent.add_(126).to(torch.uint8)


def round_mxfp4(x: Tensor, block: int = MXFP4_BLOCK) -> Tensor:
    """Rounds x (..., columns) to MXFP4, in x's dtype. A NaN or infinite number makes its whole block NaN or infinite.

    `block` divides the columns; files have blocks of 32. Twin: from_mxfp4(*mxfp4(x)).
    """
    level, unit, scale = _nearest_e2m1(x, block)
    levels = torch.tensor(E2M1, device=x.device)
    return torch.copysign(levels[level], unit).mul_(scale[..., None]).flatten(-2).to(x.dtype)


def _nearest_e2m1(x: Tensor, block: int) -> tuple[Tensor, Tensor, Tensor]:
    """x (..., columns) -> the index in E2M1 of each number's magnitude and the number in units of its factor, both (...,
    blocks, block), and the factors (..., blocks)."""
    fp32 = x.float().unflatten(-1, (-1, block))
    scale = fp8.rounded_up(fp32.abs().amax(dim=-1).clamp(min=6 * 2.0**-126) / 6)
    levels = torch.tensor(E2M1, device=x.device)
    middles = (levels[1:] + levels[:-1]) / 2
    middles[1::2] = torch.nextafter(middles[1::2], torch.zeros(()))  # ties above odd codes go up
    unit = fp32 / scale[..., None]
    return torch.bucketize(unit.abs(), middles), unit, scale


def from_mxfp4(values: Tensor, scale: Tensor, dtype: torch.dtype) -> Tensor:
    """Dequantizes what `mxfp4` returns; products with a power of two are exact."""
    numbers = e2m1(values).unflatten(-1, (-1, MXFP4_BLOCK))
    return numbers.mul_(powers_of_two(scale)[..., None]).flatten(-2).to(dtype)


def e2m1(values: Tensor) -> Tensor:
    """Bytes (..., n) of two E2M1 numbers each, the low half first -> (..., 2 n) in fp32."""
    levels = torch.tensor((*E2M1, *(-level for level in E2M1)), device=values.device)
    return levels[torch.stack([values & 15, values >> 4], dim=-1).flatten(-2).int()]


def powers_of_two(bytes_: Tensor) -> Tensor:
    """E8M0 bytes -> 2^(byte - 127) in fp32; 255 is NaN."""
    return bytes_.view(torch.float8_e8m0fnu).float()


FP8 = Format("fp8", fp8.quantize, fp8.dequantize)
INT8 = Format("int8", int8, from_int8)
INT4 = Format("int4", int4, from_int4)
MXFP4 = Format("mxfp4", mxfp4, from_mxfp4)
NF4 = Format("nf4", nf4, from_nf4)
FORMATS = {form.name: form for form in (FP8, INT8, NF4)}
