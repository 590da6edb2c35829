"""Plain twins: the readable form of every fast kernel, used as its test's oracle."""

import torch
import torch.nn.functional as F
from torch import Tensor


def routed_experts(x: Tensor, index: Tensor, weight: Tensor, gate_up: Tensor, down: Tensor) -> Tensor:
    """Σ_k weight[n, k] · SwiGLU_{index[n, k]}(x[n]), one expert after the other (V3 eq. 12).

    x (n, d); index and weight (n, k); gate_up (experts, 2m, d), gate rows first; down (experts, d, m).
    """
    out = torch.zeros_like(x)
    for expert in range(gate_up.size(0)):
        rows, slot = torch.where(index == expert)
        gate, up = F.linear(x[rows], gate_up[expert]).chunk(2, dim=-1)
        y = F.linear(F.silu(gate) * up, down[expert])
        out = out.index_add(0, rows, y * weight[rows, slot, None])
    return out


def causal_attention(query: Tensor, key: Tensor, value: Tensor, scale: float) -> Tensor:
    """softmax(scale · q k^T, causal) v, spelled out; query and key (b, h, t, d), value (b, h, t, v)."""
    length = query.size(2)
    future = torch.ones(length, length, dtype=torch.bool, device=query.device).triu(1)
    scores = (query @ key.transpose(2, 3)).float() * scale
    return scores.masked_fill(future, float("-inf")).softmax(dim=-1).to(value.dtype) @ value


def rms_norm(x: Tensor, gain: Tensor, eps: float) -> Tensor:
    """gain ⊙ x / sqrt(mean(x²) + eps) over the last dimension; statistics in fp32."""
    wide = x.float()
    return (wide * (wide.square().mean(dim=-1, keepdim=True) + eps).rsqrt() * gain.float()).to(x.dtype)
