"""Trains the indexers of DSA and CSA, which the loss on tokens does not reach (V3.2 2.1.1).

An indexer learns where the main attention looks. Its target for a token is the main attention's weights, summed over heads and
normalized (in CSA those on compressed entries); its loss is KL(target || softmax(scores)), summed over layers and averaged over tokens.
Its hidden states and its target are detached, so the token loss and this one share no parameters.

  dense   all earlier tokens are attended to and are part of the target: for a model that is not sparse yet
  sparse  only selected tokens, as in inference

Before that, indexers may rest: a model that begins with short rows attends densely at first (V4 4.2).
"""

from collections.abc import Callable
from typing import Literal

import torch
from torch import Tensor, nn

from finback.kernels.attention import torch_attention
from finback.kernels.documents import Mask, visible
from finback.model.cache import LayerCache
from finback.model.compressed_cache import CompressedLayer
from finback.model.config import ModelConfig
from finback.model.count import attending_densely
from finback.model.csa import CSA
from finback.model.dsa import DSA, IndexerQueries, Seen, SharedDSA, listed
from finback.model.replace import recast
from finback.model.swa import Far, shifted
from finback.model.transformer import Transformer
from finback.model.windows import windows_of

# how training attends: to everything, the same while indexers learn from it, or to what they select while they learn
Attention = Literal["dense", "warm-up", "sparse"]


def teach_indexers(model: Transformer, attention: Attention = "sparse") -> Transformer:
    """Makes a model's training passes compute the indexers' loss, in place; inference is unchanged."""
    for module in list(model.modules()):
        for kind, taught in ((DSA, TaughtDSA), (CSA, TaughtCSA)):
            if isinstance(module, kind) and not isinstance(module, SharedDSA):
                recast(module, taught)
    return set_attention(model, attention)


def set_attention(model: Transformer, attention: Attention) -> Transformer:
    """Makes a model attend this way, in place. Without gradients and with a cache it is dense under "dense", else sparse."""
    config = attending_densely(model.config) if attention == "dense" else model.config
    for module in model.modules():
        if isinstance(module, DSA | CSA | IndexerQueries):
            module.config = config
        if isinstance(module, Taught):
            module.attention = attention
    return model


def with_indexers(model: Transformer, config: ModelConfig, compute: torch.dtype, seed: int) -> Transformer:
    """A model sharing all weights, with random indexers if it has none; `config` differs only in the indexers."""
    other = Transformer(config, compute).initialise(seed)
    missing, unexpected = other.load_state_dict(model.state_dict(), strict=False, assign=True)
    assert not unexpected and all(".indexer." in name for name in missing), "the config must differ in indexers only"
    if config.tie_word_embeddings:
        other.head.weight = other.embed
    return other


def take_divergences(model: Transformer) -> Tensor | None:
    """Σ over layers of the indexers' divergence in the last training pass, in nats per token; None if none is trained.

    It can be taken once; `divergence` keeps the number.
    """
    taught = [m for m in model.modules() if isinstance(m, Taught) and m.loss is not None]
    losses = [m.loss for m in taught if m.loss is not None]
    for module in taught:
        module.loss = None
    return torch.stack(losses).sum() if losses else None


def is_taught(model: Transformer) -> bool:
    """Whether a model's indexers learn."""
    return any(isinstance(m, Taught) for m in model.modules())


def divergence(model: Transformer) -> float:
    """The divergence of the last training pass, averaged over layers, in nats per token."""
    found = [m.measured for m in model.modules() if isinstance(m, Taught)]
    return sum(found) / max(len(found), 1)


class Taught(nn.Module):
    """Attention whose training passes compare the indexer's scores with the main attention's weights."""

    attention: Attention = "sparse"
    # loss of the last training pass, with gradient, until it is taken
    loss: Tensor | None = None
    measured: float = 0.0

    def learns(self, cache: LayerCache | None) -> bool:
        """Whether this is a training pass of an indexer that does not rest."""
        return cache is None and self.training and torch.is_grad_enabled() and self.attention != "dense"

    # ranks that each read a part of every row
    members: int = 1

    def leave(self, total: Tensor, tokens: int) -> None:
        """Stores a pass's divergences, summed over this part's tokens, until they are taken; the losses of all parts add up."""
        self.loss = total / (tokens * self.members)
        self.measured = float(self.loss.detach()) * self.members


