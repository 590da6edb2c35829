"""Heavily compressed attention (HCA, V4 2.3.2): besides its window, a token sees one entry per 128 earlier tokens.

A compressed entry is a per-channel mixture of its window's token values: softmax over the window of a gate that is linear in the
hidden state, plus a bias for the position in the window. Windows do not overlap; a token sees the entries of all complete
windows, including the one that it completes. An entry is rotated like its first token.

Letters: as in swa.py, plus m tokens of a window, w width of an entry.
"""

import torch
from torch import Tensor

from finback.kernels.documents import Mask
from finback.model.compressed_cache import CompressedLayer
from finback.model.config import ModelConfig
from finback.model.dsa import Seen
from finback.model.layers import Linear, OwnStart, RMSNorm, precise
from finback.model.rope import rotate_last
from finback.model.swa import SWA, Far, shifted
from finback.model.windows import CompressedWindows, windowed, windows_of


class Compressor(OwnStart):
    """Entries of `width` elements, one per window of `size` tokens (V4 eq. 20-23)."""

    starts = ("position_bias",)

    # number of entries that a token contributes to
    series = 1

    def __init__(self, config: ModelConfig, size: int, width: int) -> None:
        super().__init__()
        self.size, self.width = size, width
        self.value = Linear(config.hidden_size, self.series * width)
        self.gate = Linear(config.hidden_size, self.series * width)
        self.position_bias = precise(size, self.series * width)
        self.norm = RMSNorm(width, config.rms_norm_eps)

    def start(self, generator: torch.Generator) -> None:
        """Equal weights for all positions in a window."""
        self.position_bias.zero_()

    def record(self, x: Tensor) -> Tensor:
        """x (b, t, hidden) -> value and gate of each token, (b, t, 2 · series · w)."""
        return torch.cat([self.value(x), self.gate(x)], dim=-1)

    def forward(self, record: Tensor, angles: Tensor, windows: CompressedWindows) -> Tensor:
        """Records of tokens, and their angles (b or 1, t, [cos | sin]) -> rotated entries (b, n, w)."""
        value, gate = record.chunk(2, dim=-1)
        value, gate = self.slots(value, gate, windows)
        entry = self.norm((value * gate.float().softmax(dim=2).to(value.dtype)).sum(dim=2))
        return rotate_last(entry, *angles.take_along_dim(windows.index[:, :, :1], dim=1).chunk(2, dim=-1))

    def slots(self, value: Tensor, gate: Tensor, windows: CompressedWindows) -> tuple[Tensor, Tensor]:
        """The inputs of each entry's mixture: value and gate (b, t, series · w) -> (b, n, slots, w) of both."""
        return windowed(value, windows.index), windowed(gate, windows.index) + self.position_bias.to(gate.dtype)


class HCA(SWA):
    """A window, and all compressed entries."""

    def __init__(self, config: ModelConfig, layer: int) -> None:
        super().__init__(config, layer)
        self.compressor = self.make_compressor(config)

    def make_compressor(self, config: ModelConfig) -> Compressor:
        """The compressor of the entries that attention reads."""
        return Compressor(config, config.compress_rate_hca, config.head_dim)

    def far(
        self, x: Tensor, q_latent: Tensor, angles: tuple[Tensor, Tensor], mask: Mask, cache: CompressedLayer | None
    ) -> Far:
        turned = torch.cat(angles, dim=-1)
        record = torch.cat([self.record(x), turned.expand(len(x), -1, -1)], dim=-1)
        if cache is not None:
            return self.read(x, q_latent, angles, cache, cache.compress(record, self.entries_of))
        record, first = self.whole(record), self.first(x.size(1))
        length = record.size(1)
        windows = windows_of(mask, length, self.compressor.size, x.device)
        entries = self.entries_of(record, windows)
        return self.choose(x, q_latent, angles, entries, lambda part: windows.seen(mask, shifted(part, first), length))

    def record(self, x: Tensor) -> Tensor:
        """A token's contribution to its entries, (b, t, r), without its angles."""
        return self.compressor.record(x)

    def entries_of(self, record: Tensor, windows: CompressedWindows) -> Tensor:
        """Records followed by angles -> the stored value of each window, (b, n, w)."""
        left, angles = record.split([record.size(-1) - self.config.rope_dim, self.config.rope_dim], dim=-1)
        return self.compressor(left, angles, windows)

    def read(
        self, x: Tensor, q_latent: Tensor, angles: tuple[Tensor, Tensor], cache: CompressedLayer, count: int
    ) -> Far:
        """The stored entries, the first `count` of each row."""
        every, new = torch.arange(count, device=x.device).expand(len(x), -1), x.size(1)
        entries = cache.read(every, slice(None)).to(x.dtype)
        return self.choose(x, q_latent, angles, entries, lambda part: cache.seen(part, new, count))

    def choose(self, x: Tensor, q_latent: Tensor, angles: tuple[Tensor, Tensor], entries: Tensor, seen: Seen) -> Far:
        """The entries to read, and which of the visible ones are selected."""
        return entries, seen
