"""Attention of a decoding step in C++, over the pages that hold what is cached. Twin: reference.paged_attention.

The caller asks native.ready first.
"""

from dataclasses import dataclass
from typing import NamedTuple

import torch
from torch import Tensor

from finback.kernels import native


@dataclass
class PagedRows:
    """The rows of a pass and where one layer keeps their entries: page p is slots p·size … p·size + size - 1."""

    # (slots, elements)
    entries: Tensor
    # (rows · new,), where the new tokens' entries go
    slots: Tensor
    # (rows, pages), each row's pages in order
    table: Tensor
    # (rows,), entries before the first new one
    lengths: Tensor
    # (rows,), what lies before is not seen
    starts: Tensor | None
    size: int


class GroupedHeads(NamedTuple):
    """Shape and constants of grouped-query attention."""

    groups: int
    head_dim: int
    eps: float
    scale: float


class LatentHeads(NamedTuple):
    """Shape and constants of MLA; nope, rope and value are sizes of a head's parts."""

    nope: int
    rope: int
    value: int
    interleaved: bool
    eps: float
    scale: float


def paged_attention(query: Tensor, rows: PagedRows, groups: int, value_dim: int, value_at: int, scale: float) -> Tensor:
    """As reference.paged_attention, reading every page once, where it lies; in fp32 inside."""
    count, new, heads, key_dim = query.shape
    asked = query.float().contiguous()
    out = asked.new_empty(count, new, heads, value_dim)
    native.call(
        "attend",
        rows.entries.dtype == torch.bfloat16,
        *(asked, rows.entries, out, rows.table, rows.lengths, rows.starts),
        *(count, new, heads, groups, key_dim, value_dim, rows.entries.size(1), value_at),
        *(rows.size, rows.table.size(1), scale),
    )
    return out.to(query.dtype)


def grouped_query(
    qkv: Tensor, gains: tuple[Tensor, Tensor] | None, cos: Tensor, sin: Tensor, rows: PagedRows, heads: GroupedHeads
) -> Tensor:
    """Norm, rotate, store, attend: qkv (rows, new, (queries + 2 groups) · head_dim) -> (rows, new, queries · head_dim).

    gains are those of the norms over each head's query and key, if it has them.
    """
    qkv = qkv.contiguous()
    count, new = qkv.shape[:2]
    queries = qkv.size(2) // heads.head_dim - 2 * heads.groups
    out = qkv.new_empty(count, new, queries * heads.head_dim)
    query_gain, key_gain = (None, None) if gains is None else (gains[0].float(), gains[1].float())
    native.call(
        "grouped_query",
        qkv.dtype == torch.bfloat16,
        *(qkv, rows.entries, out, rows.slots, rows.table, rows.lengths, rows.starts, cos, sin, query_gain, key_gain),
        *(count, new, queries, heads.groups, heads.head_dim, rows.size, rows.table.size(1), heads.eps, heads.scale),
    )
    return out


def latent(
    q: Tensor, kv: Tensor, up: Tensor, gain: Tensor, cos: Tensor, sin: Tensor, rows: PagedRows, heads: LatentHeads
) -> Tensor:
    """Norm, rotate, store and attend for MLA in absorbed form -> (rows, new, queries · value).

    q (rows, new, queries · (nope + rope)), kv (rows, new, latent + rope), up (queries · (nope + value), latent).
    """
    nope, rope, value, interleaved, eps, scale = heads
    q, kv, gain = q.contiguous(), kv.contiguous(), gain.float()
    count, new = q.shape[:2]
    queries = q.size(2) // (nope + rope)
    out = q.new_empty(count, new, queries * value)
    native.call(
        "latent",
        q.dtype == torch.bfloat16,
        *(q, kv, up, rows.entries, out, rows.slots, rows.table, rows.lengths, rows.starts, cos, sin, gain),
        *(interleaved, count, new, queries, nope, rope, value, up.size(1), rows.size, rows.table.size(1), eps, scale),
    )
    return out
