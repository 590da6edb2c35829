"""Attention of a few new tokens per row over a paged cache: in C++ on a CPU, else by gathering the pages.

The C++ form reads every page once, where it lies; gathering writes and reads it once more. Twin:
reference.paged_attention.
"""

import ctypes

import torch
from torch import Tensor

from finback.kernels import native, reference

FEW = 8  # new tokens per row up to which reading pages in place is faster than one large product


def paged_attention(
    query: Tensor, entries: Tensor, table: Tensor, lengths: Tensor, starts: Tensor | None, size: int,
    groups: int, value_dim: int, value_at: int, scale: float,
) -> Tensor:  # fmt: skip
    """As reference.paged_attention, in fp32 inside; the result has the query's dtype."""
    library = native.library() if query.device.type == "cpu" and query.size(1) <= FEW else None
    if library is None or entries.dtype not in (torch.float32, torch.bfloat16):
        return reference.paged_attention(
            query, entries, table, lengths, starts, size, groups, value_dim, value_at, scale
        )
    rows, new, heads, key_dim = query.shape
    assert entries.stride() == (entries.size(1), 1) and table.dtype == lengths.dtype == torch.int64
    asked, table = query.float().contiguous(), table.contiguous()
    out = asked.new_empty(rows, new, heads, value_dim)
    integers = (rows, new, heads, groups, key_dim, value_dim, entries.size(1), value_at, size, table.size(1))
    library.finback_attend(
        entries.dtype == torch.bfloat16, _at(asked), _at(entries), _at(out), _at(table), _at(lengths),
        None if starts is None else _at(starts), *map(ctypes.c_int64, integers), ctypes.c_float(scale),
    )  # fmt: skip
    return out.to(query.dtype)


def _at(tensor: Tensor) -> ctypes.c_void_p:
    return ctypes.c_void_p(tensor.data_ptr())
