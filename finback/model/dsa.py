"""DeepSeek Sparse Attention (DSA, V3.2 2.1): MLA restricted to the few tokens that a lightning indexer selects.

The indexer is a small separate attention: many query heads from MLA's query latent, one key per token, no values. It
scores every earlier token (V3.2 eq. 1), and the main attention of a token sees only the `index_topk` best (itself only if
selected). Up to `index_topk` tokens everything is selected, and DSA equals MLA.

The release also multiplies the indexer's queries and keys by a Hadamard matrix and stores them in FP8. The matrix is orthogonal
and does not change the scores, so both are left out here, as in transformers.

Letters: as in mla.py, plus j head of the indexer, e index_head_dim, k index_topk.
"""

from abc import ABC, abstractmethod
from collections.abc import Callable, Iterable, Iterator

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from finback.kernels.attention import SCORES, torch_attention
from finback.kernels.documents import Mask, longest, visible
from finback.kernels.heads import rotate_half, rotate_interleaved
from finback.model.cache import FEW, LayerCache
from finback.model.config import ModelConfig
from finback.model.layers import Linear
from finback.model.mla import MLA

# part of the tokens -> (b or 1, part, s) bool, True for the entries that these attend to
Seen = Callable[[slice], Tensor]


class IndexerQueries(nn.Module, ABC):
    """The query side of an indexer: many heads of queries from MLA's query latent, and a weight for each, scaled by (j e)^-1/2."""

    config: ModelConfig
    query: Linear
    weight: Linear

    def queries(self, x: Tensor, q_latent: Tensor, cos: Tensor, sin: Tensor) -> tuple[Tensor, Tensor]:
        """x (b, t, hidden) and MLA's query latent (b, t, q_lora_rank) -> queries (b, t, j, e) and weights (b, t, j), fp32."""
        c = self.config
        query = self.query(q_latent).float().unflatten(-1, (c.index_n_heads, c.index_head_dim))
        scale = (c.index_n_heads * c.index_head_dim) ** -0.5
        return self.rotated(query, cos[:, :, None], sin[:, :, None]), self.weight(x).float() * scale

    def select(self, scores: Tensor, seen: Tensor, part: slice) -> Tensor:
        """The entries that a part of the tokens attends to: scores (b, part, s) and visibility -> (b, part, s) bool; see `pick`."""
        return pick(scores, seen, self.config.index_topk)

    @abstractmethod
    def rotated(self, x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
        """Rotates a part of the last dimension and leaves the rest."""

    @staticmethod
    def scores(query: Tensor, weight: Tensor, key: Tensor) -> Tensor:
        """query (b, t, j, e), weight (b, t, j), key (b, s, e) -> (b, t, s) in fp32."""
        products = torch.einsum("btje,bse->btjs", query, key.float()).relu_()
        return torch.einsum("btj,btjs->bts", weight, products)


class Indexer(IndexerQueries):
    """I[t, s] = Σ_j w[t, j] · ReLU(q[t, j] · k[s]) (V3.2 eq. 1), with w scaled by (j e)^-1/2."""

    def __init__(self, config: ModelConfig) -> None:
        super().__init__()
        c = self.config = config
        assert c.q_lora_rank is not None, "an indexer's queries come from MLA's query latent"
        self.query = Linear(c.q_lora_rank, c.index_n_heads * c.index_head_dim)
        self.key = Linear(c.hidden_size, c.index_head_dim)
        self.key_norm = nn.LayerNorm(c.index_head_dim, eps=1e-6)
        self.weight = Linear(c.hidden_size, c.index_n_heads)
        self.rotate = rotate_interleaved if c.index_rope_interleaved else rotate_half

    def keys(self, x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
        """x (b, t, hidden) -> the rotated keys (b, t, e) that are cached for later tokens."""
        key = F.layer_norm(self.key(x).float(), (self.config.index_head_dim,), *self._norm(), self.key_norm.eps)
        return self.rotated(key, cos, sin).to(x.dtype)

    def _norm(self) -> tuple[Tensor, Tensor]:
        return self.key_norm.weight.float(), self.key_norm.bias.float()

    def rotated(self, x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
        """Rotates the first r of the last dimension."""
        c = self.config
        turned, rest = x.split([c.qk_rope_head_dim, c.index_head_dim - c.qk_rope_head_dim], dim=-1)
        return torch.cat([self.rotate(turned, cos, sin), rest], dim=-1)


class SharedSelection:
    """What an indexer selected in the last pass, for the layers that share it (GLM-5)."""

    def __init__(self) -> None:
        # (b, t, k) as `listed` returns it
        self.ids = torch.empty(0, dtype=torch.long)


class DSA(MLA):
    """MLA over the tokens that an Indexer selects, in MLA's two forms."""

    # where other layers find the selection, if any share it
    selection: SharedSelection | None = None

    def __init__(self, config: ModelConfig) -> None:
        super().__init__(config)
        self.indexer = Indexer(config)

    def forward(
        self, x: Tensor, cos: Tensor, sin: Tensor, cache: LayerCache | None = None, attention_mask: Mask = None
    ) -> Tensor:
        """As MLA.forward. A cache stores [latent | rotary key | the indexer's key] per token.

        The selection has no gradient to the indexer, which learns only from the main attention's weights (V3.2 2.1.1).
        """
        c, length = self.config, x.size(1)
        q_latent, kv = self.inputs(x)
        if cache is None and longest(attention_mask, length) <= c.index_topk:  # nothing to choose
            return self.out(self.attend_rows(self.q_of(q_latent), kv, cos, sin, attention_mask))
        q_nope, q_rope = self.queries(self.q_of(q_latent), cos, sin)
        latent, k_rope = self.latents(kv, cos, sin)
        with torch.no_grad():
            key = self.keys(x, cos, sin)
        if cache is not None:
            cache.append(torch.cat([latent, k_rope, key], dim=-1))
            if cache.reach <= c.index_topk:
                return self.out(self.attend_stored(q_nope, q_rope, latent, k_rope, cache))
        asker, entry = (x, q_latent, cos, sin), c.kv_lora_rank + c.qk_rope_head_dim
        if cache is None or cache.fresh:
            seen: Seen = lambda part: visible(attention_mask, part, length, x.device)  # noqa: E731
            return self.out(self._attend_blocks(q_nope, q_rope, latent, k_rope, self.picker(asker, lambda: key, seen)))
        mask = cache.mask()
        picked = self.picker(asker, lambda: cache.stored(entry).to(x.dtype), lambda part: mask[:, part])
        if length <= min(FEW, self.longest_absorbed):
            return self.out(self._attend_chosen(q_nope, q_rope, cache, picked(slice(None))))
        latent, k_rope = cache.stored()[..., :entry].to(x.dtype).split([c.kv_lora_rank, c.qk_rope_head_dim], dim=-1)
        return self.out(self._attend_blocks(q_nope, q_rope, latent, k_rope, picked))

    def keys(self, x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
        """x (b, t, hidden) -> the indexer's keys (b, t, e), which the cache stores."""
        return self.indexer.keys(x, cos, sin)

    @torch.no_grad()
    def picker(self, asker: tuple[Tensor, ...], keys: Callable[[], Tensor], seen: Seen) -> Seen:
        """Which of the entries with these keys (b, s, e) are selected among the visible ones, for a part of the tokens.

        asker: the arguments of `IndexerQueries.queries`.
        """
        (query, weight), key, rows = self.indexer.queries(*asker), keys(), self.begin_selection(asker[0])

        @torch.no_grad()
        def picked(part: slice) -> Tensor:
            looked = self.indexer.select(self.indexer.scores(query[:, part], weight[:, part], key), seen(part), part)
            if rows is not None:
                rows[:, part] = listed(looked, seen(part), self.config.index_topk)
            return looked

        return picked

    def begin_selection(self, x: Tensor) -> Tensor | None:
        """The lists (b, t, k) that a pass over x (b, t, hidden) fills for layers that share its selection."""
        if self.selection is None:
            return None
        ids = torch.full((*x.shape[:2], self.config.index_topk), -1, device=x.device)
        self.selection.ids = ids
        return ids

    def _attend_blocks(self, q_nope: Tensor, q_rope: Tensor, latent: Tensor, k_rope: Tensor, picked: Seen) -> Tensor:
        """Attention of t tokens over the selected ones of s, one block of queries at a time -> (b, t, h·v)."""
        key, value = self.expanded(latent, k_rope)
        query = torch.cat([q_nope, q_rope], dim=-1).transpose(1, 2)
        read = [
            torch_attention(query[:, :, part], key, value, self.scale, picked(part))
            for part in self.parts(query.size(2), latent.size(1), len(query))
        ]
        return torch.cat(read, dim=2).transpose(1, 2).flatten(2)

    def _attend_chosen(self, q_nope: Tensor, q_rope: Tensor, cache: LayerCache, picked: Tensor) -> Tensor:
        """Attention of a few new tokens over the selected entries, which are the only ones read -> (b, t, h·v)."""
        c, entry = self.config, self.config.kv_lora_rank + q_rope.size(-1)
        counts, place = picked.to(torch.int8).sort(dim=-1, descending=True, stable=True)
        most = min(c.index_topk, picked.size(-1))
        counts, place = counts[..., :most].bool(), place[..., :most]
        stored = cache.at(place)[..., :entry].to(q_nope.dtype)  # (b, t, k, c + r)
        w_uk, w_uv = self.absorbed_weights(q_nope.dtype)
        query = torch.cat([self.into_latents(q_nope, w_uk), q_rope], dim=-1)
        weights = (torch.einsum("bthc,btkc->bthk", query, stored).float() * self.scale).masked_fill(
            ~counts[:, :, None], float("-inf")
        )
        read = torch.einsum("bthk,btkc->bthc", weights.softmax(dim=-1).to(query.dtype), stored[..., : c.kv_lora_rank])
        return self.out_of_latents(read, w_uv).flatten(2)

    def parts(self, queries: int, keys: int, rows: int) -> Iterator[slice]:
        """Blocks of queries whose scores for all indexer heads fit SCORES."""
        size = max(1, SCORES // (rows * keys * self.config.index_n_heads))
        for start in range(0, queries, size):
            yield slice(start, min(start + size, queries))


class SharedDSA(DSA):
    """DSA without an indexer, over what the last indexer below has selected (GLM-5); its cache entries have no key."""

    def __init__(self, config: ModelConfig) -> None:
        MLA.__init__(self, config)

    def keys(self, x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
        """Zeros in place of keys."""
        return x.new_zeros(*x.shape[:2], self.config.index_head_dim)

    def picker(self, asker: tuple[Tensor, ...], keys: Callable[[], Tensor], seen: Seen) -> Seen:
        """As DSA.picker, without computing scores."""
        assert self.selection is not None, "layers that share are linked by share_selections"
        ids = self.selection.ids
        assert ids.shape[:2] == asker[0].shape[:2], "the selection is of another pass"
        return lambda part: marked(ids[:, part], seen(part))


def share_selections(blocks: Iterable[nn.Module]) -> None:
    """Links those of a model's blocks, given in order, that share an indexer."""
    leader: DSA | None = None
    for attention in (block.attention for block in blocks):
        if isinstance(attention, SharedDSA):
            assert leader is not None, "the first layer has an indexer"
            attention.selection = leader.selection = leader.selection or SharedSelection()
        elif isinstance(attention, DSA):
            leader = attention


def listed(picked: Tensor, seen: Tensor, k: int) -> Tensor:
    """picked (b, t, s) -> indices of the k selected entries (b, t, k), ascending; all -1 if every visible one is selected."""
    if k >= picked.size(-1):
        return torch.full((*picked.shape[:-1], k), -1, device=picked.device)
    ids = picked.to(torch.int8).topk(k, dim=-1).indices.sort(dim=-1).values
    return ids.masked_fill((picked == seen).all(dim=-1, keepdim=True), -1)


def marked(ids: Tensor, others: Tensor) -> Tensor:
    """The inverse of `listed`: indices (b, t, k) -> (b, t, s) bool; tokens with -1 get their row of `others`."""
    # an additional column receives the -1
    known = torch.zeros(*ids.shape[:2], others.size(-1) + 1, dtype=torch.bool, device=ids.device)
    return torch.where(ids[..., :1] >= 0, known.scatter_(-1, ids.long() + 1, True)[..., 1:], others)


def pick(scores: Tensor, seen: Tensor, k: int) -> Tensor:
    """True for the k highest scores (b, t, s) among the visible ones, or for all visible ones if there are fewer.

    Among equal scores (ReLU produces many zeros) the latest are taken: the selection depends neither on padding nor on how many
    tokens are computed at once.
    """
    if k >= scores.size(-1):
        return seen.expand_as(scores)
    scores = scores.masked_fill(~seen, float("-inf"))
    least = scores.topk(k, dim=-1).values[..., -1:]
    above, equal = scores > least, (scores == least) & seen
    room = k - above.sum(dim=-1, keepdim=True)
    return above | (equal & (equal.flip(-1).cumsum(dim=-1).flip(-1) <= room))
