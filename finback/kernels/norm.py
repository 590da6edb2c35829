"""RMSNorm with a hand-written backward pass: half as many passes over memory as autograd's, or one pass in C++.

Twin: reference.rms_norm.
"""

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from finback.kernels import native

BLOCK = 16  # rows per partial sum of the gain's gradient


def rms_norm(x: Tensor, gain: Tensor, eps: float) -> Tensor:
    """gain ⊙ x / sqrt(mean(x²) + eps) over the last dimension, computed in fp32; x (..., d), gain (d,)."""
    if native.serves(x):
        normed: Tensor = (
            _AddNorm.apply(x, None, gain, eps) if torch.is_grad_enabled() else _native(x, None, gain, eps)[1]
        )
        return normed
    if not torch.is_grad_enabled():  # decoding: few rows, nothing to record
        return F.rms_norm(x, gain.shape, gain.to(x.dtype), eps)
    return _RMSNorm.apply(x, gain, eps)


def add_rms_norm(x: Tensor, y: Tensor, gain: Tensor, eps: float) -> tuple[Tensor, Tensor]:
    """x + y (..., d) and its norm, in one pass if a C++ kernel applies."""
    if native.serves(x) and x.dtype == y.dtype:
        both: tuple[Tensor, Tensor] = (
            _AddNorm.apply(x, y, gain, eps) if torch.is_grad_enabled() else _native(x, y, gain, eps)[:2]
        )
        return both
    x = x + y
    return x, rms_norm(x, gain, eps)


def _native(
    x: Tensor, y: Tensor | None, gain: Tensor, eps: float, keeps: bool = False
) -> tuple[Tensor, Tensor, Tensor | None]:
    """x + y (x itself without y), its norm and, if `keeps`, the inverse root mean squares (..., 1) for the backward pass."""
    x, gain, size = x.contiguous(), gain.float(), x.size(-1)
    total, out = x if y is None else torch.empty_like(x), torch.empty_like(x)
    y = None if y is None else y.contiguous()
    inverse = x.new_empty(*x.shape[:-1], 1, dtype=torch.float32) if keeps else None
    tensors = x, y, gain, total, out, inverse
    native.call("add_norm", x.dtype == torch.bfloat16, *tensors, x.numel() // size, size, eps)
    return total, out, inverse


class _AddNorm(torch.autograd.Function):
    """The norm of x, or x + y and its norm, by the C++ kernels."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, y: Tensor | None, gain: Tensor, eps: float) -> Tensor | tuple[Tensor, Tensor]:
        total, out, inverse = _native(x, y, gain, eps, keeps=True)
        ctx.save_for_backward(total, gain, inverse)
        ctx.set_materialize_grads(False)
        return out if y is None else (total, out)

    @staticmethod
    def backward(ctx: Any, *grads: Tensor | None) -> tuple[Tensor | None, ...]:
        total, gain, inverse = ctx.saved_tensors
        others, grad = grads[:-1], grads[-1]
        other = others[0].contiguous() if others and others[0] is not None else None
        if grad is None:
            return other, other, None, None
        size, factor = total.size(-1), gain.float()
        rows, d_x = total.numel() // size, torch.empty_like(total)
        d_gain = factor.new_empty(-(-rows // BLOCK), size)
        tensors = total, factor, inverse, grad.contiguous(), other, d_x, d_gain
        native.call("norm_backward", total.dtype == torch.bfloat16, *tensors, rows, size, BLOCK)
        return d_x, d_x if others else None, d_gain.sum(0).to(gain.dtype), None


class _RMSNorm(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, gain: Tensor, eps: float) -> Tensor:
        norm = torch.linalg.vector_norm(x, dim=-1, keepdim=True, dtype=torch.float32)
        inverse = norm.square().div_(x.size(-1)).add_(eps).rsqrt_()
        ctx.save_for_backward(x, gain, inverse)
        return (x * inverse).mul_(gain.float()).to(x.dtype)

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor | None, ...]:
        x, gain, inverse = ctx.saved_tensors
        d, grad = x.size(-1), grads[0].float()
        unit = x * inverse
        product = (grad * unit).reshape(-1, d)  # not view: gradients from attention may not be contiguous
        d_gain = product.sum(0)
        along = (product @ gain.float()).div_(-d).view(inverse.shape)
        # dx = inverse ⊙ (g ⊙ grad - unit · mean(g ⊙ grad ⊙ unit))
        d_x = (grad * gain.float()).addcmul_(unit, along).mul_(inverse)
        return d_x.to(x.dtype), d_gain.to(gain.dtype), None
