"""Compressed sparse attention (CSA, V4 2.3.1): one entry per 4 tokens, and an indexer selects a few entries.

Entries overlap: a token produces two series of values and gates, one for the entry of its own window and one for that of the
next window, so that an entry mixes the values of 8 tokens, with a stride of 4. The lightning indexer is V3.2's (dsa.py), with
keys that are compressed in the same way into separate, narrower entries.

Letters: as in hca.py, plus j head of the indexer, e index_head_dim.
"""

import torch
from torch import Tensor

from finback.model.compressed_cache import CompressedLayer
from finback.model.config import ModelConfig
from finback.model.dsa import IndexerQueries, Seen
from finback.model.hca import HCA, Compressor
from finback.model.layers import Linear
from finback.model.replace import recast
from finback.model.rope import rotate_last
from finback.model.rounding import RoundedIndexer
from finback.model.swa import Far
from finback.model.windows import CompressedWindows, windowed


class OverlappingCompressor(Compressor):
    """Entries over two windows' tokens; the first half of the channels belongs to the earlier window (V4 eq. 9-12)."""

    series = 2

    def slots(self, value: Tensor, gate: Tensor, windows: CompressedWindows) -> tuple[Tensor, Tensor]:
        earlier = (windows.index - self.size).clamp(min=0)
        biases = self.position_bias.to(gate.dtype).chunk(2, dim=-1)
        values, gates = (x.chunk(2, dim=-1) for x in (value, gate))
        both = torch.cat([windowed(values[0], earlier), windowed(values[1], windows.index)], dim=2)
        before = (windowed(gates[0], earlier) + biases[0]).masked_fill(~windows.follows[..., None, None], float("-inf"))
        return both, torch.cat([before, windowed(gates[1], windows.index) + biases[1]], dim=2)


class CompressedIndexer(IndexerQueries):
    """I[t, n] = Σ_j w[t, j] · ReLU(q[t, j] · k[n]) with compressed keys (V4 eq. 13-16)."""

    def __init__(self, config: ModelConfig) -> None:
        super().__init__()
        c = self.config = config
        assert c.q_lora_rank is not None, "compressed attention has a query latent"
        self.query = Linear(c.q_lora_rank, c.index_n_heads * c.index_head_dim)
        self.weight = Linear(c.hidden_size, c.index_n_heads)
        self.compressor = OverlappingCompressor(config, c.compress_rate_csa, c.index_head_dim)

    def rotated(self, x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
        """Rotates the end of the last dimension."""
        return rotate_last(x, cos.float(), sin.float())


class CSA(HCA):
    """A window, and the `index_topk` compressed entries that the indexer selects, or all if there are no more.

    The stored record of a window is [entry | the indexer's key].
    """

    def __init__(self, config: ModelConfig, layer: int) -> None:
        super().__init__(config, layer)
        self.indexer = CompressedIndexer(config)
        if config.index_fp4:
            recast(self.indexer, RoundedIndexer)  # type: ignore[type-abstract]  # laid over a class that rotates

    def make_compressor(self, config: ModelConfig) -> Compressor:
        return OverlappingCompressor(config, config.compress_rate_csa, config.head_dim)

    def record(self, x: Tensor) -> Tensor:
        with torch.no_grad():
            key = self.indexer.compressor.record(x)
        return torch.cat([self.compressor.record(x), key], dim=-1)

    def entries_of(self, record: Tensor, windows: CompressedWindows) -> Tensor:
        c = self.config
        left, keys, angles = record.split([4 * c.head_dim, 4 * c.index_head_dim, c.rope_dim], dim=-1)
        with torch.no_grad():
            key = self.indexer.compressor(keys, angles, windows)
        return torch.cat([self.compressor(left, angles, windows), key], dim=-1)

    def read(
        self, x: Tensor, q_latent: Tensor, angles: tuple[Tensor, Tensor], cache: CompressedLayer, count: int
    ) -> Far:
        """A single new token reads all keys, but only the selected entries."""
        c, most = self.config, self.config.index_topk
        if x.size(1) > 1 or count <= most:
            return super().read(x, q_latent, angles, cache, count)
        every = torch.arange(count, device=x.device).expand(len(x), -1)
        keys = cache.read(every, slice(c.head_dim, None)).to(x.dtype)
        one = slice(None)
        picked = self.picker(x, q_latent, angles, keys, lambda part: cache.seen(part, 1, count))(one)[:, 0]
        places = picked.to(torch.int8).sort(dim=-1, descending=True, stable=True).indices[:, :most]
        entries = cache.read(places, slice(c.head_dim)).to(x.dtype)
        return entries, lambda part: picked.gather(1, places)[:, None]

    def choose(self, x: Tensor, q_latent: Tensor, angles: tuple[Tensor, Tensor], entries: Tensor, seen: Seen) -> Far:
        entries, keys = entries.split([self.config.head_dim, self.config.index_head_dim], dim=-1)
        if entries.size(1) <= self.config.index_topk:  # nothing to choose
            return entries, seen
        return entries, self.picker(x, q_latent, angles, keys, seen)

    @torch.no_grad()
    def picker(self, x: Tensor, q_latent: Tensor, angles: tuple[Tensor, Tensor], keys: Tensor, seen: Seen) -> Seen:
        """Which of the entries with these keys (b, n, e) the indexer selects among the visible ones."""
        query, weight = self.indexer.queries(x, q_latent, *angles)

        @torch.no_grad()
        def picked(part: slice) -> Tensor:
            scores = self.indexer.scores(query[:, part], weight[:, part], keys)
            return self.indexer.select(scores, seen(part), part)

        return picked
