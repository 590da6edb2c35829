"""SwiGLU's activation; in one C++ pass where nothing is recorded for a backward pass."""

import torch
import torch.nn.functional as F
from torch import Tensor

from finback.kernels import native


def swiglu(x: Tensor, limit: float | None = None) -> Tensor:
    """SiLU(gate) ⊙ up for x (..., [gate | up]) -> (..., half); with a limit of what `clamped` makes of x."""
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


def clamped(x: Tensor, limit: float) -> Tensor:
    """x (..., [gate | up]) with gate up to the limit and up between -limit and limit (V4 2.1)."""
    gate, up = x.chunk(2, dim=-1)
    return torch.cat([gate.clamp(max=limit), up.clamp(min=-limit, max=limit)], dim=-1)
