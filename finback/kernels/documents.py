"""Attention in rows that hold several documents, document by document: no (t x t) matrix is ever made.

One call of the fused kernel for all documents of a length, on a CPU and on a GPU alike. On a GPU torch's variable-length
kernel does them all at once where a first small trial gives what the calls give. Twin: causal attention with the mask of
`masked`.
"""

from dataclasses import dataclass
from functools import cache, partial

import torch
import torch.nn.functional as F
from torch import Tensor

LONGEST_MASKED = 512  # tokens of a row up to which a mask is small, and quicker


@dataclass(frozen=True)
class Documents:
    """Where the documents of packed rows begin and end."""

    # tokens of each, row after row; together they fill the rows
    lengths: tuple[int, ...]


@dataclass(frozen=True)
class Prefixed:
    """Rows that begin with a prefix which all documents behind it see."""

    # of each row: tokens of its prefix, then of each document behind it; together they fill the row
    rows: tuple[tuple[int, ...], ...]


@dataclass(frozen=True)
class Windowed:
    """A token sees the last `size` tokens, itself included, of those that it would see."""

    # what it would see
    within: "Tensor | Documents | Prefixed | None"
    size: int


# What a token may look at, besides itself only what stands before it: (b, t, t) True where a query sees a key, or its
# document's tokens, or those of a prefix too; None: all of them
Mask = Tensor | Documents | Prefixed | Windowed | None


def mask_of(document_ids: Tensor, prefixes: Tensor | None = None) -> Tensor | Documents | Prefixed:
    """What the tokens of packed rows see; document_ids (b, t) numbers the documents of a row, each in one piece.

    prefixes (b,): the first so many tokens of a row are document 0, which the others see too.
    """
    if document_ids.size(1) <= LONGEST_MASKED:
        return masked(document_ids, prefixes)
    if prefixes is not None:
        rows = zip(document_ids, prefixes.tolist(), strict=True)
        return Prefixed(tuple((n, *_runs(ids[n:])) for ids, n in rows))
    # all rows at once: a device is waited for once, not row by row
    begins = torch.ones_like(document_ids, dtype=torch.bool)
    begins[:, 1:] = document_ids[:, 1:] != document_ids[:, :-1]
    starts = begins.flatten().nonzero().squeeze(1)
    ends = torch.cat([starts[1:], starts.new_tensor([document_ids.numel()])])
    return Documents(tuple((ends - starts).tolist()))


def masked(document_ids: Tensor, prefixes: Tensor | None = None, part: slice = slice(None)) -> Tensor:
    """The same as a matrix (b, t, t), or its lines of a part of the rows' queries."""
    index = torch.arange(document_ids.size(1), device=document_ids.device)
    seen = document_ids[:, part, None] == document_ids[:, None, :]
    if prefixes is not None:
        seen = seen | (index < prefixes[:, None, None])
    return seen & (index[part, None] >= index)


def longest(mask: Mask, length: int) -> int:
    """The most tokens that one token of rows of this length may see."""
    if isinstance(mask, Documents):
        return max(mask.lengths)
    if isinstance(mask, Prefixed):
        return max(row[0] + max(row[1:], default=0) for row in mask.rows)
    return length


def visible(mask: Mask, part: slice, keys: int, device: torch.device) -> Tensor:
    """(b or 1, part, keys) True where the queries of a part of the rows may look."""
    assert not isinstance(mask, Windowed), "a window is made a matrix before"
    if isinstance(mask, Tensor):
        return mask[:, part]
    if mask is None:
        index = torch.arange(keys, device=device)
        return (index <= index[part, None])[None]
    if isinstance(mask, Documents):
        return masked(_numbered(mask.lengths, device).unflatten(0, (-1, keys)), part=part)
    ids = torch.stack([_numbered(row, device) for row in mask.rows])
    return masked(ids, torch.tensor([row[0] for row in mask.rows], device=device), part)


def _numbered(lengths: tuple[int, ...], device: torch.device) -> Tensor:
    """The number of each token's document."""
    sizes = torch.tensor(lengths, device=device)
    return torch.arange(len(lengths), device=device).repeat_interleave(sizes)


def positions(mask: Mask, length: int, device: torch.device) -> Tensor:
    """(b or 1, length) The place of each token within its document."""
    assert not isinstance(mask, Prefixed), "a document behind a prefix is in two pieces"
    index = torch.arange(length, device=device)
    if mask is None:
        return index[None]
    return index - visible(mask, slice(None), length, device).to(torch.int8).argmax(dim=2)


def unwindowed(mask: Windowed, length: int, device: torch.device) -> Mask:
    """What the tokens of rows of this length see, as one of the other masks: a matrix, unless no window ends within a row."""
    if longest(mask.within, length) <= mask.size:
        return mask.within
    index = torch.arange(length, device=device)
    near = index[:, None] - index < mask.size
    return visible(mask.within, slice(None), length, device) & near


