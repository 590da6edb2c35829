"""Norm, linear map, SwiGLU and initialisation: what every layer is made of."""

from collections.abc import Callable

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from finback.kernels import decode, fp8, fp8_train
from finback.kernels.fp8_train import Numerics
from finback.kernels.norm import rms_norm


class RMSNorm(nn.Module):
    """y = g ⊙ x / sqrt(mean(x²) + eps), statistics in fp32 whatever the input (V3 inference code)."""

    def __init__(self, size: int, eps: float) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.ones(size))
        self.eps = eps

    def forward(self, x: Tensor) -> Tensor:
        return rms_norm(x, self.weight, self.eps)

    def after(self, x: Tensor, y: Tensor) -> tuple[Tensor, Tensor]:
        """x + y, and its norm."""
        if decode.ready(x):
            return decode.add_norm(x, y, self.weight, self.eps)
        x = x + y
        return x, self(x)


class Linear(nn.Module):
    """y = W x (+ b); W is (out, in), as in checkpoints. DeepSeek's models have no biases, Qwen2's attention has.

    The input's dtype decides the arithmetic: a bf16 input gets a bf16 product, whatever the weights are kept in. In
    training they are fp32 masters; a model that only answers may keep them in bf16, or in FP8 with `weight_scale`. With
    `numerics` the product itself runs in FP8.
    """

    weight_scale: Tensor | None

    def __init__(self, inputs: int, outputs: int, bias: bool = False) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.empty(outputs, inputs))
        self.bias = nn.Parameter(torch.empty(outputs)) if bias else None
        self.register_buffer("weight_scale", None)
        self.numerics: Numerics | None = None  # set by train.precision.use_fp8

    def forward(self, x: Tensor) -> Tensor:
        if self.numerics is not None:
            y = fp8_train.linear(x, self.weight, self.numerics)
            return y if self.bias is None else y + self.bias.to(x.dtype)
        return F.linear(x, self.matrix(x.dtype), None if self.bias is None else self.bias.to(x.dtype))

    def matrix(self, dtype: torch.dtype) -> Tensor:
        """The weight (out, in) in the dtype of the arithmetic."""
        if self.weight_scale is not None:
            return fp8.dequantize(self.weight, self.weight_scale, dtype)
        return self.weight.to(dtype)


class SwiGLU(nn.Module):
    """down(SiLU(gate x) ⊙ up x); gate and up are one matrix, gate rows first."""

    def __init__(self, hidden: int, width: int) -> None:
        super().__init__()
        self.gate_up = Linear(hidden, 2 * width)
        self.down = Linear(width, hidden)
        self.numerics: Numerics | None = None
        self.compiled: Callable[..., Tensor] | None = None  # `plain`, set by train.compiling

    def forward(self, x: Tensor) -> Tensor:
        if self.numerics is not None:
            return fp8_train.swiglu(x, self.gate_up.weight, self.down.weight, self.numerics)
        if self.compiled is not None and torch.is_grad_enabled():
            y: Tensor = self.compiled(self, x)
            return y
        return self.plain(x)

    def plain(self, x: Tensor) -> Tensor:
        """Products in the dtype of x (..., hidden)."""
        hidden = self.gate_up(x)
        if decode.ready(hidden):
            return self.down(decode.swiglu(hidden))
        gate, up = hidden.chunk(2, dim=-1)
        return self.down(F.silu(gate) * up)


def initialise(module: nn.Module, std: float, generator: torch.Generator) -> None:
    """Every matrix normal with `std` (V3 4.2), gains 1, biases 0; order of parameters is the seed's order."""
    for name, parameter in module.named_parameters():
        with torch.no_grad():
            if parameter.ndim >= 2:
                parameter.normal_(0.0, std, generator=generator)
            else:
                parameter.fill_(0.0 if name.endswith("bias") else 1.0)
