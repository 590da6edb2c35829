"""Routed experts over contiguous blocks of rows, one block per expert, with a hand-written backward pass.

Element-wise operations run once over the rows of all experts instead of once per expert, and autograd records nothing in
between. The products are a loop over experts, or torch's grouped_mm, which does not read the counts on the host and so
does not wait for a GPU. Twin: reference.routed_experts.
"""

from collections.abc import Callable
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from finback.kernels import native
from finback.kernels.permutation import gather, gather_backward, spread
from finback.kernels.swiglu import swiglu, swiglu_backward

# blocks are rounded up to a multiple of this many rows in bf16 on a CPU; see routed_experts
BLOCK_MULTIPLE = 32
FEW = 32  # up to this many tokens, the C++ kernel that takes rows one by one is faster than a product per expert
# x (n, d), index and weight (n, k), gate_up (e, 2m, d), down (e, d, m) -> (n, d)
Experts = Callable[[Tensor, Tensor, Tensor, Tensor, Tensor], Tensor]
Blocks = list[tuple[int, int, int]]  # (expert, first row, last row + 1)


def routed_experts(
    x: Tensor, index: Tensor, weight: Tensor, gate_up: Tensor, down: Tensor, limit: float | None = None
) -> Tensor:
    """As reference.routed_experts: x (n, d), index and weight (n, k), gate_up (e, 2m, d), down (e, d, m) -> (n, d)."""
    is_native = limit is None and native.ready(x) and gate_up.dtype == down.dtype and gate_up.dtype in native.DTYPES
    if len(x) <= FEW and is_native:
        return _native(x, index, weight, gate_up, down)
    # oneDNN compiles a kernel for every new shape of a bf16 product, so training rounds shapes up
    by_shape = x.dtype == torch.bfloat16 and x.device.type == "cpu" and torch.is_grad_enabled()
    return _GroupedExperts.apply(x, index, weight, gate_up, down, BLOCK_MULTIPLE if by_shape else 1, limit)


def grouped_experts(x: Tensor, index: Tensor, weight: Tensor, gate_up: Tensor, down: Tensor) -> Tensor:
    """As routed_experts, with one call of grouped_mm for the products of all experts; `fits_grouped` must hold."""
    if len(x) <= FEW and native.ready(x):
        return routed_experts(x, index, weight, gate_up, down)
    return _GroupedExperts.apply(x, index, weight, gate_up, down, None, None)


def fits_grouped(hidden: int, width: int, dtype: torch.dtype) -> bool:
    """Whether rows of these sizes start at multiples of 16 bytes, as grouped_mm requires."""
    return all(size * dtype.itemsize % 16 == 0 for size in (hidden, width))


def _native(x: Tensor, index: Tensor, weight: Tensor, gate_up: Tensor, down: Tensor) -> Tensor:
    """The C++ form for few tokens: it reads each expert's weights once and moves no rows."""
    tokens, choices = index.shape
    width, size = down.size(2), x.size(1)
    fp32, weight, index = x.float().contiguous(), weight.float().contiguous(), index.contiguous()
    out, hidden = torch.empty_like(fp32), fp32.new_empty(tokens * choices, width)
    native.call(
        "experts",
        gate_up.dtype == torch.bfloat16,
        *(fp32, index, weight, gate_up, down, out, hidden),
        *(tokens, choices, size, width),
    )
    return out.to(x.dtype)


