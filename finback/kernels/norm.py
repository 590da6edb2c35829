"""RMSNorm with a backward by hand: half the passes over memory that autograd's record of it takes.

Twin: reference.rms_norm.
"""

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from finback.kernels import native


def rms_norm(x: Tensor, gain: Tensor, eps: float) -> Tensor:
    """gain ⊙ x / sqrt(mean(x²) + eps) over the last dimension, in fp32 inside; x (..., d), gain (d,)."""
    if native.ready(x):
        return _native(x, None, gain, eps)[1]
    if not torch.is_grad_enabled():  # decoding: few rows, nothing to record
        return F.rms_norm(x, gain.shape, gain.to(x.dtype), eps)
    return _RMSNorm.apply(x, gain, eps)


def add_rms_norm(x: Tensor, y: Tensor, gain: Tensor, eps: float) -> tuple[Tensor, Tensor]:
    """x + y (..., d) and its norm, in one pass where a kernel serves them."""
    if native.ready(x):
        return _native(x, y, gain, eps)
    x = x + y
    return x, rms_norm(x, gain, eps)


def _native(x: Tensor, y: Tensor | None, gain: Tensor, eps: float) -> tuple[Tensor, Tensor]:
    """x + y, x itself without a y, and its norm."""
    x, gain, size = x.contiguous(), gain.float(), x.size(-1)
    total, out = x if y is None else torch.empty_like(x), torch.empty_like(x)
    y = None if y is None else y.to(x.dtype).contiguous()
    native.call("add_norm", x.dtype == torch.bfloat16, x, y, gain, total, out, x.numel() // size, size, eps)
    return total, out


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
        product = (grad * unit).reshape(-1, d)  # attention may hand back a gradient that is not in one piece
        d_gain = product.sum(0)
        along = (product @ gain.float()).div_(-d).view(inverse.shape)
        # dx = inverse ⊙ (g ⊙ grad - unit · mean(g ⊙ grad ⊙ unit))
        d_x = (grad * gain.float()).addcmul_(unit, along).mul_(inverse)
        return d_x.to(x.dtype), d_gain.to(gain.dtype), None
