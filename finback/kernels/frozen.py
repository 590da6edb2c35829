"""Products with frozen weights in any storage format.

Their backward pass computes the gradient of the input only, so it needs no activations. It dequantizes or casts the weights
again, one matrix at a time, instead of storing the result of the forward pass.
"""

from collections.abc import Callable
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from finback.kernels import moe_gemm
from finback.kernels.moe_gemm import Blocks
from finback.kernels.permutation import permute, unpermute
from finback.kernels.swiglu import swiglu

# return a stored weight (out, in) in the compute dtype; `Matrices` takes the index of an expert first
Matrix = Callable[[torch.dtype], Tensor]
Matrices = Callable[[int, torch.dtype], Tensor]
# rows (m, in), laid out by expert in blocks -> (m, out)
Product = Callable[[Tensor, Blocks], Tensor]


def linear(x: Tensor, matrix: Matrix, groups: int | None = None) -> Tensor:
    """`grouped_linear` with the weight matrix(x.dtype)."""
    return _Linear.apply(x, matrix, groups)


def grouped_linear(x: Tensor, weight: Tensor, groups: int | None) -> Tensor:
    """x (..., in) · weight (out, in)^T -> (..., out); with groups, x (..., groups, in) times its group's out / groups rows."""
    if groups is None:
        return F.linear(x, weight)
    return torch.einsum("...gi,goi->...go", x, weight.unflatten(0, (groups, -1))).flatten(-2)


class _Linear(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, matrix: Matrix, groups: int | None) -> Tensor:
        ctx.matrix, ctx.groups = matrix, groups
        return grouped_linear(x, matrix(x.dtype), groups)

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor | None, ...]:
        grad, groups = grads[0], ctx.groups
        weight = ctx.matrix(grad.dtype)
        if groups is None:
            return grad @ weight, None, None
        parts, stack = grad.unflatten(-1, (groups, -1)), weight.unflatten(0, (groups, -1))
        return torch.einsum("...go,goi->...gi", parts, stack), None, None


def routed_experts(
    x: Tensor,
    index: Tensor,
    weight: Tensor,
    experts: int,
    gate_up: Product,
    down: Product,
    activation: Callable[[Tensor], Tensor] | None = None,
) -> Tensor:
    """As reference.routed_experts, with two products over all experts: x (n, d), index and weight (n, k) -> (n, d).

    `activation` maps (m, 2w) to (m, w); None: SwiGLU.
    """
    by_shape = x.dtype == torch.bfloat16 and x.device.type == "cpu" and torch.is_grad_enabled()
    slots, blocks = moe_gemm.layout(index, experts, moe_gemm.BLOCK_MULTIPLE if by_shape else 1)
    rows = permute(x, slots, blocks[-1][2], index.size(1))
    return unpermute(down((activation or swiglu)(gate_up(rows, blocks)), blocks), slots, weight)


def per_expert(rows: Tensor, blocks: Blocks, width: int, matrices: Matrices) -> Tensor:
    """rows (m, in) · matrices(e, dtype) (width, in)^T with the expert e of each block -> (m, width)."""
    return _PerExpert.apply(rows, blocks, width, matrices)


class _PerExpert(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, rows: Tensor, blocks: Blocks, width: int, matrices: Matrices) -> Tensor:
        ctx.blocks, ctx.matrices, ctx.shape = blocks, matrices, rows.shape
        out = rows.new_empty(len(rows), width)
        for expert, start, stop in blocks:
            torch.mm(rows[start:stop], matrices(expert, rows.dtype).T, out=out[start:stop])
        return out

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor | None, ...]:
        grad = grads[0].contiguous()
        d_rows = grad.new_empty(ctx.shape)
        for expert, start, stop in ctx.blocks:
            torch.mm(grad[start:stop], ctx.matrices(expert, grad.dtype), out=d_rows[start:stop])
        return d_rows, None, None, None


def learnt_per_expert(rows: Tensor, weights: Tensor, blocks: Blocks) -> Tensor:
    """rows (m, in) · weights[e]^T with trainable weights (experts, out, in), the factors A and B of adapters -> (m, out)."""
    return _LearntPerExpert.apply(rows, weights, blocks)


class _LearntPerExpert(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, rows: Tensor, weights: Tensor, blocks: Blocks) -> Tensor:
        ctx.save_for_backward(rows, weights)
        ctx.blocks = blocks
        return moe_gemm.per_expert(rows, weights.to(rows.dtype).transpose(1, 2), blocks)

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor | None, ...]:
        (rows, weights), grad = ctx.saved_tensors, grads[0].contiguous()
        d_rows = moe_gemm.per_expert(grad, weights.to(grad.dtype), ctx.blocks)
        d_weights = moe_gemm.outer_per_expert(grad, rows, ctx.blocks, weights)
        return d_rows, d_weights.to(weights.dtype), None
