"""DeepSeek's FP8 numbers: E4M3 values with one fp32 factor per block (V3 3.3, weight file README).

Weights have blocks of 128 x 128, activations and gradients tiles of 1 x 128. Blocks at the edges are smaller, not
padded. All functions also take stacks of matrices.

A NaN or infinite number makes its whole block NaN, so that training notices it instead of reading a saturated 448.
"""

import torch
import torch.nn.functional as F
from torch import Tensor

BLOCK = 128
LARGEST = 448.0  # of float8_e4m3fn
# Lower bound of a tile's largest magnitude. DeepSeek's inference code uses 1e-4, but gradients of a mean over thousands of
# tokens are smaller than that.
SMALLEST = 1e-30


def blocks(size: int) -> int:
    """The number of blocks that cover `size` rows or columns."""
    return -(-size // BLOCK)


def quantize(weight: Tensor, power_of_two: bool = False) -> tuple[Tensor, Tensor]:
    """weight (..., rows, columns) -> E4M3 values of that shape and factors (..., ⌈rows/128⌉, ⌈columns/128⌉), fp32.

    The factor is a block's largest magnitude / 448, so nothing overflows; values ⊙ factors give the weight. With
    `power_of_two`, as in V4's files, it is rounded up to a power of two and the largest magnitude counts as at least 1e-4.
    """
    rows, columns = weight.shape[-2:]
    fp32 = weight.float()
    padded = F.pad(fp32, (0, -columns % BLOCK, 0, -rows % BLOCK))
    scale = _tiles(padded).abs().amax(dim=(-3, -1)).clamp(min=1e-4 if power_of_two else 1e-12) / LARGEST
    scale = rounded_up(scale) if power_of_two else scale
    return (fp32 / expand_blocks(scale, rows, columns)).to(torch.float8_e4m3fn), scale


def quantize_tiles(x: Tensor, power_of_two: bool = False) -> tuple[Tensor, Tensor]:
    """x (..., n) -> E4M3 values of that shape and factors (..., ⌈n/128⌉), fp32: tiles of 1 x 128 along the last dimension.

    With `power_of_two` factors are rounded up to powers of two, so that quantizing a tensor again along another dimension
    only shifts exponents (V3 3.3.3; scale_fmt "ue8m0").
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
    """Repeats the factor of each tile for its elements, (..., n)."""
    return scale.repeat_interleave(BLOCK, dim=-1)[..., :n]


def factors(largest: Tensor, top: float, power_of_two: bool) -> Tensor:
    """The factors that scale tiles with these largest magnitudes to at most `top`."""
    scale = largest.clamp(min=SMALLEST) / top
    return rounded_up(scale) if power_of_two else scale


def rounded_up(scale: Tensor) -> Tensor:
    """Rounds positive fp32 numbers up to a power of two; NaN and infinity stay."""
    mantissa, exponent = torch.frexp(scale)  # scale = mantissa · 2^exponent, 1/2 <= mantissa < 1
    power = exponent - (mantissa == 0.5).int()
    rounded = (power + 127 << 23).view(torch.float32)  # builds the bits, since pow is not exact on every device
    return torch.where(scale.isfinite(), rounded, scale)


def e4m3(x: Tensor) -> Tensor:
    """Rounds to the nearest E4M3 number, ties to even; larger magnitudes become ±448, NaN stays NaN."""
    return x.clamp(-LARGEST, LARGEST).to(torch.float8_e4m3fn)


def dequantize(values: Tensor, scale: Tensor, dtype: torch.dtype, out: Tensor | None = None) -> Tensor:
    """values ⊙ factors in `dtype`, into `out` if given; shapes as `quantize` returns them. The product is taken in fp32."""
    rows, columns = values.shape[-2:]
    fp32 = to_fp32(values)
    if rows % BLOCK or columns % BLOCK:
        fp32.mul_(expand_blocks(scale, rows, columns))
    else:  # whole blocks: factors broadcast and need not be repeated
        _tiles(fp32).mul_(scale[..., :, None, :, None])
    return fp32.to(dtype) if out is None else out.copy_(fp32)


def to_fp32(values: Tensor) -> Tensor:
    """E4M3 -> a new fp32 tensor, exactly; on a CPU by shifting bits, about 15 times faster than torch's conversion.

    Sign, exponent and mantissa move to their places in bf16, which scales each number by 2^-120. The two NaN patterns
    would become ±480, so they are replaced. Twin: values.float().
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
    """Repeats the factor of each block for its elements, (..., rows, columns)."""
    expanded = scale.repeat_interleave(BLOCK, dim=-1)[..., :columns]
    return expanded.repeat_interleave(BLOCK, dim=-2)[..., :rows, :]