class _GroupedExperts(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any,
        x: Tensor,
        index: Tensor,
        weight: Tensor,
        gate_up: Tensor,
        down: Tensor,
        multiple: int | None,
        limit: float | None,
    ) -> Tensor:
        """`multiple` rounds the loop's blocks of rows; None uses one grouped product instead of the loop."""
        k = index.size(1)
        blocks: Blocks | Tensor
        if multiple is None:
            rounded = 16 // x.element_size()
            slots, _, ends = _places(index, gate_up.size(0), rounded, least=1)
            # an upper bound on the rows: reading the exact number would wait for the device
            blocks, size = ends.int(), index.numel() + gate_up.size(0) * rounded
        else:
            slots, looped = layout(index, gate_up.size(0), multiple)
            blocks, size = looped, looped[-1][2]
        w_in, w_out = gate_up.to(x.dtype), down.to(x.dtype)
        rows = spread(x, slots, None, size, k)
        hidden = per_expert(rows, w_in.transpose(1, 2), blocks)
        y = per_expert(swiglu(hidden, limit), w_out.transpose(1, 2), blocks)
        ctx.save_for_backward(rows, slots, hidden, y, weight, w_in, w_out)
        ctx.blocks, ctx.limit, ctx.dtype = blocks, limit, gate_up.dtype
        return gather(y, slots, weight, k)

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor | None, ...]:
        rows, slots, hidden, y, weight, w_in, w_out = ctx.saved_tensors
        blocks = ctx.blocks
        d_y, d_weight = gather_backward(y, slots, weight, grads[0])
        d_hidden, act = swiglu_backward(hidden, per_expert(d_y, w_out, blocks), ctx.limit)
        d_down = outer_per_expert(d_y, act, blocks, w_out).to(ctx.dtype)
        d_gate_up = outer_per_expert(d_hidden, rows, blocks, w_in).to(ctx.dtype)
        d_x = gather(per_expert(d_hidden, w_in, blocks), slots, None, weight.size(1))
        return d_x, None, d_weight, d_gate_up, d_down, None, None


def layout(index: Tensor, experts: int, multiple: int) -> tuple[Tensor, Blocks]:
    """The slot of each (token, choice) when rows are grouped by expert, (n·k,), and each expert's block of rows.

    Reads the counts on the host and so waits for the device once.
    """
    slots, sizes, ends = _places(index, experts, multiple, least=0)
    blocks = [(e, end - size, end) for e, (size, end) in enumerate(zip(sizes.tolist(), ends.tolist(), strict=True))]
    return slots, [block for block in blocks if block[1] < block[2]]


def _places(index: Tensor, experts: int, multiple: int, least: int) -> tuple[Tensor, Tensor, Tensor]:
    """Slots (n·k,), and size and end of each expert's block of rows (experts,).

    Sizes are multiples of `multiple`. With `least` 1 no block is empty, so that grouped_mm writes a zero gradient for an
    expert without tokens.
    """
    flat = index.flatten()
    counts = flat.new_zeros(experts).scatter_add_(0, flat, torch.ones_like(flat))  # bincount waits for a GPU
    sizes = (counts.clamp(min=least) + multiple - 1) // multiple * multiple
    ends, first = sizes.cumsum(0), counts.cumsum(0) - counts
    order = flat.argsort(stable=True)
    shift = ends - sizes - first  # from "sorted without gaps" to "sorted with gaps"
    slots = torch.empty_like(order)
    slots[order] = torch.arange(len(flat), device=flat.device) + shift[flat[order]]
    return slots, sizes, ends


def per_expert(rows: Tensor, weights: Tensor, blocks: Blocks | Tensor) -> Tensor:
    """rows (m, a) · weights[e] (a, b) with the expert e of each block of rows -> (m, b).

    `blocks` are those of `layout`, or the end of each block for one grouped product, which leaves rows after the last
    block undefined.
    """
    if isinstance(blocks, Tensor):
        return F.grouped_mm(rows, weights, offs=blocks)
    out = rows.new_empty(rows.size(0), weights.size(2))
    for expert, start, stop in blocks:
        torch.mm(rows[start:stop], weights[expert], out=out[start:stop])
    return out


def outer_per_expert(left: Tensor, right: Tensor, blocks: Blocks | Tensor, like: Tensor) -> Tensor:
    """Σ over each expert's rows of left ⊗ right -> (experts, a, b), the gradient of weights with that shape."""
    if isinstance(blocks, Tensor):
        return F.grouped_mm(left.T, right, offs=blocks)
    out = torch.zeros(like.shape, dtype=left.dtype, device=left.device)
    for expert, start, stop in blocks:
        torch.mm(left[start:stop].T, right[start:stop], out=out[expert])
    return out
