"""DeepSeek's FP8 numbers: E4M3 values with one fp32 factor per block (V3 3.3, weight file README).

Weights have blocks of 128 x 128, activations and gradients tiles of 1 x 128. Blocks at the edges are cut off, not
padded: a short one has its factor from the numbers that it holds. Works on stacks of matrices as well.

A number that is not finite spoils its block, all of it: training must see it, not a saturated 448.
"""

import torch
import torch.nn.functional as F
from torch import Tensor

BLOCK = 128
LARGEST = 448.0  # of float8_e4m3fn
# A tile's largest magnitude counts as at least this. DeepSeek's inference code has 1e-4 here, which a gradient of a mean
# over thousands of tokens does not reach.
SMALLEST = 1e-30


def blocks(size: int) -> int:
    """How many blocks cover `size` rows or columns."""
    return -(-size // BLOCK)


def quantize(weight: Tensor, power_of_two: bool = False) -> tuple[Tensor, Tensor]:
    """weight (..., rows, columns) -> E4M3 values of that shape and factors (..., ⌈rows/128⌉, ⌈columns/128⌉), fp32.

    The factor is a block's largest magnitude / 448, so nothing overflows. It is what multiplies the values back. With
    `power_of_two` it is rounded up to one, and a block's largest magnitude counts as 1e-4 at least: V4's files.
    """
    rows, columns = weight.shape[-2:]
    fp32 = weight.float()
    padded = F.pad(fp32, (0, -columns % BLOCK, 0, -rows % BLOCK))
    scale = _tiles(padded).abs().amax(dim=(-3, -1)).clamp(min=1e-4 if power_of_two else 1e-12) / LARGEST
    scale = rounded_up(scale) if power_of_two else scale
    return (fp32 / expand_blocks(scale, rows, columns)).to(torch.float8_e4m3fn), scale


def quantize_tiles(x: Tensor, power_of_two: bool = False) -> tuple[Tensor, Tensor]:
    """x (..., n) -> E4M3 values of that shape and factors (..., ⌈n/128⌉), fp32: tiles of 1 x 128 along the last dimension.

    With `power_of_two` the factors are rounded up to powers of two, so that they cost no digits however often a tensor
    is quantized (V3 3.3.3; scale_fmt "ue8m0").
    """
    n = x.size(-1)
    fp32 = x.float()
    largest = F.pad(fp32, (0, -n % BLOCK)).unflatten(-1, (-1, BLOCK)).abs().amax(dim=-1)
    scale = factors(largest, LARGEST, power_of_two)
    return e4m3(fp32 / expand_tiles(scale, n)), scale


def dequantize_tiles(values: Tensor, scale: Tensor) -> Tensor:
    """Values (..., n) ⊙ factors (..., ⌈n/128⌉) in fp32."""
    return to_fp32(values).mul_(expand_tiles(scale, values.size(-1)))


def expand_tiles(scale: Tensor, n: int) -> Tensor:
    """A factor per tile -> the same factor at each of its elements, (..., n)."""
    return scale.repeat_interleave(BLOCK, dim=-1)[..., :n]


def factors(largest: Tensor, top: float, power_of_two: bool) -> Tensor:
    """What brings tiles with these largest magnitudes to at most `top`."""
    scale = largest.clamp(min=SMALLEST) / top
    return rounded_up(scale) if power_of_two else scale


def rounded_up(scale: Tensor) -> Tensor:
    """The least power of two that is no smaller, of positive fp32 numbers; what is not finite stays."""
    mantissa, exponent = torch.frexp(scale)  # scale = mantissa · 2^exponent, 1/2 <= mantissa < 1
    power = exponent - (mantissa == 0.5).int()
    rounded = (power + 127 << 23).view(torch.float32)  # by its bits: a device's pow need not be exact
    return torch.where(scale.isfinite(), rounded, scale)


def e4m3(x: Tensor) -> Tensor:
    """To the nearest E4M3 number, ties to even; what is too large becomes ±448. NaN stays NaN."""
    return x.clamp(-LARGEST, LARGEST).to(torch.float8_e4m3fn)


def dequantize(values: Tensor, scale: Tensor, dtype: torch.dtype, out: Tensor | None = None) -> Tensor:
    """values ⊙ factors in `dtype`, into `out` if given; shapes as `quantize` returns them. The product is fp32's."""
    rows, columns = values.shape[-2:]
    fp32 = to_fp32(values)
    if rows % BLOCK or columns % BLOCK:
        fp32.mul_(expand_blocks(scale, rows, columns))
    else:  # whole blocks: no factor need be repeated
        _tiles(fp32).mul_(scale[..., :, None, :, None])
    return fp32.to(dtype) if out is None else out.copy_(fp32)


def to_fp32(values: Tensor) -> Tensor:
    """E4M3 -> a new fp32 tensor, exactly; on a CPU by shifting bits, some 15 times faster than torch's conversion.

    Sign, exponent and mantissa are moved to where bf16 has them, which makes each number 2^-120 of its value. The two
    patterns that are not numbers would become ±480, so they are looked for. Twin: values.float().
    """
    if values.device.type != "cpu":
        return values.float()
    bits = values.view(torch.int8)
    moved = bits.to(torch.int16).bitwise_left_shift_(4).bitwise_and_(0x87F0 - 0x10000)
    fp32 = moved.view(torch.bfloat16).float().mul_(2.0**120)
    magnitude = bits.bitwise_and(0x7F)
    if magnitude.numel() and magnitude.max() == 0x7F:
        fp32.masked_fill_(magnitude == 0x7F, torch.nan)
    return fp32


def _tiles(matrix: Tensor) -> Tensor:
    """A view (..., rows, columns) -> (..., rows / 128, 128, columns / 128, 128)."""
    return matrix.unflatten(-1, (-1, BLOCK)).unflatten(-3, (-1, BLOCK))


def expand_blocks(scale: Tensor, rows: int, columns: int) -> Tensor:
    """A factor per block -> the same factor at each of its elements, (..., rows, columns)."""
    expanded = scale.repeat_interleave(BLOCK, dim=-1)[..., :columns]
    return expanded.repeat_interleave(BLOCK, dim=-2)[..., :rows, :]
