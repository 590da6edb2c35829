"""The C++ kernels around the matrix products of a decoding step, called on torch's tensors.

Each replaces a dozen small operations, whose own cost would be more than half of a small model's step. `ready` says
whether they can be used; where not, the model's plain lines run.
"""

import torch
from torch import Tensor

from finback.kernels import native

DTYPES = (torch.float32, torch.bfloat16)


def ready(x: Tensor) -> bool:
    """Whether the kernels take this tensor: on a CPU, fp32 or bf16, nothing recorded for a backward pass."""
    return x.device.type == "cpu" and x.dtype in DTYPES and not torch.is_grad_enabled() and native.library() is not None


def add_norm(x: Tensor, y: Tensor | None, gain: Tensor, eps: float) -> tuple[Tensor, Tensor]:
    """x + y (x itself without a y), and its RMSNorm. x and y (..., d), gain (d,)."""
    x, gain, size = x.contiguous(), gain.float(), x.size(-1)
    total, out = x if y is None else torch.empty_like(x), torch.empty_like(x)
    y = None if y is None else y.to(x.dtype).contiguous()
    native.call("add_norm", x.dtype == torch.bfloat16, x, y, gain, total, out, x.numel() // size, size, eps)
    return total, out


def swiglu(x: Tensor) -> Tensor:
    """SiLU(gate) ⊙ up for x (..., [gate | up]) -> (..., half)."""
    x = x.contiguous()
    width = x.size(-1) // 2
    out = x.new_empty(*x.shape[:-1], width)
    native.call("swiglu", x.dtype == torch.bfloat16, x, out, out.numel() // width, width)
    return out


def paged_attention(
    query: Tensor,
    entries: Tensor,
    table: Tensor,
    lengths: Tensor,
    starts: Tensor | None,
    size: int,
    groups: int,
    value_dim: int,
    value_at: int,
    scale: float,
) -> Tensor:
    """As reference.paged_attention, reading every page once, where it lies; in fp32 inside."""
    rows, new, heads, key_dim = query.shape
    asked = query.float().contiguous()
    out = asked.new_empty(rows, new, heads, value_dim)
    native.call(
        "attend",
        entries.dtype == torch.bfloat16,
        asked,
        entries,
        out,
        table,
        lengths,
        starts,
        rows,
        new,
        heads,
        groups,
        key_dim,
        value_dim,
        entries.size(1),
        value_at,
        size,
        table.size(1),
        scale,
    )
    return out.to(query.dtype)


def grouped_query(
    qkv: Tensor,
    entries: Tensor,
    slots: Tensor,
    table: Tensor,
    lengths: Tensor,
    starts: Tensor | None,
    size: int,
    cos: Tensor,
    sin: Tensor,
    gains: tuple[Tensor, Tensor] | None,
    groups: int,
    head_dim: int,
    eps: float,
    scale: float,
) -> Tensor:
    """Rotate, store, attend for grouped-query attention: qkv (rows, new, (heads + 2 groups) · head_dim) -> (rows, new, out).

    The new keys and values go to `slots` of entries (slots, elements); see reference.paged_attention for the others.
    """
    qkv = qkv.contiguous()
    rows, new = qkv.shape[:2]
    heads = qkv.size(2) // head_dim - 2 * groups
    out = qkv.new_empty(rows, new, heads * head_dim)
    query_gain, key_gain = (None, None) if gains is None else (gains[0].float(), gains[1].float())
    native.call(
        "grouped_query",
        qkv.dtype == torch.bfloat16,
        qkv,
        entries,
        out,
        slots,
        table,
        lengths,
        starts,
        cos,
        sin,
        query_gain,
        key_gain,
        rows,
        new,
        heads,
        groups,
        head_dim,
        size,
        table.size(1),
        eps,
        scale,
    )
    return out


def latent(
    q: Tensor,
    kv: Tensor,
    up: Tensor,
    entries: Tensor,
    slots: Tensor,
    table: Tensor,
    lengths: Tensor,
    starts: Tensor | None,
    size: int,
    cos: Tensor,
    sin: Tensor,
    gain: Tensor,
    interleaved: bool,
    dims: tuple[int, int, int],
    eps: float,
    scale: float,
) -> Tensor:
    """Norm, rotate, store and attend for MLA in absorbed form -> (rows, new, heads · value).

    q (rows, new, heads · (nope + rope)), kv (rows, new, latent + rope), up (heads · (nope + value), latent);
    dims = (nope, rope, value).
    """
    nope, rope, value = dims
    q, kv, gain = q.contiguous(), kv.contiguous(), gain.float()
    rows, new = q.shape[:2]
    heads = q.size(2) // (nope + rope)
    out = q.new_empty(rows, new, heads * value)
    native.call(
        "latent",
        q.dtype == torch.bfloat16,
        q,
        kv,
        up,
        entries,
        out,
        slots,
        table,
        lengths,
        starts,
        cos,
        sin,
        gain,
        interleaved,
        rows,
        new,
        heads,
        nope,
        rope,
        value,
        up.size(1),
        size,
        table.size(1),
        eps,
        scale,
    )
    return out


def experts(x: Tensor, index: Tensor, weight: Tensor, gate_up: Tensor, down: Tensor) -> Tensor:
    """As reference.routed_experts, for few tokens: every expert's weights are read once, and no token is moved."""
    tokens, choices = index.shape
    width, size = down.size(2), x.size(1)
    wide, weight, index = x.float().contiguous(), weight.float().contiguous(), index.contiguous()
    out, hidden = torch.empty_like(wide), wide.new_empty(tokens * choices, width)
    native.call(
        "experts",
        gate_up.dtype == torch.bfloat16,
        wide,
        index,
        weight,
        gate_up,
        down,
        out,
        hidden,
        tokens,
        choices,
        size,
        width,
    )
    return out.to(x.dtype)
