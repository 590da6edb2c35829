"""How matrices are quantized and multiplied in FP8 training, in forms that agree: by the letter, fast, and on Hopper.

An operand is a quantized matrix (rows, k) of a product over k, or a stack of them. Which tiles it has is DeepSeek's
choice (V3 3.3.2): `tiles` 1 x 128 along k for activations and gradients, `blocks` 128 x 128 for weights. Short edges
count as padded with zeros, which change neither a largest magnitude nor a sum; so every size works.
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
    """What FP8 training needs of a kind of arithmetic, in the plain form. All forms see the same quantized numbers.

    Operands are (E4M3 values, factors); `product` takes two of them, as reference.fp8_product.
    """

    product: Multiply = reference.fp8_product

    def tiles(self, x: Tensor, power_of_two: bool = False) -> Operand:
        """x (rows, k) in tiles of 1 x 128."""
        return fp8.quantize_tiles(x, power_of_two)

    def columns(self, x: Tensor, power_of_two: bool = False) -> Operand:
        """The transpose of x (k, rows): tiles of 128 x 1 of x."""
        return fp8.quantize_tiles(x.T.contiguous(), power_of_two)

    def blocks(self, weight: Tensor, power_of_two: bool = False) -> Operand:
        """weight (..., rows, k) in blocks of 128 x 128."""
        return fp8.quantize(weight, power_of_two)

    def keep(self, x: Tensor) -> Tensor:
        """What is left of x (rows, k) kept in E5M6, in fp32."""
        return round_e5m6(x)

    def multiply(self, a: Operand, b: Operand) -> Tensor:
        """a (m, k) · b (n, k)^T -> (m, n) in fp32."""
        return self.product(*a, *b)

    def dequantize(self, operand: Operand) -> Tensor:
        """What a `tiles` operand stands for, (rows, k) in fp32."""
        return fp8.dequantize_tiles(*operand)


class Emulated(Products):
    """Operands are (values ⊙ factors,) in fp32, multiplied in one go: fast anywhere.

    Sums over tiles promoted to fp32 are sums in fp32, so the results are those of the plain form up to the order of
    summation; the operands are its own, bit for bit. On a GPU fp32 products must not be TF32 (torch's default).
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
    """What E4M3 leaves of x (rows, columns), in tiles of 128 along `dim`; fp32. Twin: quantize_tiles and back."""
    if x.device.type == "cpu" and x.dtype in native.DTYPES and native.library() is not None:
        out = torch.empty_like(x := x.contiguous(), dtype=torch.float32)  # in one pass instead of a dozen
        native.call("round_tiles", x.dtype == torch.bfloat16, x, out, *x.shape, dim == 0, power_of_two)
        return out
    size = x.size(dim)
    fp32 = F.pad(x.float(), (0, -size % BLOCK) if dim == 1 else (0, 0, 0, -size % BLOCK))
    tiles = fp32.unflatten(dim, (-1, BLOCK))
    scale = fp8.factors(tiles.abs().amax(dim=dim + 1, keepdim=True), fp8.LARGEST, power_of_two)
    rounded = round_(tiles / scale, fraction=3, exponent=-6).mul_(scale)
    return rounded.flatten(dim, dim + 1).narrow(dim, 0, size)


def round_e5m6(x: Tensor) -> Tensor:
    """What E5M6 with power-of-two factors per 1 x 128 leaves of x (rows, k); fp32 (V3 3.3.3).

    The paper names the format only; taken as IEEE's would be, with exponents -14 … 15.
    """
    tiles = F.pad(x.float(), (0, -x.size(1) % BLOCK)).unflatten(1, (-1, BLOCK))
    largest = 2.0**15 * (2 - 2.0**-6)
    scale = fp8.factors(tiles.abs().amax(dim=2, keepdim=True), largest, power_of_two=True)
    return round_(tiles / scale, fraction=6, exponent=-14).mul_(scale).flatten(1)[:, : x.size(1)]


def round_(x: Tensor, fraction: int, exponent: int) -> Tensor:
    """Round fp32 numbers in place to `fraction` bits, ties to even, with smallest normal exponent `exponent`.

    Adding and subtracting a number that much larger makes fp32's own rounding do it. Nothing saturates.
    """
    leading = x.view(torch.int32).bitwise_and(0x7F800000).view(torch.float32)  # 2^⌊log2 |x|⌋
    large = leading.clamp_(min=2.0**exponent).mul_(1.5 * 2.0 ** (23 - fraction))
    return x.add_(large).sub_(large)
