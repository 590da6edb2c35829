"""Causal attention of training and of prompts; over short rows on a CPU by batched products, forward and backward by hand.

Measured at 128-token rows, one core, against scaled_dot_product_attention: bf16 2 to 5 times faster, fp32 1.2 times
(docs/log.md). The matrix of scores is stored whole, so this is for rows of at most LONGEST tokens; longer
ones take the fused kernel. Twin: reference.causal_attention.
"""

from collections.abc import Callable
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from finback.kernels.documents import (
    Documents,
    Mask,
    Prefixed,
    Windowed,
    document_attention,
    fused_attention,
    unwindowed,
)
from finback.kernels.prefixes import prefixed_attention

LONGEST = 512
SCORES = 2**24  # of all heads, that a block of queries may have in memory at once

# query (b, h, t, d), key (b, kv, t, d), value (b, kv, t, v), scale, mask -> (b, h, t, v)
Attention = Callable[[Tensor, Tensor, Tensor, float, Mask], Tensor]


def causal_attention(query: Tensor, key: Tensor, value: Tensor, scale: float, mask: Mask = None) -> Tensor:
    """softmax(scale · q k^T, causal) v with query and key (b, h, t, d), value (b, h, t, v) -> (b, h, t, v).

    A mask is for rows of several documents.
    """
    dense = mask is None or isinstance(mask, Tensor)
    if dense and query.device.type == "cpu" and query.size(2) <= LONGEST:
        return _CausalAttention.apply(query, key, value, scale, mask)
    return torch_attention(query, key, value, scale, mask)


def torch_attention(query: Tensor, key: Tensor, value: Tensor, scale: float, mask: Mask = None) -> Tensor:
    """The same by torch's kernels alone; queries may share keys, and a mask (b, t, s) may cover more keys than queries."""
    if isinstance(mask, Windowed):
        mask = unwindowed(mask, query.size(2), query.device)
    if isinstance(mask, Documents):
        return document_attention(query, key, value, scale, mask)
    if isinstance(mask, Prefixed):
        return prefixed_attention(query, key, value, scale, mask)
    if mask is None:
        return fused_attention(query, key, value, scale)
    assert isinstance(mask, Tensor), "a window lies in no other"
    return F.scaled_dot_product_attention(query, key, value, mask[:, None], scale=scale, enable_gqa=True)


def sink_attention(query: Tensor, entries: Tensor, sink: Tensor, scale: float, seen: Tensor) -> Tensor:
    """Attention whose softmax has one more score per head, sink (h,), that has no value (V4 2.3.3).

    query (b, h, t, c), entries (b, s, c), keys and values of all heads, seen (b, t, s) -> (b, h, t, c).
    """
    scores = torch.einsum("bhtc,bsc->bhts", query, entries).float() * scale
    scores = scores.masked_fill(~seen[:, None], float("-inf"))
    sinks = sink.float()[None, :, None, None].expand(*scores.shape[:3], 1)
    weights = torch.cat([scores, sinks], dim=-1).softmax(dim=-1)[..., :-1]
    return torch.einsum("bhts,bsc->bhtc", weights.to(entries.dtype), entries)


class _CausalAttention(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any, query: Tensor, key: Tensor, value: Tensor, scale: float, attention_mask: Tensor | None
    ) -> Tensor:
        q, k, v = (t.flatten(0, 1) for t in (query, key, value))
        length = q.size(1)
        if attention_mask is None:
            hidden = torch.ones(length, length, dtype=torch.bool, device=q.device).triu(1)
        else:
            hidden = (~attention_mask).repeat_interleave(query.size(1), dim=0)
        scores = torch.bmm(q, k.transpose(1, 2)).float().mul_(scale).masked_fill_(hidden, float("-inf"))
        weights = scores.softmax(dim=-1).to(q.dtype)
        out = torch.bmm(weights, v)
        ctx.save_for_backward(q, k, v, weights, out)
        ctx.scale = scale
        return out.view(*query.shape[:2], length, -1)

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor | None, ...]:
        q, k, v, weights, out = ctx.saved_tensors
        shape = grads[0].shape[:2]
        grad = grads[0].flatten(0, 1)
        d_v = torch.bmm(weights.transpose(1, 2), grad)
        # d softmax: p ⊙ (dp - Σ dp ⊙ p), and Σ dp ⊙ p = Σ grad ⊙ out
        inner = (grad * out).sum(dim=-1, keepdim=True)
        d_scores = torch.bmm(grad, v.transpose(1, 2)).sub_(inner).mul_(weights).mul_(ctx.scale)
        d_q = torch.bmm(d_scores, k)
        d_k = torch.bmm(d_scores.transpose(1, 2), q)
        return (*(t.unflatten(0, shape) for t in (d_q, d_k, d_v)), None, None)
