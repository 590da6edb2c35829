"""Quantizes and multiplies matrices in FP8 training, in forms that agree: a plain one, a fast emulator, and Hopper's.

An operand is a quantized matrix (rows, k) of a product over k, or a stack of them. Tiles are DeepSeek's (V3 3.3.2):
`tiles` of 1 x 128 along k for activations and gradients, `blocks` of 128 x 128 for weights. Any size works: short edges
count as padded with zeros, which change neither a largest magnitude nor a sum.
"""

from collections.abc import Callable
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor

from finback.kernels import fp8, native, reference
from finback.kernels.fp8 import BLOCK

Operand = tuple[Tensor, ...]


Multiply = Callable[[Tensor, Tensor, Tensor, Tensor], Tensor]


@dataclass(frozen=True)
class Products:
    """The arithmetic of FP8 training in its plain form. All forms quantize to the same numbers.

    Operands are (E4M3 values, factors); `product` takes two of them, like reference.fp8_product.
    """

    product: Multiply = reference.fp8_product

    def tiles(self, x: Tensor, power_of_two: bool = False) -> Operand:
        """Quantizes x (rows, k) in tiles of 1 x 128."""
        return fp8.quantize_tiles(x, power_of_two)

    def columns(self, x: Tensor, power_of_two: bool = False) -> Operand:
        """Quantizes the transpose of x (k, rows), in tiles of 128 x 1 of x."""
        return fp8.quantize_tiles(x.T.contiguous(), power_of_two)

    def blocks(self, weight: Tensor, power_of_two: bool = False) -> Operand:
        """Quantizes weight (..., rows, k) in blocks of 128 x 128."""
        return fp8.quantize(weight, power_of_two)

    def keep(self, x: Tensor) -> Tensor:
        """Rounds x (rows, k) to E5M6, the format in which it is stored for the backward pass; fp32."""
        return round_e5m6(x)

    def multiply(self, a: Operand, b: Operand) -> Tensor:
        """a (m, k) · b (n, k)^T -> (m, n) in fp32."""
        return self.product(*a, *b)

    def dequantize(self, operand: Operand) -> Tensor:
        """A `tiles` operand as numbers, (rows, k) in fp32."""
        return fp8.dequantize_tiles(*operand)


class Emulated(Products):
    """Operands are (values ⊙ factors,) in fp32 and are multiplied by one fp32 product, which is fast on any device.

    Operands equal those of the plain form bit for bit. The plain form promotes partial sums to fp32, so results differ only
    by the order of summation. On a GPU, fp32 products must not use TF32; torch's default is not to.
    """

    def tiles(self, x: Tensor, power_of_two: bool = False) -> Operand:
        return (round_tiles(x, 1, power_of_two),)

    def columns(self, x: Tensor, power_of_two: bool = False) -> Operand:
        return (round_tiles(x, 0, power_of_two).T,)

    def blocks(self, weight: Tensor, power_of_two: bool = False) -> Operand:
        return (fp8.dequantize(*fp8.quantize(weight, power_of_two), torch.float32),)

    def multiply(self, a: Operand, b: Operand) -> Tensor:
        return a[0] @ b[0].T

    def dequantize(self, operand: Operand) -> Tensor:
        return operand[0]


def round_tiles(x: Tensor, dim: int, power_of_two: bool = False) -> Tensor:
    """Rounds x (rows, columns) to E4M3 in tiles of 128 along `dim`; fp32. Twin: quantize_tiles, then dequantize_tiles."""
    if x.device.type == "cpu" and x.dtype in native.DTYPES and native.library() is not None:
        out = torch.empty_like(x := x.contiguous(), dtype=torch.float32)  # one pass over memory instead of a dozen
        native.call("round_tiles", x.dtype == torch.bfloat16, x, out, *x.shape, dim == 0, power_of_two)
        return out
    size = x.size(dim)
    fp32 = F.pad(x.float(), (0, -size % BLOCK) if dim == 1 else (0, 0, 0, -size % BLOCK))
    tiles = fp32.unflatten(dim, (-1, BLOCK))
    scale = fp8.factors(tiles.abs().amax(dim=dim + 1, keepdim=True), fp8.LARGEST, power_of_two)
    rounded = round_(tiles / scale, fraction=3, exponent=-6).mul_(scale)
    return rounded.flatten(dim, dim + 1).narrow(dim, 0, size)


def round_e5m6(x: Tensor) -> Tensor:
    """Rounds x (rows, k) to E5M6 with a power-of-two factor per 1 x 128; fp32 (V3 3.3.3).

    The paper only names the format. This one follows IEEE 754, with exponents -14 … 15.
    """
    tiles = F.pad(x.float(), (0, -x.size(1) % BLOCK)).unflatten(1, (-1, BLOCK))
    largest = 2.0**15 * (2 - 2.0**-6)
    scale = fp8.factors(tiles.abs().amax(dim=2, keepdim=True), largest, power_of_two=True)
    return round_(tiles / scale, fraction=6, exponent=-14).mul_(scale).flatten(1)[:, : x.size(1)]


def round_(x: Tensor, fraction: int, exponent: int) -> Tensor:
    """Rounds fp32 numbers in place to `fraction` bits, ties to even, with smallest normal exponent `exponent`.

    Adding and then subtracting a suitably larger number makes fp32's own rounding drop the other bits. Nothing saturates.
    """
    leading = x.view(torch.int32).bitwise_and(0x7F800000).view(torch.float32)  # 2^⌊log2 |x|⌋
    large = leading.clamp_(min=2.0**exponent).mul_(1.5 * 2.0 ** (23 - fraction))
    return x.add_(large).sub_(large)
