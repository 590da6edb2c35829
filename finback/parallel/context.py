"""Context parallelism: each rank of a group has an equal, contiguous part of every row, and attention sees whole rows.

Norms, projections, feed-forwards, experts and losses treat each token alone and need no other part. Before attention, ranks
exchange heads for tokens, so that each has all tokens of its share of the heads; afterwards they exchange back
(DeepSpeed-Ulysses, 2309.14509). That is two all-to-alls forward and two backward. Positions, documents and the balance loss
are those of whole rows. Twin: the same model on whole rows.

Sparse attention gathers instead what all heads share, and every rank attends for its own tokens with all heads: latents and the
indexer's keys (DSA, 704 numbers per token and layer of V3.2, where queries, keys, values and outputs of all heads are 81,920), or
entries and the inputs of compressed ones (V4). So a token's indexer runs on one rank, over whole rows, and selections are not exchanged.
"""

import math
from collections.abc import Callable
from functools import partial
from typing import Any

import torch
import torch.distributed as dist
import torch.nn.functional as F
from torch import Tensor
from torch.distributed.device_mesh import DeviceMesh

from finback.kernels.attention import Attention, with_sinks
from finback.kernels.documents import Mask, visible
from finback.model.cache import Cache, LayerCache
from finback.model.dsa import DSA, Seen
from finback.model.dsa_training import Taught
from finback.model.gqa import GQA, SinkGQA
from finback.model.mla import MLA
from finback.model.moe import MoE, balance_of, expert_shares
from finback.model.replace import recast
from finback.model.swa import SWA, shifted
from finback.model.transformer import Transformer


def spread_context(model: Transformer, group: dist.ProcessGroup) -> None:
    """Changes a model in place to read this rank's part of rows that are split over the ranks of a group."""
    recast(model, ContextTransformer).group = group
    for module in list(model.modules()):
        if isinstance(module, Taught):
            module.members = group.size()
        if isinstance(module, DSA):
            recast(module, ContextDSA).group = group
        elif isinstance(module, SWA):
            recast(module, ContextSWA).group = group
        elif isinstance(module, MLA | GQA):
            module.core = HeadExchange(group, module.core)
            if isinstance(module, SinkGQA):
                recast(module, ContextSinkGQA)
        elif isinstance(module, MoE):
            recast(module, ContextMoE).group = group


class ContextTransformer(Transformer):
    """A model whose passes without a cache read a part of each row."""

    group: dist.ProcessGroup

    def _positions(
        self, length: int, cache: Cache | None, document_ids: Tensor | None, prefixes: Tensor | None = None
    ) -> tuple[Tensor, Tensor, Mask]:
        """cos and sin of this part's tokens, and the mask of whole rows; document_ids (b, t) are those of this part."""
        if cache is not None:
            return super()._positions(length, cache, document_ids, prefixes)
        members, start = self.group.size(), self.group.rank() * length
        whole = None if document_ids is None else _whole(document_ids, self.group)
        cos, sin, mask = super()._positions(members * length, None, whole, prefixes)
        return cos[:, start : start + length], sin[:, start : start + length], mask


class ContextDSA(DSA):
    """DSA whose passes without a cache read a part of each row; with an indexer or sharing another's."""

    group: dist.ProcessGroup

    def whole(self, x: Tensor) -> Tensor:
        """Rows from what all ranks have computed of them, in training that teaches indexers."""
        return gathered(x, self.group)

    def first(self, new: int) -> int:
        """Position of this part's first token."""
        return self.group.rank() * new

    def forward(
        self, x: Tensor, cos: Tensor, sin: Tensor, cache: LayerCache | None = None, attention_mask: Mask = None
    ) -> Tensor:
        """As DSA.forward; cos and sin are of this part, the mask is of whole rows."""
        if cache is not None or (isinstance(self, Taught) and self.learns(cache)):
            return super().forward(x, cos, sin, cache, attention_mask)
        start, length = self.group.rank() * x.size(1), self.group.size() * x.size(1)
        q_latent, kv = self.inputs(x)
        q_nope, q_rope = self.queries(self.q_of(q_latent), cos, sin)
        sizes = [self.config.kv_lora_rank, self.config.qk_rope_head_dim]
        latent, k_rope = gathered(torch.cat(self.latents(kv, cos, sin), dim=-1), self.group).split(sizes, dim=-1)
        with torch.no_grad():
            key = _whole(self.keys(x, cos, sin), self.group)
        seen: Seen = lambda part: visible(attention_mask, shifted(part, start), length, x.device)  # noqa: E731
        picked = self.picker((x, q_latent, cos, sin), lambda: key, seen)
        return self.out(self._attend_blocks(q_nope, q_rope, latent, k_rope, picked))


