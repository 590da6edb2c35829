"""Attention in rows that consist of a prefix and documents that all see it, such as a prompt and several answers to it.

The prefix attends to itself once. Documents of equal length share one call, in which the prefix's keys and values are
expanded, so that autograd sums their gradients. Twin: causal attention with the matrix of `documents.masked`.
"""

import torch
from torch import Tensor

from finback.kernels.documents import Prefixed, fused_attention


def prefixed_attention(query: Tensor, key: Tensor, value: Tensor, scale: float, mask: Prefixed) -> Tensor:
    """query (b, h, t, d), key (b, kv, t, d), value (b, kv, t, v), h a multiple of kv -> (b, h, t, v)."""
    rows = zip(query.split(1), key.split(1), value.split(1), mask.rows, strict=True)
    return torch.cat([_row(q, k, v, scale, lengths) for q, k, v, lengths in rows])


def _row(query: Tensor, key: Tensor, value: Tensor, scale: float, lengths: tuple[int, ...]) -> Tensor:
    pieces = [t.split(lengths, dim=2) for t in (query, key, value)]
    (first, *_), (prefix_key, *_), (prefix_value, *_) = pieces
    out = [first] * len(lengths)
    out[0] = fused_attention(first, prefix_key, prefix_value, scale) if lengths[0] else _like(first, value)
    for length in dict.fromkeys(lengths[1:]):
        same = [place for place, other in enumerate(lengths) if other == length and place > 0]
        q, k, v = (torch.cat([piece[place] for place in same]) for piece in pieces)
        k = torch.cat([prefix_key.expand(len(same), -1, -1, -1), k], dim=2)
        v = torch.cat([prefix_value.expand(len(same), -1, -1, -1), v], dim=2)
        for place, made in zip(same, _behind(q, k, v, scale).split(1), strict=True):
            out[place] = made
    return torch.cat(out, dim=2)


def _like(query: Tensor, value: Tensor) -> Tensor:
    """The result of attention for an empty prefix: no tokens, as wide as the values."""
    return query[..., : value.size(-1)]


def _behind(query: Tensor, key: Tensor, value: Tensor, scale: float) -> Tensor:
    """Causal attention of the last t of s tokens: query (b, h, t, d), key (b, kv, s, d), value (b, kv, s, v) -> (b, h, t, v)."""
    new, whole = query.size(2), key.size(2)
    seen = torch.ones(new, whole, dtype=torch.bool, device=query.device).tril(whole - new)
    return fused_attention(query, key, value, scale, seen)
