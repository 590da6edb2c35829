"""Attention in rows of several documents, one document at a time, so that no (t x t) matrix is needed.

Documents of equal length share one call of the fused kernel. On a GPU, torch's variable-length kernel takes all documents
in one call if it agrees with the fused kernel in a small trial. Twin: causal attention with the mask of `masked`.
"""

from dataclasses import dataclass
from functools import cache, partial

import torch
import torch.nn.functional as F
from torch import Tensor

LONGEST_MASKED = 512  # rows of up to this many tokens use a dense mask, which is faster at that size


@dataclass(frozen=True)
class Documents:
    """The boundaries of the documents in packed rows."""

    # tokens per document, row after row; together they fill the rows
    lengths: tuple[int, ...]


@dataclass(frozen=True)
class Prefixed:
    """Rows that begin with a prefix, which all documents after it see."""

    # for each row, the tokens of its prefix and of each document after it; together they fill the row
    rows: tuple[tuple[int, ...], ...]


@dataclass(frozen=True)
class Windowed:
    """A sliding window: of the tokens visible under `within`, a token sees only the last `size`, itself included."""

    within: "Tensor | Documents | Prefixed | None"
    size: int


# The tokens that a token sees, never later ones than itself. A tensor is a matrix (b, t, t), True where a query sees a key.
# Documents: the tokens of its document. Prefixed: also those of a prefix. Windowed: the last few. None: all earlier ones
Mask = Tensor | Documents | Prefixed | Windowed | None


def mask_of(document_ids: Tensor, prefixes: Tensor | None = None) -> Tensor | Documents | Prefixed:
    """The mask of packed rows. document_ids (b, t) numbers the documents of a row, each of which is contiguous.

    prefixes (b,): that many tokens at the start of a row are document 0, which all other documents see too.
    """
    if document_ids.size(1) <= LONGEST_MASKED:
        return masked(document_ids, prefixes)
    if prefixes is not None:
        rows = zip(document_ids, prefixes.tolist(), strict=True)
        return Prefixed(tuple((n, *_runs(ids[n:])) for ids, n in rows))
    # all rows at once, so that the host waits for the device once rather than for every row
    begins = torch.ones_like(document_ids, dtype=torch.bool)
    begins[:, 1:] = document_ids[:, 1:] != document_ids[:, :-1]
    starts = begins.flatten().nonzero().squeeze(1)
    ends = torch.cat([starts[1:], starts.new_tensor([document_ids.numel()])])
    return Documents(tuple((ends - starts).tolist()))


def masked(document_ids: Tensor, prefixes: Tensor | None = None, part: slice = slice(None)) -> Tensor:
    """The mask of packed rows as a matrix (b, t, t), or its lines for the queries in `part`."""
    index = torch.arange(document_ids.size(1), device=document_ids.device)
    seen = document_ids[:, part, None] == document_ids[:, None, :]
    if prefixes is not None:
        seen = seen | (index < prefixes[:, None, None])
    return seen & (index[part, None] >= index)


def longest(mask: Mask, length: int) -> int:
    """The most tokens that any token of rows of this length sees."""
    if isinstance(mask, Documents):
        return max(mask.lengths)
    if isinstance(mask, Prefixed):
        return max(row[0] + max(row[1:], default=0) for row in mask.rows)
    return length


def visible(mask: Mask, part: slice, keys: int, device: torch.device) -> Tensor:
    """(b or 1, part, keys), True where the queries in `part` see a key."""
    assert not isinstance(mask, Windowed), "windows are expanded to a matrix first"
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
    """The index of each token's document."""
    sizes = torch.tensor(lengths, device=device)
    return torch.arange(len(lengths), device=device).repeat_interleave(sizes)


def positions(mask: Mask, length: int, device: torch.device) -> Tensor:
    """(b or 1, length), the position of each token within its document."""
    assert not isinstance(mask, Prefixed), "a document and its prefix are not contiguous in the row"
    index = torch.arange(length, device=device)
    if mask is None:
        return index[None]
    return index - visible(mask, slice(None), length, device).to(torch.int8).argmax(dim=2)


def unwindowed(mask: Windowed, length: int, device: torch.device) -> Mask:
    """A window as another mask: `within` itself if no row is longer than the window, otherwise a matrix."""
    if longest(mask.within, length) <= mask.size:
        return mask.within
    index = torch.arange(length, device=device)
    near = index[:, None] - index < mask.size
    return visible(mask.within, slice(None), length, device) & near


def _runs(ids: Tensor) -> list[int]:
    """The lengths of a row's documents."""
    return list(torch.unique_consecutive(ids, return_counts=True)[1].tolist())