class ContextSWA(SWA):
    """V4's attention, of all kinds, whose passes without a cache read a part of each row."""

    group: dist.ProcessGroup

    def whole(self, x: Tensor) -> Tensor:
        return gathered(x, self.group)

    def first(self, new: int) -> int:
        return self.group.rank() * new


class ContextMoE(MoE):
    """A mixture of experts whose balance loss is that of whole rows."""

    group: dist.ProcessGroup

    def route(
        self, x: Tensor, padding_mask: Tensor | None, tokens: Tensor | None = None
    ) -> tuple[Tensor, Tensor, Tensor]:
        """As MoE.route; the balance losses of all parts sum to that of whole rows."""
        index, weight, affinity = self.router(x.flatten(0, 1), tokens)
        shape = x.shape[:2]
        chosen, share = expert_shares(affinity.unflatten(0, shape), index.unflatten(0, shape), padding_mask)
        tokens = torch.ones(shape, device=x.device) if padding_mask is None else padding_mask
        # P is a sum over parts, so each rank adds its own; f multiplies P and must be that of whole rows
        counts = torch.cat([chosen.sum(dim=1), tokens.sum(dim=1, keepdim=True).to(chosen.dtype)], dim=1)
        dist.all_reduce(counts, group=self.group)
        length = counts[:, -1:].clamp(min=1)
        f, p = counts[:, :-1] / length, share.sum(dim=1) / length
        return index, weight, balance_of(f, p, self.config.num_experts_per_tok)


class ContextSinkGQA(SinkGQA):
    """Attention with sinks: each rank uses those of the heads that it computes."""

    def attend(self, core: Attention, query: Tensor, key: Tensor, value: Tensor, mask: Mask) -> Tensor:
        if not isinstance(core, HeadExchange):  # a pass with a cache
            return super().attend(core, query, key, value, mask)
        sink = self.sink.chunk(core.group.size())[core.group.rank()]
        whole = HeadExchange(core.group, partial(with_sinks, core.form, sink=sink))
        return whole(query, key, value, self.scale, mask)


class HeadExchange:
    """Attention over tokens on several ranks; called like `form`, which computes whole rows for some of the heads."""

    def __init__(self, group: dist.ProcessGroup, form: Attention) -> None:
        self.group, self.form = group, form

    @torch.compiler.disable  # type: ignore[untyped-decorator]  # compiled graphs break here
    def __call__(self, query: Tensor, key: Tensor, value: Tensor, scale: float, mask: Mask = None) -> Tensor:
        """query (b, h, t, d), key and value (b, kv, t, d) of this rank's t tokens; the mask is of whole rows -> (b, h, t, v)."""
        members = self.group.size()
        copies = members // math.gcd(
            members, key.size(1)
        )  # with fewer key heads than ranks, each key head is copied to all ranks that have its queries
        key, value = (t.repeat_interleave(copies, dim=1) if copies > 1 else t for t in (key, value))
        q, k, v = _HeadsForTokens.apply(self.group, 1, 2, query, key, value)
        (out,) = _HeadsForTokens.apply(self.group, 2, 1, self.form(q, k, v, scale, mask))
        return out


