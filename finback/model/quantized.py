"""Weights that stay as they were quantized, in a model that only answers; products run in the dtype of activations."""

from collections.abc import Iterable

import torch
from torch import Tensor, nn

from finback.kernels import fp8, moe_gemm
from finback.model.layers import Linear
from finback.model.moe import MoE
from finback.model.replace import recast


class Fp8WeightLinear(Linear):
    """A linear map whose weight is E4M3 with a factor per block of 128 x 128."""

    weight_scale: Tensor

    def matrix(self, dtype: torch.dtype) -> Tensor:
        return fp8.dequantize(self.weight, self.weight_scale, dtype)


class Fp8WeightMoE(MoE):
    """Routed experts whose weights are E4M3; only those that are asked are dequantized."""

    gate_up_scale: Tensor
    down_scale: Tensor

    def experts(self, x: Tensor, index: Tensor, weight: Tensor, gate_up: Tensor, down: Tensor) -> Tensor:  # type: ignore[override]
        met, index = index.unique(return_inverse=True)
        gate_up = fp8.dequantize(gate_up[met], self.gate_up_scale[met], x.dtype)
        down = fp8.dequantize(down[met], self.down_scale[met], x.dtype)
        return moe_gemm.routed_experts(x, index, weight, gate_up, down)


def make_room_for_fp8(module: Linear | MoE, names: Iterable[str]) -> None:
    """Give a module FP8 parameters of these names without values, and buffers for their factors, in place of its own."""
    recast(module, Fp8WeightMoE if isinstance(module, MoE) else Fp8WeightLinear)
    for name in names:
        shape = getattr(module, name).shape
        setattr(module, name, nn.Parameter(torch.empty(shape, dtype=torch.float8_e4m3fn), requires_grad=False))
        factors = torch.empty(*shape[:-2], fp8.blocks(shape[-2]), fp8.blocks(shape[-1]))
        module.register_buffer(f"{name}_scale", factors)
