"""Causal attention for training and prompts; short rows on a CPU use batched products with a hand-written backward pass.

Against scaled_dot_product_attention on rows of 128 tokens and one core, that form is 2 to 5 times faster in bf16 and 1.2
times in fp32 (docs/log.md). It stores the whole matrix of scores, so it serves rows of at most LONGEST tokens; longer
rows use the fused kernel. Twin: reference.causal_attention.
"""

from collections.abc import Callable
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from finback.kernels import native
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
SHORTEST = 64  # where heads share keys
WIDER = 8  # dimensions added for sinks, of which one is used: kernels are fastest at multiples of 8
SCORES = 2**24  # most scores, over all heads, that a block of queries holds in memory

# query (b, h, t, d), key (b, kv, t, d), value (b, kv, t, v), scale, mask -> (b, h, t, v)
Attention = Callable[[Tensor, Tensor, Tensor, float, Mask], Tensor]


def causal_attention(query: Tensor, key: Tensor, value: Tensor, scale: float, mask: Mask = None) -> Tensor:
    """softmax(scale · q k^T, causal) v with query (b, h, t, d), key (b, kv, t, d), value (b, kv, t, v) -> (b, h, t, v).

    A mask is needed only for rows of several documents.
    """
    dense = mask is None or isinstance(mask, Tensor)
    if dense and query.device.type == "cpu" and stores_scores(query.dtype, query.size(2), query.size(1) != key.size(1)):
        return _CausalAttention.apply(query, key, value, scale, mask)
    return torch_attention(query, key, value, scale, mask)


def stores_scores(dtype: torch.dtype, length: int, is_shared: bool) -> bool:
    """Whether rows of this length take the form that stores scores, on a CPU; is_shared: several heads share a key."""
    # where heads share keys, torch's kernel is as fast in fp32 and faster for few tokens
    gains = not is_shared or (dtype == torch.bfloat16 and length >= SHORTEST)
    return gains and length <= LONGEST


def torch_attention(query: Tensor, key: Tensor, value: Tensor, scale: float, mask: Mask = None) -> Tensor:
    """`causal_attention` by torch's kernels alone; heads may share keys, and a mask (b, t, s) may have more keys than queries."""
    if isinstance(mask, Windowed):
        mask = unwindowed(mask, query.size(2), query.device)
    if isinstance(mask, Documents):
        return document_attention(query, key, value, scale, mask)
    if isinstance(mask, Prefixed):
        return prefixed_attention(query, key, value, scale, mask)
    if mask is None:
        return fused_attention(query, key, value, scale)
    assert isinstance(mask, Tensor), "windows do not nest"
    return F.scaled_dot_product_attention(query, key, value, mask[:, None], scale=scale, enable_gqa=True)


def sink_attention(query: Tensor, entries: Tensor, sink: Tensor, scale: float, seen: Tensor) -> Tensor:
    """Attention whose softmax has one more score per head, sink (h,), without a value (V4 2.3.3).

    query (b, h, t, c), entries (b, s, c), which are keys and values of all heads, seen (b, t, s) -> (b, h, t, c).
    """
    scores = torch.einsum("bhtc,bsc->bhts", query, entries).float() * scale
    scores = scores.masked_fill(~seen[:, None], float("-inf"))
    sinks = sink.float()[None, :, None, None].expand(*scores.shape[:3], 1)
    weights = torch.cat([scores, sinks], dim=-1).softmax(dim=-1)[..., :-1]
    return torch.einsum("bhts,bsc->bhtc", weights.to(entries.dtype), entries)


def with_sinks(
    core: Attention, query: Tensor, key: Tensor, value: Tensor, scale: float, mask: Mask, sink: Tensor
) -> Tensor:
    """Attention by `core` whose softmax has one more score per head, sink (h,), without a value; shapes as in `Attention`.

    A key with value 0 precedes each document. Its score comes from one more dimension, in which queries hold the sink, this
    key 1 and all other keys 0. So every form of attention supports sinks without a matrix of scores. Twin: sink_attention.
    """
    if isinstance(mask, Windowed):
        mask = unwindowed(mask, query.size(2), query.device)
    asked = (sink / scale).to(query.dtype)[None, :, None, None].expand(*query.shape[:3], 1)
    query = F.pad(torch.cat([query, asked], dim=-1), (0, WIDER - 1))
    key, width = F.pad(key, (0, WIDER)), key.size(-1)
    if isinstance(mask, Documents):
        return _each_with_sink(core, query, key, value, scale, mask.lengths, width)
    key, value = _led(key, width), F.pad(value, (0, 0, 1, 0))
    if isinstance(mask, Tensor):
        return core(query, key, value, scale, F.pad(mask, (1, 0), value=True))
    if isinstance(mask, Prefixed):
        mask = Prefixed(tuple((row[0] + 1, *row[1:]) for row in mask.rows))
    return core(F.pad(query, (0, 0, 1, 0)), key, value, scale, mask)[:, :, 1:]


