"""Building blocks of all layers: norm, linear map, SwiGLU and initialization."""

from abc import ABC, abstractmethod
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from finback.kernels.frozen import grouped_linear
from finback.kernels.norm import add_rms_norm, rms_norm
from finback.kernels.swiglu import swiglu


class RMSNorm(nn.Module):
    """y = g ⊙ x / sqrt(mean(x²) + eps), statistics in fp32 for any input dtype (V3 inference code)."""

    def __init__(self, size: int, eps: float) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.ones(size))
        self.eps = eps

    def forward(self, x: Tensor) -> Tensor:
        return rms_norm(x, self.gain(), self.eps)

    def add(self, x: Tensor, y: Tensor) -> tuple[Tensor, Tensor]:
        """x + y, and its norm."""
        return add_rms_norm(x, y, self.gain(), self.eps)

    def gain(self) -> Tensor:
        """g."""
        return self.weight


class OffsetNorm(RMSNorm):
    """RMSNorm with gain 1 + weight (Gemma)."""

    def gain(self) -> Tensor:
        return 1 + self.weight.float()


class NoNorm(nn.Module):
    """Placeholder for a missing norm in a block."""

    def forward(self, x: Tensor) -> Tensor:
        return x

    def add(self, x: Tensor, y: Tensor) -> tuple[Tensor, Tensor]:
        """x + y, twice."""
        total = x + y
        return total, total


class Normed(nn.Module):
    """norm(inner(x)): an attention or feed-forward whose output is normed before it is added (OLMo 2, arXiv 2501.00656)."""

    def __init__(self, inner: nn.Module, norm: RMSNorm) -> None:
        super().__init__()
        self.inner = inner
        self.norm = norm

    def forward(self, x: Tensor, *context: Any) -> Tensor:
        y: Tensor = self.norm(self.inner(x, *context))
        return y


class UnweightedNorm(nn.Module):
    """x / sqrt(mean(x²) + eps) over the last dimension, statistics in fp32."""

    def __init__(self, eps: float) -> None:
        super().__init__()
        self.eps = eps

    def forward(self, x: Tensor) -> Tensor:
        return rms_norm(x, torch.ones(x.size(-1), device=x.device), self.eps)


class Linear(nn.Module):
    """y = W x (+ b); W is (out, in), as in checkpoints. DeepSeek's models have no biases; Qwen2's attention does.

    The input's dtype decides the arithmetic: a bf16 input gets a bf16 product, whatever the weights' dtype. In training the
    weights are fp32 masters; an inference-only model may have them in bf16.
    """

    # number of matrices stacked in the weight, each with its own input; None: one matrix
    groups: int | None = None

    def __init__(self, inputs: int, outputs: int, bias: bool = False) -> None:
        super().__init__()
        self.in_features, self.out_features = inputs, outputs  # independent of how the weight is stored
        self.weight = nn.Parameter(torch.empty(outputs, inputs))
        self.bias = nn.Parameter(torch.empty(outputs)) if bias else None

    def forward(self, x: Tensor) -> Tensor:
        return F.linear(x, self.matrix(x.dtype), None if self.bias is None else self.bias.to(x.dtype))

    def matrix(self, dtype: torch.dtype) -> Tensor:
        """The weight (out, in) in the dtype of the arithmetic."""
        return self.weight.to(dtype)


class GroupedLinear(Linear):
    """y_g = W_g x_g for several groups; the W_g (out / groups, in) are stacked in one weight (out, in)."""

    def __init__(self, inputs: int, outputs: int, groups: int) -> None:
        super().__init__(inputs, outputs)
        self.groups = groups

    def forward(self, x: Tensor) -> Tensor:
        """x (..., groups, in) -> (..., out)."""
        return grouped_linear(x, self.matrix(x.dtype), self.groups)


class SwiGLU(nn.Module):
    """down(SiLU(gate x) ⊙ up x); gate and up are one matrix, gate rows first. For the limit see kernels.swiglu."""

    def __init__(self, hidden: int, width: int, limit: float | None = None) -> None:
        super().__init__()
        self.limit = limit
        self.gate_up = Linear(hidden, 2 * width)
        self.down = Linear(width, hidden)

    def forward(self, x: Tensor) -> Tensor:
        """x (..., hidden) -> (..., hidden)."""
        y: Tensor = self.down(swiglu(self.gate_up(x), self.limit))
        return y


class GeGLU(nn.Module):
    """down(GELU(gate x) ⊙ up x) with tanh GELU (Gemma); matrices as in SwiGLU."""

    def __init__(self, hidden: int, width: int) -> None:
        super().__init__()
        self.gate_up = Linear(hidden, 2 * width)
        self.down = Linear(width, hidden)

    def forward(self, x: Tensor) -> Tensor:
        """x (..., hidden) -> (..., hidden)."""
        gate, up = self.gate_up(x).chunk(2, dim=-1)
        y: Tensor = self.down(F.gelu(gate, approximate="tanh") * up)
        return y


def precise(*shape: int) -> nn.Parameter:
    """A parameter that is fp32 whatever the dtype of the model's others."""
    return nn.Parameter(torch.empty(*shape, dtype=torch.float32))


class OwnStart(nn.Module, ABC):
    """A module with some parameters that `initialise` must not initialize like all others."""

    # names of these parameters
    starts: tuple[str, ...]

    @abstractmethod
    def start(self, generator: torch.Generator) -> None:
        """Initializes them."""


def first_value(module: nn.Module, name: str) -> float:
    """Initial value of a vector parameter: 1 for gains, 0 for biases, sinks and offsets of gains."""
    owner = module.get_submodule(name.rpartition(".")[0])
    return 0.0 if name.endswith(("bias", "sink")) or isinstance(owner, OffsetNorm) else 1.0


def initialise(module: nn.Module, std: float, generator: torch.Generator) -> None:
    """Initializes every matrix from a normal distribution with `std` (V3 4.2), gains to 1, biases to 0, in order of parameters.

    Then calls `start` of each OwnStart.
    """
    for name, parameter in module.named_parameters():
        with torch.no_grad():
            if parameter.ndim >= 2:
                parameter.normal_(0.0, std, generator=generator)
            else:
                parameter.fill_(first_value(module, name))
    for part in module.modules():
        if isinstance(part, OwnStart):
            with torch.no_grad():
                part.start(generator)
