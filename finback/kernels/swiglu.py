"""SwiGLU's activation, forward and backward; one C++ pass each if a kernel applies."""

import math
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from finback.kernels import native


def swiglu(x: Tensor, limit: float | None = None) -> Tensor:
    """SiLU(gate) ⊙ up for x (..., [gate | up]) -> (..., half); with a limit, x is clamped first (`clamped`)."""
    if native.serves(x) and torch.is_grad_enabled():
        recorded: Tensor = _SwiGLU.apply(x, limit)
        return recorded
    if not native.ready(x):
        gate, up = (x if limit is None else clamped(x, limit)).chunk(2, dim=-1)
        return F.silu(gate) * up
    x = x.contiguous()
    width = x.size(-1) // 2
    out = x.new_empty(*x.shape[:-1], width)
    native.call("swiglu", x.dtype == torch.bfloat16, x, out, out.numel() // width, width, _bound(limit))
    return out


def _bound(limit: float | None) -> float:
    return math.inf if limit is None else limit


def swiglu_backward(x: Tensor, grad: Tensor, limit: float | None = None) -> tuple[Tensor, Tensor]:
    """The gradient of x (..., [gate | up]) from that of `swiglu` (..., half), and the activation, recomputed."""
    if native.serves(x):
        x, grad = x.contiguous(), grad.contiguous()
        d_x, out = torch.empty_like(x), torch.empty_like(grad)
        width, is_bf16 = grad.size(-1), x.dtype == torch.bfloat16
        native.call("swiglu_backward", is_bf16, x, grad, d_x, out, grad.numel() // width, width, _bound(limit))
        return d_x, out
    d_x, inner = torch.empty_like(x), x if limit is None else clamped(x, limit)
    gate, up = inner.chunk(2, dim=-1)
    d_gate, d_up = d_x.chunk(2, dim=-1)
    sigmoid = gate.sigmoid()
    silu = gate * sigmoid
    out = silu * up
    torch.mul(grad, silu, out=d_up)
    # silu'(g) = s + silu·(1 - s)
    torch.mul(grad * up, sigmoid.addcmul_(silu, 1 - sigmoid), out=d_gate)
    if limit is not None:
        d_x.masked_fill_(inner != x, 0)
    return d_x, out


def clamped(x: Tensor, limit: float) -> Tensor:
    """x (..., [gate | up]) with gate clamped to at most limit and up to -limit … limit (V4 2.1)."""
    gate, up = x.chunk(2, dim=-1)
    return torch.cat([gate.clamp(max=limit), up.clamp(min=-limit, max=limit)], dim=-1)


class _SwiGLU(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, limit: float | None) -> Tensor:
        ctx.save_for_backward(x)
        ctx.limit = limit
        return swiglu(x, limit)  # autograd is off inside forward, so this does not recurse

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor, None]:
        (x,) = ctx.saved_tensors
        return swiglu_backward(x, grads[0], ctx.limit)[0], None