def _runs(ids: Tensor) -> list[int]:
    """Lengths of a row's documents."""
    return list(torch.unique_consecutive(ids, return_counts=True)[1].tolist())


def document_attention(query: Tensor, key: Tensor, value: Tensor, scale: float, documents: Documents) -> Tensor:
    """softmax(scale · q k^T, causal within each document) v.

    query (b, h, t, d), key (b, kv, t, d), value (b, kv, t, v), h a multiple of kv -> (b, h, t, v).
    """
    q, k, v = (t.transpose(1, 2).flatten(0, 1) for t in (query, key, value))
    form = _varlen if _has_varlen(_kind(q), _kind(k), _kind(v)) else _one_by_one
    return form(q, k, v, scale, documents.lengths).unflatten(0, (query.size(0), -1)).transpose(1, 2)


def fused_attention(query: Tensor, key: Tensor, value: Tensor, scale: float, mask: Tensor | None = None) -> Tensor:
    """Causal attention without a matrix of scores, or attention under a mask (t, s); shapes as above.

    torch's kernel for CPUs wants values as wide as keys, and would make the matrix otherwise.
    """
    width, missing = value.size(-1), key.size(-1) - value.size(-1)
    if missing > 0 and value.device.type == "cpu":
        value = F.pad(value, (0, missing))
    out = F.scaled_dot_product_attention(query, key, value, mask, is_causal=mask is None, scale=scale, enable_gqa=True)
    return out[..., :width]


def _one_by_one(query: Tensor, key: Tensor, value: Tensor, scale: float, lengths: tuple[int, ...]) -> Tensor:
    """query (tokens, h, d), key and value (tokens, kv, d) -> (tokens, h, v)."""
    pieces = [t.split(lengths) for t in (query, key, value)]
    out: list[Tensor] = list(pieces[0])
    for length in dict.fromkeys(lengths):
        same = [index for index, other in enumerate(lengths) if other == length]
        q, k, v = (_together([piece[index] for index in same]).transpose(1, 2) for piece in pieces)
        for index, made in zip(same, fused_attention(q, k, v, scale).transpose(1, 2), strict=True):
            out[index] = made
    return torch.cat(out)


def _together(pieces: list[Tensor]) -> Tensor:
    """Stacked; a single one as it lies in memory, which the backward pass keeps."""
    return torch.stack(pieces) if len(pieces) > 1 else pieces[0][None]


def _varlen(query: Tensor, key: Tensor, value: Tensor, scale: float, lengths: tuple[int, ...]) -> Tensor:
    """The same by flash attention's kernel for rows of variable length."""
    from torch.nn.attention.varlen import varlen_attn  # a GPU's alone

    width = -(-max(key.size(-1), value.size(-1)) // 8) * 8  # one for all, as the kernel wants it
    q, k, v = (F.pad(t, (0, width - t.size(-1))) for t in (query, key, value))
    ends = torch.tensor((0, *lengths), device=q.device).cumsum(0).to(torch.int32)
    most, shared = max(lengths), q.size(1) != k.size(1)
    out = varlen_attn(q, k, v, ends, ends, most, most, window_size=(-1, 0), scale=scale, enable_gqa=shared)
    assert isinstance(out, Tensor), "nothing but the output was asked for"
    return out[..., : value.size(-1)]


_Kind = tuple[torch.device, torch.dtype, int, int]


def _kind(tensor: Tensor) -> _Kind:
    return tensor.device, tensor.dtype, tensor.size(1), tensor.size(2)


@cache
def _has_varlen(query: _Kind, key: _Kind, value: _Kind) -> bool:
    """Whether the variable-length kernel runs here on such tensors, and agrees with the plain form, gradients included."""
    if query[0].type != "cuda" or query[1] == torch.float32:
        return False
    lengths, generator = (3, 130, 1, 7), torch.Generator().manual_seed(0)
    given = [torch.randn(sum(lengths), *k[2:], generator=generator).to(k[0], k[1]) for k in (query, key, value)]
    try:
        with torch.enable_grad():
            found, expected = (_tried(partial(form, lengths=lengths), given) for form in (_varlen, _one_by_one))
    except Exception:  # kernels are missing in as many ways as there are machines
        return False
    return all(_near(a, b) for a, b in zip(found, expected, strict=True))


def _tried(form: "partial[Tensor]", given: list[Tensor]) -> list[Tensor]:
    """Its output and gradients."""
    inputs = [t.detach().requires_grad_() for t in given]
    out = form(*inputs, scale=inputs[0].size(-1) ** -0.5)
    return [out.detach(), *torch.autograd.grad(out.float().square().sum(), inputs)]


def _near(a: Tensor, b: Tensor) -> bool:
    """Within what bf16 rounds."""
    return bool((a - b).abs().max() <= 0.02 * b.abs().max())