def _led(key: Tensor, width: int) -> Tensor:
    """Prepends the sink's key to key (b, kv, t, d): 1 in dimension `width`, 0 elsewhere."""
    first = torch.zeros_like(key[:, :, :1])
    first[..., width] = 1
    return torch.cat([first, key], dim=2)


def _each_with_sink(
    core: Attention, query: Tensor, key: Tensor, value: Tensor, scale: float, lengths: tuple[int, ...], width: int
) -> Tensor:
    """`with_sinks` for documents: all of them become one row, each preceded by a sink's key."""
    rows, tokens = query.size(0), sum(lengths)
    sizes = torch.tensor(lengths, device=query.device)
    number = torch.arange(len(lengths), device=query.device).repeat_interleave(sizes)
    place = torch.arange(tokens, device=query.device) + number + 1
    first = sizes.cumsum(0) - sizes + torch.arange(len(lengths), device=query.device)

    def spaced(x: Tensor) -> Tensor:
        flat = x.transpose(1, 2).flatten(0, 1)
        return flat.new_zeros(tokens + len(lengths), *flat.shape[1:]).index_copy(0, place, flat)

    q, k, v = (spaced(x) for x in (query, key, value))
    k[first, :, width] = 1
    q, k, v = (x.transpose(0, 1)[None] for x in (q, k, v))
    out = core(q, k, v, scale, Documents(tuple(n + 1 for n in lengths)))
    return out[0].transpose(0, 1)[place].unflatten(0, (rows, -1)).transpose(1, 2)


class _CausalAttention(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any, query: Tensor, key: Tensor, value: Tensor, scale: float, attention_mask: Tensor | None
    ) -> Tensor:
        heads, length = query.shape[1:3]
        k, v = key.flatten(0, 1), value.flatten(0, 1)
        q = query.reshape(k.size(0), -1, query.size(-1))  # the queries of heads that share keys adjoin
        scores = torch.bmm(q, k.transpose(1, 2))
        weights = _causal_softmax(scores.view(-1, length, length), heads, scale, attention_mask).view_as(scores)
        ctx.save_for_backward(q, k, v, weights)
        ctx.scale, ctx.shapes = scale, [t.shape for t in (query, key, value)]
        return torch.bmm(weights, v).view(*query.shape[:3], -1)

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor | None, ...]:
        q, k, v, weights = ctx.saved_tensors
        grad = grads[0].reshape(*q.shape[:2], -1)
        d_v = torch.bmm(weights.transpose(1, 2), grad)
        d_scores = _softmax_backward(torch.bmm(grad, v.transpose(1, 2)), weights, ctx.scale)
        given = torch.bmm(d_scores, k), torch.bmm(d_scores.transpose(1, 2), q), d_v
        return (*(t.view(shape) for t, shape in zip(given, ctx.shapes, strict=True)), None, None)


def _causal_softmax(scores: Tensor, heads: int, scale: float, mask: Tensor | None) -> Tensor:
    """softmax(scale · scores) over visible keys, scores (b·h, t, t), mask (b, t, t); in place if a C++ kernel applies."""
    rows, length = scores.shape[:2]
    if native.serves(scores):
        seen = None if mask is None else mask.expand(rows // heads, -1, -1).contiguous()
        native.call("causal_softmax", scores.dtype == torch.bfloat16, scores, seen, rows, heads, length, scale)
        return scores
    if mask is None:
        hidden = torch.ones(length, length, dtype=torch.bool, device=scores.device).triu(1)
    else:
        hidden = (~mask).repeat_interleave(heads, dim=0)
    return scores.float().mul_(scale).masked_fill_(hidden, float("-inf")).softmax(dim=-1).to(scores.dtype)


def _softmax_backward(grad: Tensor, weights: Tensor, scale: float) -> Tensor:
    """The gradient of the scores from that of `_causal_softmax`, in place: scale · p ⊙ (dp - Σ dp ⊙ p)."""
    if native.serves(grad):
        length = grad.size(-1)
        native.call(
            "softmax_backward", grad.dtype == torch.bfloat16, weights, grad, grad.numel() // length, length, scale
        )
        return grad
    along = torch.linalg.vecdot(grad.float(), weights.float()).to(grad.dtype)[..., None]
    return grad.sub_(along).mul_(weights).mul_(scale)