def document_attention(query: Tensor, key: Tensor, value: Tensor, scale: float, documents: Documents) -> Tensor:
    """softmax(scale · q k^T, causal within each document) v.

    query (b, h, t, d), key (b, kv, t, d), value (b, kv, t, v), h a multiple of kv -> (b, h, t, v).
    """
    q, k, v = (t.transpose(1, 2).flatten(0, 1) for t in (query, key, value))
    form = _varlen if _has_varlen(_kind(q), _kind(k), _kind(v)) else _one_by_one
    return form(q, k, v, scale, documents.lengths).unflatten(0, (query.size(0), -1)).transpose(1, 2)


def fused_attention(query: Tensor, key: Tensor, value: Tensor, scale: float, mask: Tensor | None = None) -> Tensor:
    """Causal attention without a matrix of scores, or attention under a mask (t, s); shapes as in `document_attention`.

    torch's fused CPU kernel requires values as wide as keys; without the padding torch would build the matrix.
    """
    width, missing = value.size(-1), key.size(-1) - value.size(-1)
    if missing > 0 and value.device.type == "cpu":
        value = F.pad(value, (0, missing))
    out = F.scaled_dot_product_attention(query, key, value, mask, is_causal=mask is None, scale=scale, enable_gqa=True)
    return out[..., :width]


def _one_by_one(query: Tensor, key: Tensor, value: Tensor, scale: float, lengths: tuple[int, ...]) -> Tensor:
    """One call per document length: query (tokens, h, d), key and value (tokens, kv, d) -> (tokens, h, v)."""
    pieces = [t.split(lengths) for t in (query, key, value)]
    out: list[Tensor] = list(pieces[0])
    for length in dict.fromkeys(lengths):
        same = [index for index, other in enumerate(lengths) if other == length]
        q, k, v = (_together([piece[index] for index in same]).transpose(1, 2) for piece in pieces)
        for index, made in zip(same, fused_attention(q, k, v, scale).transpose(1, 2), strict=True):
            out[index] = made
    return torch.cat(out)


def _together(pieces: list[Tensor]) -> Tensor:
    """Stacks pieces; a single piece stays a view, so that the backward pass stores no copy."""
    return torch.stack(pieces) if len(pieces) > 1 else pieces[0][None]


def _varlen(query: Tensor, key: Tensor, value: Tensor, scale: float, lengths: tuple[int, ...]) -> Tensor:
    """`_one_by_one` by flash attention's kernel for rows of variable length."""
    from torch.nn.attention.varlen import varlen_attn  # runs on GPUs only

    width = -(-max(key.size(-1), value.size(-1)) // 8) * 8  # the kernel requires one width, a multiple of 8
    q, k, v = (F.pad(t, (0, width - t.size(-1))) for t in (query, key, value))
    ends = torch.tensor((0, *lengths), device=q.device).cumsum(0).to(torch.int32)
    most, shared = max(lengths), q.size(1) != k.size(1)
    out = varlen_attn(q, k, v, ends, ends, most, most, window_size=(-1, 0), scale=scale, enable_gqa=shared)
    assert isinstance(out, Tensor), "varlen_attn returns only the output by default"
    return out[..., : value.size(-1)]


_Kind = tuple[torch.device, torch.dtype, int, int]


def _kind(tensor: Tensor) -> _Kind:
    return tensor.device, tensor.dtype, tensor.size(1), tensor.size(2)


@cache
def _has_varlen(query: _Kind, key: _Kind, value: _Kind) -> bool:
    """Whether the variable-length kernel runs on such tensors and agrees with `_one_by_one`, gradients included."""
    if query[0].type != "cuda" or query[1] == torch.float32:
        return False
    lengths, generator = (3, 130, 1, 7), torch.Generator().manual_seed(0)
    given = [torch.randn(sum(lengths), *k[2:], generator=generator).to(k[0], k[1]) for k in (query, key, value)]
    try:
        with torch.enable_grad():
            found, expected = (_tried(partial(form, lengths=lengths), given) for form in (_varlen, _one_by_one))
    except Exception:  # an unsupported kernel raises different errors on different machines
        return False
    return all(_near(a, b) for a, b in zip(found, expected, strict=True))


def _tried(form: "partial[Tensor]", given: list[Tensor]) -> list[Tensor]:
    """The output and gradients of a form of attention."""
    inputs = [t.detach().requires_grad_() for t in given]
    out = form(*inputs, scale=inputs[0].size(-1) ** -0.5)
    return [out.detach(), *torch.autograd.grad(out.float().square().sum(), inputs)]


def _near(a: Tensor, b: Tensor) -> bool:
    """Whether two tensors agree up to bf16 rounding."""
    return bool((a - b).abs().max() <= 0.02 * b.abs().max())
