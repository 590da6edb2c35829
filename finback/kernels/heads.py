"""Lays out queries, keys and values by head for attention over whole rows.

Rotating, splitting, joining and transposing are one C++ pass if a kernel applies, else plain torch.
"""

from typing import Any

import torch
from torch import Tensor

from finback.kernels import native


def rotate_interleaved(x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    """Rotates pairs (0,1), (2,3), … of x (..., rope_dim); cos and sin broadcast against (..., rope_dim / 2).

    The result is laid out [first of each pair | second of each pair]. Queries and keys share this permutation, so scores
    equal the paper's without interleaving again.
    """
    even, odd = x[..., 0::2], x[..., 1::2]
    return torch.cat([even * cos - odd * sin, even * sin + odd * cos], dim=-1)


def rotate_half(x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    """Rotates pairs (i, i + rope_dim / 2) of x (..., rope_dim), the layout of Llama and Qwen weights."""
    first, second = x.chunk(2, dim=-1)
    return torch.cat([first * cos - second * sin, first * sin + second * cos], dim=-1)


def rotate_heads(q: Tensor, cos: Tensor, sin: Tensor, interleaved: bool) -> Tensor:
    """q (b, t, h, n + r) -> (b, h, t, n + r) with the last r dimensions rotated; cos and sin (b or 1, t, r / 2).

    Pairs are (2i, 2i + 1) if `interleaved`, else (i, i + r / 2). The result is laid out as in `rotate_interleaved`.
    """
    if native.serves(q):
        laid: Tensor = _RotateHeads.apply(q, cos.float(), sin.float(), interleaved)
        return laid
    plain, rotated = q.split([q.size(-1) - 2 * cos.size(-1), 2 * cos.size(-1)], dim=-1)
    cos, sin = (t[:, :, None].to(q.dtype) for t in (cos, sin))
    turned = (rotate_interleaved if interleaved else rotate_half)(rotated, cos, sin)
    return (torch.cat([plain, turned], dim=-1) if plain.size(-1) else turned).transpose(1, 2)


def split_heads(kv: Tensor, rotated: Tensor, plain: int) -> tuple[Tensor, Tensor]:
    """kv (b, t, h, n + v), rotated (b, t, r), the key part that all heads share, n -> keys (b, h, t, n + r), values (b, h, t, v)."""
    if native.serves(kv) and kv.dtype == rotated.dtype:
        both: tuple[Tensor, Tensor] = _SplitHeads.apply(kv, rotated, plain)
        return both
    k, value = kv.split([plain, kv.size(-1) - plain], dim=-1)
    shared = rotated[:, :, None].expand(-1, -1, kv.size(2), -1)
    return torch.cat([k, shared], dim=-1).transpose(1, 2), value.transpose(1, 2)


class _RotateHeads(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, q: Tensor, cos: Tensor, sin: Tensor, interleaved: bool) -> Tensor:
        ctx.angles, ctx.interleaved = (cos.contiguous(), sin.contiguous()), interleaved
        rows, tokens, heads, size = q.shape
        return _rotate(q, q.new_empty(rows, heads, tokens, size), ctx.angles, interleaved, backward=False)

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor | None, ...]:
        rows, heads, tokens, size = grads[0].shape
        to = grads[0].new_empty(rows, tokens, heads, size)
        return _rotate(grads[0], to, ctx.angles, ctx.interleaved, backward=True), None, None, None


def _rotate(x: Tensor, to: Tensor, angles: tuple[Tensor, Tensor], interleaved: bool, backward: bool) -> Tensor:
    rows, tokens, heads, size = to.shape if backward else x.shape
    rotated, each = 2 * angles[0].size(-1), angles[0][0].numel() if len(angles[0]) > 1 else 0
    sizes = rows, tokens, heads, size - rotated, rotated, each
    native.call("rotate_heads", x.dtype == torch.bfloat16, x.contiguous(), to, *angles, *sizes, interleaved, backward)
    return to


class _SplitHeads(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, kv: Tensor, rotated: Tensor, plain: int) -> tuple[Tensor, Tensor]:
        rows, tokens, heads, both = kv.shape
        ctx.sizes = rows, tokens, heads, plain, rotated.size(-1), both - plain
        key, value = (kv.new_empty(rows, heads, tokens, n) for n in (plain + rotated.size(-1), both - plain))
        given = kv.contiguous(), rotated.contiguous()
        native.call("split_heads", kv.dtype == torch.bfloat16, *given, key, value, *ctx.sizes)
        return key, value

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor | None, ...]:
        rows, tokens, heads, plain, rotated, value = ctx.sizes
        key = grads[0]
        d_kv, d_rotated = key.new_empty(rows, tokens, heads, plain + value), key.new_empty(rows, tokens, rotated)
        given = [grad.contiguous() for grad in grads]
        native.call("split_heads_backward", key.dtype == torch.bfloat16, *given, d_kv, d_rotated, *ctx.sizes)
        return d_kv, d_rotated, None
