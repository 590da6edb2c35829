"""Heavily compressed attention (HCA, V4 2.3.2): beside its window a token sees one entry for every 128 tokens before.

A compressed entry is a mixture of what the tokens of a window leave, channel by channel: softmax over the window of a gate, which
is linear in the hidden state, plus a bias of the place in the window. Windows follow each other without overlap; a token sees
the entries of all that are complete, its own if it is the window's last. An entry is rotated as its first token is.

Letters: those of swa.py, m tokens of a window, w width of an entry.
"""

import torch
from torch import Tensor

from finback.kernels.documents import Mask
from finback.model.compressed_cache import CompressedLayer
from finback.model.config import ModelConfig
from finback.model.layers import Linear, OwnStart, RMSNorm, precise
from finback.model.rope import rotate_last
from finback.model.swa import SWA, Far, Seen
from finback.model.windows import CompressedWindows, windowed, windows_of


class Compressor(OwnStart):
    """Entries of `width` numbers, one for each window of `size` tokens (V4 eq. 20-23)."""

    starts = ("position_bias",)

    # how many entries a token is in
    series = 1

    def __init__(self, config: ModelConfig, size: int, width: int) -> None:
        super().__init__()
        self.size, self.width = size, width
        self.value = Linear(config.hidden_size, self.series * width)
        self.gate = Linear(config.hidden_size, self.series * width)
        self.position_bias = precise(size, self.series * width)
        self.norm = RMSNorm(width, config.rms_norm_eps)

    def start(self, generator: torch.Generator) -> None:
        """All places of a window count alike."""
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
        """What an entry is mixed of: value and gate (b, t, series · w) -> (b, n, slots, w) of both."""
        return windowed(value, windows.index), windowed(gate, windows.index) + self.position_bias.to(gate.dtype)


class HCA(SWA):
    """A window, and all compressed entries."""

    def __init__(self, config: ModelConfig, layer: int) -> None:
        super().__init__(config, layer)
        self.compressor = self.make_compressor(config)

    def make_compressor(self, config: ModelConfig) -> Compressor:
        """That of the entries which attention reads."""
        return Compressor(config, config.compress_rate_hca, config.head_dim)

    def far(
        self, x: Tensor, q_latent: Tensor, angles: tuple[Tensor, Tensor], mask: Mask, cache: CompressedLayer | None
    ) -> Far:
        length, turned = x.size(1), torch.cat(angles, dim=-1)
        record = torch.cat([self.record(x), turned.expand(len(x), -1, -1)], dim=-1)
        if cache is not None:
            return self.read(x, q_latent, angles, cache, cache.compress(record, self.entries_of))
        windows = windows_of(mask, length, self.compressor.size, x.device)
        entries = self.entries_of(record, windows)
        return self.choose(x, q_latent, angles, entries, lambda part: windows.seen(mask, part, length))

    def record(self, x: Tensor) -> Tensor:
        """What a token leaves for the entries that it is in, (b, t, r), beside its angles."""
        return self.compressor.record(x)

    def entries_of(self, record: Tensor, windows: CompressedWindows) -> Tensor:
        """Records with angles behind them -> what is kept of each window, (b, n, w)."""
        left, angles = record.split([record.size(-1) - self.config.rope_dim, self.config.rope_dim], dim=-1)
        return self.compressor(left, angles, windows)

    def read(
        self, x: Tensor, q_latent: Tensor, angles: tuple[Tensor, Tensor], cache: CompressedLayer, count: int
    ) -> Far:
        """What is stored, the first `count` entries of each row."""
        every, new = torch.arange(count, device=x.device).expand(len(x), -1), x.size(1)
        entries = cache.read(every, slice(None)).to(x.dtype)
        return self.choose(x, q_latent, angles, entries, lambda part: cache.seen(part, new, count))

    def choose(self, x: Tensor, q_latent: Tensor, angles: tuple[Tensor, Tensor], entries: Tensor, seen: Seen) -> Far:
        """The entries that are read, and which of those that may be seen are."""
        return entries, seen
