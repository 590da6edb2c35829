"""Heavily compressed attention (HCA, V4 2.3.2): beside its window a token sees one entry for every 128 tokens before.

A compressed entry is a mixture of what the tokens of a window leave, channel by channel: softmax over the window of a gate, which
is linear in the hidden state, plus a bias of the place in the window. CompressedWindows follow each other without overlap; a token sees
the entries of all that are complete, its own if it is the window's last. An entry is rotated as its first token is.

Letters: those of swa.py, m tokens of a window, w width of an entry.
"""

from dataclasses import dataclass

import torch
from torch import Tensor

from finback.kernels.documents import Mask, positions, visible
from finback.model.config import ModelConfig
from finback.model.layers import Linear, OwnStart, RMSNorm, precise
from finback.model.rope import rotate_last
from finback.model.swa import SWA, Far


@dataclass(frozen=True)
class CompressedWindows:
    """Where the complete windows of rows lie; a row with fewer than others has made-up ones at the end."""

    # the tokens of each window, (b or 1, n, m)
    index: Tensor
    # whether it is a row's, (b or 1, n)
    real: Tensor
    # whether the window before it is of the same document, (b or 1, n)
    follows: Tensor

    def seen(self, mask: Mask, part: slice, length: int) -> Tensor:
        """(b or 1, part, n) True where a query sees a window's last token, and so its entry."""
        tokens = visible(mask, part, length, self.index.device)
        return tokens.take_along_dim(self.index[:, None, :, -1], dim=2) & self.real[:, None]


def windows_of(mask: Mask, length: int, size: int, device: torch.device) -> CompressedWindows:
    """The windows of `size` tokens in rows of this length, counted from each document's first token on."""
    place = positions(mask, length, device)
    last = place % size == size - 1
    counts = last.sum(dim=1)
    most = int(counts.max())
    ends = last.to(torch.int8).argsort(dim=1, descending=True, stable=True)[:, :most]
    index = ends[:, :, None] + torch.arange(1 - size, 1, device=device)
    real = torch.arange(most, device=device) < counts[:, None]
    return CompressedWindows(index.clamp(min=0), real, place.gather(1, ends) >= size)


class Compressor(OwnStart):
    """Entries of `width` numbers, one for each window of `size` tokens (V4 eq. 20-23)."""

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

    def forward(self, x: Tensor, windows: CompressedWindows, cos: Tensor, sin: Tensor) -> Tensor:
        """x (b, t, hidden), cos and sin (b or 1, t, r / 2) -> rotated entries (b, n, w)."""
        value, gate = self.slots(self.value(x), self.gate(x), windows)
        entry = self.norm((value * gate.float().softmax(dim=2).to(value.dtype)).sum(dim=2))
        return rotate_last(entry, *(table.take_along_dim(windows.index[:, :, :1], dim=1) for table in (cos, sin)))

    def slots(self, value: Tensor, gate: Tensor, windows: CompressedWindows) -> tuple[Tensor, Tensor]:
        """What an entry is mixed of: value and gate (b, t, series · w) -> (b, n, slots, w) of both."""
        return windowed(value, windows.index), windowed(gate, windows.index) + self.position_bias.to(gate.dtype)


def windowed(x: Tensor, index: Tensor) -> Tensor:
    """The tokens of each window: x (b, t, w), index (b or 1, n, m) -> (b, n, m, w)."""
    place = index.flatten(1)[:, :, None].expand(len(x), -1, x.size(-1))
    return x.gather(1, place).unflatten(1, index.shape[1:])


class HCA(SWA):
    """A window, and all compressed entries."""

    def __init__(self, config: ModelConfig, layer: int) -> None:
        super().__init__(config, layer)
        self.compressor = Compressor(config, config.compress_rate_hca, config.head_dim)

    def far(self, x: Tensor, q_latent: Tensor, cos: Tensor, sin: Tensor, mask: Mask) -> Far:
        windows = windows_of(mask, x.size(1), self.compressor.size, x.device)
        return self.compressor(x, windows, cos, sin), lambda part: windows.seen(mask, part, x.size(1))