class _HeadsForTokens(torch.autograd.Function):
    """(b, h, t, d) -> (b, h / members, members · t, d) for several tensors, or the reverse; gradients take the opposite way.

    One autograd function exchanges all of them, so that backward passes run the same collectives in the same order on
    every rank.
    """

    @staticmethod
    def forward(ctx: Any, group: dist.ProcessGroup, cut: int, joined: int, *tensors: Tensor) -> tuple[Tensor, ...]:
        ctx.way = group, cut, joined
        return tuple(_exchanged(t, group, cut, joined) for t in tensors)

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Any, ...]:
        group, cut, joined = ctx.way
        return None, None, None, *(_exchanged(g, group, joined, cut) for g in grads)


def _exchanged(tensor: Tensor, group: dist.ProcessGroup, cut: int, joined: int) -> Tensor:
    """Splits a tensor along `cut`, sends one part to each member, and joins the received parts along `joined`."""
    return torch.cat(_received(tensor, group, cut).unbind(0), dim=joined)


def _received(tensor: Tensor, group: dist.ProcessGroup, cut: int) -> Tensor:
    """Splits a tensor along `cut`, sends one part to each member, and stacks the received parts."""
    sent = torch.stack(tensor.chunk(group.size(), dim=cut))
    received = torch.empty_like(sent)
    dist.all_to_all_single(received, sent, group=group)
    return received


def gathered(part: Tensor, group: dist.ProcessGroup) -> Tensor:
    """Rows (b, members · t, w) from all ranks' parts (b, t, w); a part's gradient is the sum of all ranks' gradients for it."""
    rows: Tensor = _Gathered.apply(group, part)
    return rows


class _Gathered(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, group: dist.ProcessGroup, part: Tensor) -> Tensor:
        ctx.group = group
        return _whole(part, group)

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Any, ...]:
        return None, _received(grads[0], ctx.group, 1).sum(dim=0)


def in_parts(read: Callable[[Tensor], Tensor], tokens: Tensor, axis: DeviceMesh | None) -> Tensor:
    """read(tokens) on whole rows, tokens (n, t + 1) -> (n, t), by a `read` that takes this rank's part if rows are split."""
    if axis is None:
        return read(tokens)
    length, members, member = tokens.size(1) - 1, axis.size(), axis.get_local_rank()
    part = -(-length // members)
    padded = F.pad(tokens, (0, part * members - length))  # padding at the end, which no earlier token sees
    return _whole(read(padded[:, member * part : (member + 1) * part + 1]), axis.get_group())[:, :length]


def whole_rows(part: Tensor, axis: DeviceMesh | None) -> Tensor:
    """Gathers rows (b, members · t) from each rank's part (b, t). All ranks must compute the same from them.

    The gradient of a part is the slice of this rank's gradient at the part's position, without communication.
    """
    if axis is None:
        return part
    rows: Tensor = _WholeRows.apply(axis.get_group(), part)
    return rows


def summed_parts(part: Tensor, axis: DeviceMesh | None) -> Tensor:
    """The sum of all ranks' tensors. All ranks must compute the same from it.

    The gradient of a rank's tensor is this rank's gradient of the sum, without communication.
    """
    if axis is None:
        return part
    found: Tensor = _SummedParts.apply(axis.get_group(), part)
    return found


class _SummedParts(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, group: dist.ProcessGroup, part: Tensor) -> Tensor:
        whole = part.clone()
        dist.all_reduce(whole, group=group)
        return whole

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Any, ...]:
        return None, grads[0]


class _WholeRows(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, group: dist.ProcessGroup, part: Tensor) -> Tensor:
        ctx.group = group
        return _whole(part, group)

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Any, ...]:
        return None, grads[0].chunk(ctx.group.size(), dim=1)[ctx.group.rank()].contiguous()


def _whole(part: Tensor, group: dist.ProcessGroup) -> Tensor:
    """Gathers rows (b, members · t) from each rank's part (b, t), without a gradient."""
    parts = [torch.empty_like(part, memory_format=torch.contiguous_format) for _ in range(group.size())]
    dist.all_gather(parts, part.contiguous(), group=group)
    return torch.cat(parts, dim=1)
