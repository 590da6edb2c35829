"""DeepSeek's FP8 weights: E4M3 values with one fp32 factor per 128 x 128 block (V3 3.3, weight file README).

Blocks at the lower and right edges are cut off, not padded. Works on stacks of matrices as well.
"""

import torch
from torch import Tensor

BLOCK = 128
LARGEST = 448.0  # of float8_e4m3fn


def blocks(size: int) -> int:
    """How many blocks cover `size` rows or columns."""
    return -(-size // BLOCK)


def quantise(weight: Tensor) -> tuple[Tensor, Tensor]:
    """weight (..., rows, columns) -> E4M3 values of that shape and factors (..., ⌈rows/128⌉, ⌈columns/128⌉), fp32.

    The factor is a block's largest magnitude / 448, so nothing overflows. It is what multiplies the values back.
    """
    rows, columns = weight.shape[-2:]
    wide = weight.float()
    padded = torch.nn.functional.pad(wide, (0, -columns % BLOCK, 0, -rows % BLOCK))
    scale = _tiles(padded).abs().amax(dim=(-3, -1)).clamp(min=1e-12) / LARGEST
    return (wide / spread(scale, rows, columns)).to(torch.float8_e4m3fn), scale


def dequantise(values: Tensor, scale: Tensor, dtype: torch.dtype, out: Tensor | None = None) -> Tensor:
    """values ⊙ factors in `dtype`, into `out` if given; shapes as `quantise` returns them. The product is fp32's."""
    rows, columns = values.shape[-2:]
    out = torch.empty(values.shape, dtype=dtype, device=values.device) if out is None else out
    if rows % BLOCK or columns % BLOCK:
        return torch.mul(values.float(), spread(scale, rows, columns), out=out)
    # whole blocks: no factor need be repeated
    torch.mul(_tiles(values.float()), scale[..., :, None, :, None], out=_tiles(out))
    return out


def _tiles(matrix: Tensor) -> Tensor:
    """A view (..., rows, columns) -> (..., rows / 128, 128, columns / 128, 128)."""
    return matrix.unflatten(-1, (-1, BLOCK)).unflatten(-3, (-1, BLOCK))


def spread(scale: Tensor, rows: int, columns: int) -> Tensor:
    """A factor per block -> the same factor at each of its elements, (..., rows, columns)."""
    wide = scale.repeat_interleave(BLOCK, dim=-1)[..., :columns]
    return wide.repeat_interleave(BLOCK, dim=-2)[..., :rows, :]
