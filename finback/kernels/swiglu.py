"""SwiGLU's activation, forward and backward; one C++ pass each if a kernel applies."""

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from finback.kernels import native


def swiglu(x: Tensor, limit: float | None = None) -> Tensor:
    """SiLU(gate) ⊙ up for x (..., [gate | up]) -> (..., half); with a limit, x is clamped first (`clamped`)."""
    if limit is None and native.serves(x) and torch.is_grad_enabled():
        recorded: Tensor = _SwiGLU.apply(x)
        return recorded
    if limit is not None:
        x = clamped(x, limit)
    if not native.ready(x):
        gate, up = x.chunk(2, dim=-1)
        return F.silu(gate) * up
    x = x.contiguous()
    width = x.size(-1) // 2
    out = x.new_empty(*x.shape[:-1], width)
    native.call("swiglu", x.dtype == torch.bfloat16, x, out, out.numel() // width, width)
    return out


def swiglu_backward(x: Tensor, grad: Tensor, limit: float | None = None) -> tuple[Tensor, Tensor]:
    """The gradient of x (..., [gate | up]) from that of `swiglu` (..., half), and the activation, recomputed."""
    inner = x if limit is None else clamped(x, limit)
    d_x = torch.empty_like(x)
    if limit is None and native.serves(x):
        inner, grad = inner.contiguous(), grad.contiguous()
        out = torch.empty_like(grad)
        width = grad.size(-1)
        native.call("swiglu_backward", x.dtype == torch.bfloat16, inner, grad, d_x, out, grad.numel() // width, width)
        return d_x, out
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
    def forward(ctx: Any, x: Tensor) -> Tensor:
        ctx.save_for_backward(x)
        return swiglu(x)  # autograd is off inside forward, so this does not recurse

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> Tensor:
        (x,) = ctx.saved_tensors
        return swiglu_backward(x, grads[0])[0]
