"""Attention of a decoding step in C++, over the pages of the cache. Twin: reference.paged_attention.

The caller checks native.ready first.
"""

from dataclasses import dataclass

import torch
from torch import Tensor

from finback.kernels import native


@dataclass
class PagedRows:
    """The rows of a pass and their entries in one layer's cache: page p holds slots p·size … p·size + size - 1."""

    # (slots, elements)
    entries: Tensor
    # (rows · new,), the slots of the new tokens' entries
    slots: Tensor
    # (rows, pages), each row's pages in order
    table: Tensor
    # (rows,), entries before the first new one
    lengths: Tensor
    # (rows,), the first visible entry; None: all are visible
    starts: Tensor | None
    # slots per page
    size: int


def paged_attention(query: Tensor, rows: PagedRows, groups: int, value_dim: int, value_at: int, scale: float) -> Tensor:
    """As reference.paged_attention, but reads each page once and in place; computes in fp32."""
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
