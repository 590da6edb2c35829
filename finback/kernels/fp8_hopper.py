"""FP8 products on Hopper's tensor cores: torch's scaled_mm with block scaling, implemented by cuBLAS (CUDA 12.9 and later).

Twin: reference.fp8_product. Sizes are padded to multiples of 128, and factors are laid out as cuBLAS requires: those of
tiles contiguous along the rows, those of blocks contiguous along k, with k padded to a multiple of 4.
"""

import torch
import torch.nn.functional as F
from torch import Tensor

from finback.kernels.fp8 import BLOCK, blocks


def missing(device: torch.device) -> str | None:
    """What the device lacks for these products; None if it supports them."""
    if device.type != "cuda" or not torch.cuda.is_available():
        return "needs a Hopper GPU"
    if torch.version.hip is not None or torch.cuda.get_device_capability(device) != (9, 0):
        return f"needs a Hopper GPU, not {torch.cuda.get_device_name(device)}"
    if tuple(int(n) for n in (torch.version.cuda or "0.0").split(".")[:2]) < (12, 9):
        return f"needs CUDA 12.9, torch has {torch.version.cuda}"
    return None if hasattr(F, "scaled_mm") else "needs torch.nn.functional.scaled_mm"


def product(a: Tensor, a_scale: Tensor, b: Tensor, b_scale: Tensor) -> Tensor:
    """a (m, k) · b (n, k)^T of E4M3 values -> (m, n) in fp32; factors are per row of a and per row or 128 rows of b."""
    rows, columns = a.size(0), b.size(0)
    in_blocks = b_scale.size(0) != columns
    tile = F.ScalingType.BlockWise1x128
    right = _of_blocks(b_scale) if in_blocks else _of_tiles(b_scale, columns)
    kind = F.ScalingType.BlockWise128x128 if in_blocks else tile
    factors = _of_tiles(a_scale, rows), tile, right, kind
    out = F.scaled_mm(_padded(a), _padded(b).T, *factors, output_dtype=torch.float32)
    return out[:rows, :columns]


def _padded(values: Tensor) -> Tensor:
    """Pads rows and columns to multiples of 128, as bytes because F.pad does not take FP8; the byte 0 is the number 0."""
    rows, columns = values.shape
    edges = (0, -columns % BLOCK, 0, -rows % BLOCK)
    return F.pad(values.contiguous().view(torch.uint8), edges).view(values.dtype)


def _of_tiles(scale: Tensor, rows: int) -> Tensor:
    """(rows, k / 128) -> the same with padded rows, contiguous along the rows."""
    return F.pad(scale, (0, 0, 0, blocks(rows) * BLOCK - rows)).T.contiguous().T


def _of_blocks(scale: Tensor) -> Tensor:
    """(rows / 128, k / 128) -> (k / 128 rounded up to a multiple of 4, rows / 128), contiguous along k."""
    return F.pad(scale, (0, -scale.size(1) % 4)).contiguous().T
