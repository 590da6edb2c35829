"""What mHC computes per token (V4 2.2): a doubly stochastic matrix, and mixtures of residual streams.

Both are dozens of operations on matrices of 4 x 4 numbers; one C++ pass each, forward and backward, if a kernel applies.
The plain twins are `_sinkhorn` and `_mix`.
"""

from typing import Any

import torch
from torch import Tensor

from finback.kernels import native


def sinkhorn(logits: Tensor, steps: int, eps: float) -> Tensor:
    """A doubly stochastic matrix from logits (..., n, n) in fp32, by dividing rows and columns by their sums in turn."""
    if logits.dtype != torch.float32 or not native.serves(logits):
        return _sinkhorn(logits, steps, eps)
    found: Tensor = _Sinkhorn.apply(logits, steps, eps)
    return found


def mix(shares: Tensor, streams: Tensor, given: Tensor | None = None, made: Tensor | None = None) -> Tensor:
    """Σ_i shares[i, j] · streams[i] + given[j] · made, for each j.

    shares (b, t, n, m), given (b, t, m), both fp32; streams (b, t, n, d), made (b, t, d) -> (b, t, m, d) in the streams' dtype.
    """
    fits = shares.dtype == torch.float32 and (made is None or made.dtype == streams.dtype)
    if not fits or not native.serves(streams):
        return _mix(shares, streams, given, made)
    found: Tensor = _Mix.apply(shares, streams, given, made)
    return found


def _sinkhorn(logits: Tensor, steps: int, eps: float) -> Tensor:
    matrix = logits.softmax(dim=-1) + eps
    matrix = matrix / (matrix.sum(dim=-2, keepdim=True) + eps)
    for _ in range(steps - 1):
        matrix = matrix / (matrix.sum(dim=-1, keepdim=True) + eps)
        matrix = matrix / (matrix.sum(dim=-2, keepdim=True) + eps)
    return matrix


def _mix(shares: Tensor, streams: Tensor, given: Tensor | None, made: Tensor | None) -> Tensor:
    if shares.size(-1) == 1:
        mixed = (shares * streams).sum(dim=2, keepdim=True).to(streams.dtype)
    else:
        mixed = shares.to(streams.dtype).transpose(-1, -2) @ streams
    if given is None or made is None:
        return mixed
    return given.to(streams.dtype)[..., None] * made[..., None, :] + mixed


class _Sinkhorn(torch.autograd.Function):
    """`_sinkhorn` by the kernel; the backward pass repeats the forward pass rather than store each step's matrix."""

    @staticmethod
    def forward(ctx: Any, logits: Tensor, steps: int, eps: float) -> Tensor:
        logits = logits.contiguous()
        ctx.save_for_backward(logits)
        ctx.steps, ctx.eps = steps, eps
        return _call_sinkhorn(logits, None, steps, eps)

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor | None, ...]:
        (logits,) = ctx.saved_tensors
        return _call_sinkhorn(logits, grads[0].contiguous(), ctx.steps, ctx.eps), None, None


def _call_sinkhorn(logits: Tensor, grad: Tensor | None, steps: int, eps: float) -> Tensor:
    out, n = torch.empty_like(logits), logits.size(-1)
    native.call("sinkhorn", logits, grad, out, logits.numel() // (n * n), n, steps, eps)
    return out


class _Mix(torch.autograd.Function):
    """`_mix` by the kernels."""

    @staticmethod
    def forward(ctx: Any, shares: Tensor, streams: Tensor, given: Tensor | None, made: Tensor | None) -> Tensor:
        tensors = [None if t is None else t.contiguous() for t in (shares, streams, given, made)]
        ctx.save_for_backward(*tensors)
        n, m, size = shares.size(-2), shares.size(-1), streams.size(-1)
        out = streams.new_empty(*streams.shape[:-2], m, size)
        tokens = streams.numel() // (n * size)
        native.call("mix_streams", streams.dtype == torch.bfloat16, *tensors, out, tokens, n, m, size)
        return out

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor | None, ...]:
        tensors = ctx.saved_tensors
        shares, streams = tensors[:2]
        found = [None if t is None else torch.empty_like(t) for t in tensors]
        n, m, size = shares.size(-2), shares.size(-1), streams.size(-1)
        tokens, is_bf16 = streams.numel() // (n * size), streams.dtype == torch.bfloat16
        native.call("mix_streams_backward", is_bf16, *tensors, grads[0].contiguous(), *found, tokens, n, m, size)
        return tuple(found)
