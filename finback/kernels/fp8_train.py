"""Linear maps, SwiGLU and routed experts whose three products run in FP8, as in the training of DeepSeek-V3 (V3 3.3).

              left                       right                     tiles along
  Fprop       activation  1 x 128        weight      128 x 128     inputs
  Dgrad       gradient    1 x 128        weight      128 x 128     outputs
  Wgrad       gradient  128 x 1          activation  128 x 1       tokens

Master weights and their gradients are fp32; results have the input's dtype. Wgrad reads the activation that was stored for
the backward pass and so is quantized already: in E5M6 after attention, in FP8 elsewhere.
"""

from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from finback.kernels import fp8_hopper
from finback.kernels.fp8_products import Emulated, Operand, Products
from finback.kernels.moe_gemm import Blocks, layout
from finback.kernels.permutation import gather, gather_backward
from finback.kernels.swiglu import swiglu as activation
from finback.kernels.swiglu import swiglu_backward


@dataclass(frozen=True)
class Numerics:
    """Number formats of a linear map, which depend on its place in the model (V3 3.3.3)."""

    # whether the input's factors are powers of two
    input_power_of_two: bool = False
    # the same for the gradient of a feed-forward's output
    gradient_power_of_two: bool = False
    # whether the input is stored for Wgrad in E5M6 instead of E4M3
    keep_e5m6: bool = False
    # whether the factors of a feed-forward's weights are powers of two; weights that are FP4 numbers already lose nothing by it (V4)
    weight_power_of_two: bool = False
    # None: the form that suits the device
    products: Products | None = None
    # the clamp of SwiGLU, as in kernels.swiglu
    limit: float | None = None


LINEAR = Numerics()
# The input is stored in E5M6 because attention's backward pass reads it too. With factors that are
# powers of two, requantizing it from 1 x 128 to 128 x 1 tiles only shifts exponents.
AFTER_ATTENTION = Numerics(input_power_of_two=True, keep_e5m6=True)
# Inputs are sent to their experts in FP8, and the gradients of the outputs are sent back in FP8.
ROUTED = Numerics(input_power_of_two=True, gradient_power_of_two=True)


def linear(x: Tensor, weight: Tensor, numerics: Numerics) -> Tensor:
    """x (..., in), weight (out, in) -> (..., out), in x's dtype."""
    return _Fp8Linear.apply(x, weight, numerics)


def swiglu(x: Tensor, gate_up: Tensor, down: Tensor, numerics: Numerics) -> Tensor:
    """down(SiLU(gate x) ⊙ up x): x (..., d), gate_up (2m, d), gate rows first, down (d, m) -> (..., d)."""
    return _Fp8SwiGLU.apply(x, gate_up, down, numerics)


def routed_experts(
    x: Tensor, index: Tensor, weight: Tensor, gate_up: Tensor, down: Tensor, numerics: Numerics
) -> Tensor:
    """As reference.routed_experts, in FP8. Tiles along tokens start at each expert's first token."""
    return _Fp8Experts.apply(x, index, weight, gate_up, down, numerics)


def products_for(x: Tensor, numerics: Numerics) -> Products:
    """The arithmetic for a tensor: the configured one, else that of a Hopper GPU, else the emulator."""
    if numerics.products is not None:
        return numerics.products
    return Products(fp8_hopper.product) if fp8_hopper.missing(x.device) is None else Emulated()


class _Fp8Linear(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, weight: Tensor, numerics: Numerics) -> Tensor:
        p = products_for(x, numerics)
        rows = x.flatten(0, -2)
        tiles, blocks = p.tiles(rows, numerics.input_power_of_two), p.blocks(weight)
        saved = (p.keep(rows),) if numerics.keep_e5m6 else tiles
        ctx.save_for_backward(*saved, *blocks)
        ctx.numerics, ctx.split = numerics, len(saved)
        return p.multiply(tiles, blocks).to(x.dtype).unflatten(0, x.shape[:-1])

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor | None, ...]:
        grad, numerics = grads[0], ctx.numerics
        p = products_for(grad, numerics)
        saved = ctx.saved_tensors  # read once: under recomputation a second access raises
        saved, blocks = saved[: ctx.split], saved[ctx.split :]
        rows = grad.flatten(0, -2)
        d_x = p.multiply(p.tiles(rows), _transposed(blocks)).to(grad.dtype)
        seen = saved[0] if numerics.keep_e5m6 else p.dequantize(saved)
        d_weight = p.multiply(p.columns(rows), p.columns(seen, numerics.input_power_of_two))
        return d_x.unflatten(0, grad.shape[:-1]), d_weight.float(), None