class TaughtDSA(Taught, DSA):
    """DSA with a trained indexer."""

    def whole(self, x: Tensor) -> Tensor:
        """Whole rows (b, s, w) from what this pass has computed of them, (b, t, w): here the same."""
        return x

    def first(self, new: int) -> int:
        """Position in whole rows of the first of this pass's `new` tokens: here 0."""
        return 0

    def forward(
        self, x: Tensor, cos: Tensor, sin: Tensor, cache: LayerCache | None = None, attention_mask: Mask = None
    ) -> Tensor:
        """As DSA.forward; in training it also sets `loss`."""
        if not self.learns(cache):
            return DSA.forward(self, x, cos, sin, cache, attention_mask)
        q_latent, kv = self.inputs(x)
        query = self.heads(self.q_of(q_latent), cos, sin)
        key, value = self.expanded(*map(self.whole, self.latents(kv, cos, sin)))
        indexer_key, first = self.whole(self.indexer.keys(x.detach(), cos, sin)), self.first(x.size(1))
        asked, weight = self.indexer.queries(x.detach(), q_latent.detach(), cos, sin)
        shared = self.begin_selection(x)
        read, total = [], torch.zeros((), device=x.device)
        for part in self.parts(query.size(2), key.size(2), len(query)):
            seen = visible(attention_mask, shifted(part, first), key.size(2), x.device)
            scores = self.indexer.scores(asked[:, part], weight[:, part], indexer_key)
            looked = seen if self.attention == "warm-up" else self.indexer.select(scores.detach(), seen, part)
            if shared is not None:
                shared[:, part] = listed(looked.expand_as(scores), seen, self.config.index_topk)
            read.append(torch_attention(query[:, :, part], key, value, self.scale, looked))
            total = total + divergences(self._target(query[:, :, part], key, looked), scores, looked).sum()
        self.leave(total, len(query) * query.size(2))
        return self.out(torch.cat(read, dim=2).transpose(1, 2).flatten(2))

    @torch.no_grad()
    def _target(self, query: Tensor, key: Tensor, looked: Tensor) -> Tensor:
        """The main attention's weights, averaged over heads: query (b, h, t, d), key (b, h, s, d) -> (b, t, s)."""
        total = torch.zeros(*query.shape[:1], query.size(2), key.size(2), device=query.device)
        for head in range(query.size(1)):  # one matrix at a time
            scores = (query[:, head] @ key[:, head].transpose(1, 2)).float() * self.scale
            total += scores.masked_fill(~looked, float("-inf")).softmax(dim=-1)
        return total / query.size(1)


class TaughtCSA(Taught, CSA):
    """CSA with a trained indexer; a token that sees no entry has no loss."""

    # in the current pass: the indexer's scores for a part of the queries, with gradient
    scored: Callable[[slice], Tensor] | None = None

    def far(
        self, x: Tensor, q_latent: Tensor, angles: tuple[Tensor, Tensor], mask: Mask, cache: CompressedLayer | None
    ) -> Far:
        if not self.learns(cache):
            return CSA.far(self, x, q_latent, angles, mask, cache)
        turned, first = self.whole(torch.cat(angles, dim=-1).expand(len(x), -1, -1)), self.first(x.size(1))
        length = turned.size(1)
        windows = windows_of(mask, length, self.compressor.size, x.device)
        entries = self.compressor(self.whole(self.compressor.record(x)), turned, windows)
        keys = self.indexer.compressor(self.whole(self.indexer.compressor.record(x.detach())), turned, windows)
        query, weight = self.indexer.queries(x.detach(), q_latent.detach(), *angles)
        self.scored = lambda part: self.indexer.scores(query[:, part], weight[:, part], keys)
        seen: Seen = lambda part: windows.seen(mask, shifted(part, first), length)  # noqa: E731
        if self.attention == "warm-up" or entries.size(1) <= self.config.index_topk:
            return entries, seen
        return entries, self.picker(x, q_latent, angles, keys, seen)

    def attend(self, query: Tensor, entries: Tensor, near: Seen, far: Far) -> Tensor:
        scored, self.scored = self.scored, None
        if scored is not None:
            total = torch.zeros((), device=query.device)
            for part in self.parts(query, far[0].size(1)):
                looked = far[1](part).expand(len(query), -1, -1)
                target = self._target(query, entries, part, near, far[0], looked)
                total = total + divergences(target, scored(part), looked).sum()
            self.leave(total, len(query) * query.size(2))
        return CSA.attend(self, query, entries, near, far)

    @torch.no_grad()
    def _target(
        self, query: Tensor, entries: Tensor, part: slice, near: Seen, compressed: Tensor, looked: Tensor
    ) -> Tensor:
        """For a part of the queries (b, h, t, c): the weights on the compressed entries (b, n, c), normalized to 1: (b, part, n)."""
        window, seen = self.near_of(query.size(2), entries, part, near)
        total = torch.zeros_like(looked, dtype=torch.float32)
        for head in range(query.size(1)):  # one matrix at a time
            asked = query[:, head, part].float() * self.scale
            scores = (asked @ compressed.float().transpose(1, 2)).masked_fill(~looked, float("-inf"))
            others = (asked @ entries[:, window].float().transpose(1, 2)).masked_fill(~seen, float("-inf"))
            sink = self.sink[head].float().expand(*scores.shape[:2], 1)
            total += torch.cat([scores, others, sink], dim=-1).softmax(dim=-1)[..., : scores.size(-1)]
        return total / total.sum(dim=-1, keepdim=True).clamp(min=1e-30)


def divergences(target: Tensor, scores: Tensor, looked: Tensor) -> Tensor:
    """KL(target || softmax of the scores where `looked` is True): (b, t, s) each -> (b, t)."""
    logp = scores.masked_fill(~looked, float("-inf")).log_softmax(dim=-1).masked_fill(~looked, 0.0)
    return (torch.special.xlogy(target, target) - target * logp).sum(dim=-1)
