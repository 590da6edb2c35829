"""Scatters tokens to rows grouped by expert and sums them back; one C++ pass each if a kernel applies, else plain torch."""

from typing import Any

import torch
from torch import Tensor

from finback.kernels import native


def spread(x: Tensor, slots: Tensor, weight: Tensor | None, size: int, choices: int) -> Tensor:
    """Rows (size, d) with x (n, d) at each of its slots (n·k,), times weight (n, k) if given; 0 in unused slots."""
    rows = x.new_zeros(size, x.size(1)) if size > len(slots) else x.new_empty(size, x.size(1))
    if native.serves(x):
        x, weight = x.contiguous(), None if weight is None else weight.float().contiguous()
        native.call("spread", x.dtype == torch.bfloat16, x, slots, weight, rows, len(x), choices, x.size(1))
        return rows
    each = x.repeat_interleave(choices, dim=0)
    if weight is not None:
        each = (weight.to(x.dtype)[:, :, None] * x[:, None]).flatten(0, 1)
    return rows.index_copy_(0, slots, each)


def gather(rows: Tensor, slots: Tensor, weight: Tensor | None, choices: int) -> Tensor:
    """Σ_k of the rows (size, d) at each token's slots (n·k,), times weight (n, k) if given -> (n, d)."""
    tokens, d = len(slots) // choices, rows.size(1)
    if native.serves(rows):
        out, weight = rows.new_empty(tokens, d), None if weight is None else weight.float().contiguous()
        native.call("gather", rows.dtype == torch.bfloat16, rows.contiguous(), slots, weight, out, tokens, choices, d)
        return out
    each = rows[slots].view(tokens, choices, d)
    # not bmm: a product with one row per token costs ten times as much as these two passes
    return each.sum(1) if weight is None else (each * weight.to(rows.dtype)[:, :, None]).sum(1)


def gather_backward(rows: Tensor, slots: Tensor, weight: Tensor, grad: Tensor) -> tuple[Tensor, Tensor]:
    """The gradients of the rows (size, d) and the weights (n, k) from that of `gather` (n, d)."""
    tokens, choices = weight.shape
    d_rows = spread(grad, slots, weight, len(rows), choices)
    if native.serves(rows):
        d_weight = torch.empty_like(weight, dtype=torch.float32, memory_format=torch.contiguous_format)
        sizes = tokens, choices, rows.size(1)
        native.call(
            "weigh", rows.dtype == torch.bfloat16, rows.contiguous(), slots, grad.contiguous(), d_weight, *sizes
        )
        return d_rows, d_weight.to(weight.dtype)
    each = rows[slots].view(tokens, choices, -1)
    return d_rows, (each * grad[:, None]).sum(2, dtype=weight.dtype)


def permute(x: Tensor, slots: Tensor, size: int, choices: int) -> Tensor:
    """`spread` without weights, differentiable."""
    rows: Tensor = _Permute.apply(x, slots, size, choices)
    return rows


def unpermute(rows: Tensor, slots: Tensor, weight: Tensor) -> Tensor:
    """`gather` with weights (n, k), differentiable."""
    sums: Tensor = _Unpermute.apply(rows, slots, weight)
    return sums


class _Permute(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, slots: Tensor, size: int, choices: int) -> Tensor:
        ctx.save_for_backward(slots)
        ctx.choices = choices
        return spread(x, slots, None, size, choices)

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor | None, ...]:
        (slots,) = ctx.saved_tensors
        return gather(grads[0], slots, None, ctx.choices), None, None, None


class _Unpermute(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, rows: Tensor, slots: Tensor, weight: Tensor) -> Tensor:
        ctx.save_for_backward(rows, slots, weight)
        return gather(rows, slots, weight, weight.size(1))

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor | None, ...]:
        rows, slots, weight = ctx.saved_tensors
        d_rows, d_weight = gather_backward(rows, slots, weight, grads[0])
        return d_rows, None, d_weight