class _Fp8SwiGLU(torch.autograd.Function):
    """A feed-forward as one expert that gets every row."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, gate_up: Tensor, down: Tensor, numerics: Numerics) -> Tensor:
        p, rows = products_for(x, numerics), x.flatten(0, -2)
        tiles = p.tiles(rows, numerics.input_power_of_two)
        ctx.numerics, ctx.blocks = numerics, [(0, 0, len(rows))]
        y, saved = _feed_forward(p, tiles, (gate_up[None], down[None]), ctx.blocks, x.dtype, numerics)
        ctx.save_for_backward(*saved)
        return y if x.ndim == 2 else y.unflatten(0, x.shape[:-1])  # not a view: a returned view cannot take hooks

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor | None, ...]:
        p, rows = products_for(grads[0], ctx.numerics), grads[0].flatten(0, -2)
        d_x, d_gate_up, d_down = _feed_back(p, rows, ctx.saved_tensors, ctx.blocks, ctx.numerics)
        return d_x.unflatten(0, grads[0].shape[:-1]), d_gate_up[0], d_down[0], None


class _Fp8Experts(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any, x: Tensor, index: Tensor, weight: Tensor, gate_up: Tensor, down: Tensor, numerics: Numerics
    ) -> Tensor:
        p, (n, k) = products_for(x, numerics), index.shape
        slots, ctx.blocks = layout(index, gate_up.size(0), 1)
        order = torch.empty_like(slots).index_copy_(0, slots, torch.arange(n * k, device=x.device))
        # rows are quantized once, before they are sent to their experts
        tiles = tuple(t[order // k] for t in p.tiles(x, numerics.input_power_of_two))
        sorted_y, saved = _feed_forward(p, tiles, (gate_up, down), ctx.blocks, x.dtype, numerics)
        ctx.save_for_backward(slots, sorted_y, weight, *saved)
        ctx.numerics = numerics
        return gather(sorted_y, slots, weight, k)

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor | None, ...]:
        slots, sorted_y, weight, *saved = ctx.saved_tensors
        p = products_for(grads[0], ctx.numerics)
        d_y, d_weight = gather_backward(sorted_y, slots, weight, grads[0])
        d_rows, d_gate_up, d_down = _feed_back(p, d_y, saved, ctx.blocks, ctx.numerics)
        return gather(d_rows, slots, None, weight.size(1)), None, d_weight, d_gate_up, d_down, None


def _feed_forward(
    p: Products, tiles: Operand, weights: tuple[Tensor, Tensor], blocks: Blocks, dtype: torch.dtype, numerics: Numerics
) -> tuple[Tensor, tuple[Tensor, ...]]:
    """Applies gate_up (e, 2m, d) and down (e, d, m) to rows grouped by expert -> (rows, d), and the tensors for backward.

    SwiGLU's input is stored in FP8 and its output is recomputed from it (V3 3.3.3); the forward pass uses the input unrounded.
    """
    w_in, w_out = (p.blocks(weight, numerics.weight_power_of_two) for weight in weights)
    hidden = _per_expert(p, tiles, w_in, blocks, dtype)
    y = _per_expert(p, p.tiles(activation(hidden, numerics.limit)), w_out, blocks, dtype)
    return y, (*tiles, *p.tiles(hidden), *w_in, *w_out)


def _feed_back(
    p: Products, grad: Tensor, saved: tuple[Tensor, ...] | list[Tensor], blocks: Blocks, numerics: Numerics
) -> tuple[Tensor, Tensor, Tensor]:
    """The gradients of the rows, gate_up and down from that of the rows' outputs."""
    each = len(saved) // 4
    tiles, hidden, w_in, w_out = (tuple(saved[i : i + each]) for i in range(0, len(saved), each))
    sent = p.tiles(grad, numerics.gradient_power_of_two)
    # the expert receives the gradient in FP8, so Wgrad sees the rounded one too
    seen = p.dequantize(sent) if numerics.gradient_power_of_two else grad
    d_act = _per_expert(p, sent, _transposed(w_out), blocks, grad.dtype)
    d_hidden, act = swiglu_backward(p.dequantize(hidden).to(grad.dtype), d_act, numerics.limit)
    d_down = _outer(p, seen, act, blocks, len(w_out[0]), (numerics.gradient_power_of_two, False))
    d_rows = _per_expert(p, p.tiles(d_hidden), _transposed(w_in), blocks, grad.dtype)
    rows = p.dequantize(tiles)
    d_gate_up = _outer(p, d_hidden, rows, blocks, len(w_in[0]), (False, numerics.input_power_of_two))
    return d_rows, d_gate_up, d_down


def _transposed(operand: Operand) -> Operand:
    """Transposes values and factors, which suffices because 128 x 128 blocks are square."""
    return tuple(t.transpose(-1, -2) for t in operand)


def _per_expert(p: Products, rows: Operand, weights: Operand, blocks: Blocks, dtype: torch.dtype) -> Tensor:
    """Each block of rows (m, k) times its expert's weight (n, k)^T -> (m, n)."""
    out = rows[0].new_empty(len(rows[0]), weights[0].size(-2), dtype=dtype)
    for expert, start, stop in blocks:
        out[start:stop] = p.multiply(tuple(t[start:stop] for t in rows), tuple(t[expert] for t in weights))
    return out


def _outer(
    p: Products, left: Tensor, right: Tensor, blocks: Blocks, experts: int, power_of_two: tuple[bool, bool]
) -> Tensor:
    """Σ over each expert's rows of left ⊗ right -> (experts, a, b), fp32."""
    out = torch.zeros(experts, left.size(1), right.size(1), device=left.device)
    for expert, start, stop in blocks:
        one, other = left[start:stop], right[start:stop]
        out[expert] = p.multiply(p.columns(one, power_of_two[0]), p.columns(other, power_of_two[1]))
    return out
