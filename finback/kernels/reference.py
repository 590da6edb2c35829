"""Plain twins: a readable form of every fast kernel, which is the oracle of its tests."""

from collections.abc import Callable

import torch
import torch.nn.functional as F
from torch import Tensor

from finback.kernels import fp8, quants
from finback.kernels.decode import PagedRows


def routed_experts(
    x: Tensor, index: Tensor, weight: Tensor, gate_up: Tensor, down: Tensor, limit: float | None = None
) -> Tensor:
    """Σ_k weight[n, k] · SwiGLU_{index[n, k]}(x[n]), one expert after another (V3 eq. 12).

    x (n, d); index and weight (n, k); gate_up (experts, 2m, d), gate rows first; down (experts, d, m). With a limit, gate is
    clamped to at most limit, and up to -limit … limit (V4 2.1).
    """
    out = torch.zeros_like(x)
    for expert in range(gate_up.size(0)):
        rows, slot = torch.where(index == expert)
        gate, up = F.linear(x[rows], gate_up[expert]).chunk(2, dim=-1)
        if limit is not None:
            gate, up = gate.clamp(max=limit), up.clamp(min=-limit, max=limit)
        y = F.linear(F.silu(gate) * up, down[expert])
        out = out.index_add(0, rows, y * weight[rows, slot, None])
    return out


def causal_attention(query: Tensor, key: Tensor, value: Tensor, scale: float) -> Tensor:
    """softmax(scale · q k^T, causal) v; query and key (b, h, t, d), value (b, h, t, v) -> (b, h, t, v)."""
    length = query.size(2)
    future = torch.ones(length, length, dtype=torch.bool, device=query.device).triu(1)
    scores = (query @ key.transpose(2, 3)).float() * scale
    return scores.masked_fill(future, float("-inf")).softmax(dim=-1).to(value.dtype) @ value


def rms_norm(x: Tensor, gain: Tensor, eps: float) -> Tensor:
    """gain ⊙ x / sqrt(mean(x²) + eps) over the last dimension; statistics in fp32."""
    fp32 = x.float()
    return (fp32 * (fp32.square().mean(dim=-1, keepdim=True) + eps).rsqrt() * gain.float()).to(x.dtype)


def paged_attention(query: Tensor, rows: PagedRows, groups: int, value_dim: int, value_at: int, scale: float) -> Tensor:
    """Attention of the new tokens of each row over the entries in its pages -> (rows, new, heads, value_dim).

    query (rows, new, heads, key_dim); the entries of the new tokens are stored already. Heads form `groups`: the key of
    group g starts at element g·key_dim of an entry, its value at value_at + g·value_dim.
    """
    new, heads, key_dim = query.shape[1:]
    stored = gather_pages(rows).to(query.dtype)
    slot = torch.arange(stored.size(1), device=query.device)
    seen = slot <= rows.lengths[:, None, None] + torch.arange(new, device=query.device)[:, None]
    if rows.starts is not None:
        seen = seen & (slot >= rows.starts[:, None, None])
    keys = stored[:, :, : groups * key_dim].unflatten(2, (groups, key_dim))
    values = stored[:, :, value_at : value_at + groups * value_dim].unflatten(2, (groups, value_dim))
    grouped = query.unflatten(2, (groups, heads // groups))
    scores = torch.einsum("btghk,bsgk->bghts", grouped, keys).float() * scale
    weights = scores.masked_fill(~seen[:, None, None], float("-inf")).softmax(dim=-1).to(query.dtype)
    return torch.einsum("bghts,bsgv->btghv", weights, values).flatten(2, 3)


def gather_pages(rows: PagedRows, start: int = 0) -> Tensor:
    """The rows' entries in order, each from element `start` on: (rows, pages · size, elements - start)."""
    return rows.entries[:, start:].unflatten(0, (-1, rows.size))[rows.table].flatten(1, 2)


def exact_sum(a: Tensor, b: Tensor) -> Tensor:
    """a (m, k) · b (n, k)^T in fp32, in which products of E4M3 numbers are exact and only their sum rounds."""
    return a @ b.T


def fp8_product(
    a: Tensor, a_scale: Tensor, b: Tensor, b_scale: Tensor, accumulate: Callable[[Tensor, Tensor], Tensor] = exact_sum
) -> Tensor:
    """a (m, k) · b (n, k)^T of E4M3 values in fp32, promoted every 128 of k (V3 3.3.2, figure 7b) -> (m, n).

    Factors are per 128 of k, and per row, (m, ⌈k/128⌉), or per 128 rows, (⌈m/128⌉, ⌈k/128⌉). `accumulate` computes the
    partial sum over 128 of k, which is multiplied by both factors and added to the total in fp32.
    """
    left, right = _per_row(a_scale, a.size(0)), _per_row(b_scale, b.size(0))
    out = torch.zeros(a.size(0), b.size(0), device=a.device)
    for tile in range(fp8.blocks(a.size(1))):
        part = slice(tile * fp8.BLOCK, (tile + 1) * fp8.BLOCK)
        partial = accumulate(a[:, part].float(), b[:, part].float())
        out += partial * left[:, tile, None] * right[:, tile]
    return out


def quantized_product(x: Tensor, matrix: Tensor) -> Tensor:
    """x (..., k), rounded to 8 bits with a factor per GROUP numbers, · matrix (n, k)^T -> (..., n) in fp32."""
    groups = x.float().unflatten(-1, (-1, quants.GROUP))
    largest = groups.abs().amax(-1, keepdim=True)
    whole = (groups * torch.where(largest > 0, 127 / largest, 0)).round()
    return (whole * (largest / 127)).flatten(-2) @ matrix.float().T


def _per_row(scale: Tensor, rows: int) -> Tensor:
    """Factors per row, from factors per row or per 128 rows."""
    return scale if scale.size(0) == rows else scale.repeat_interleave(fp8.BLOCK, dim=0)[:rows]
