"""The windows of tokens that V4 compresses into one entry each.

Letters: b batch, t token, n window, m tokens of a window.
"""

from dataclasses import dataclass

import torch
from torch import Tensor

from finback.kernels.documents import Mask, positions, visible


@dataclass(frozen=True)
class CompressedWindows:
    """The complete windows of rows; rows with fewer windows are padded at the end."""

    # token indices of each window, (b or 1, n, m)
    index: Tensor
    # whether it is a real window, not padding, (b or 1, n)
    real: Tensor
    # whether the previous window is in the same document, (b or 1, n)
    follows: Tensor

    def seen(self, mask: Mask, part: slice, length: int) -> Tensor:
        """(b or 1, part, n) bool, True where a query sees a window's last token, and therefore its entry."""
        tokens = visible(mask, part, length, self.index.device)
        return tokens.take_along_dim(self.index[:, None, :, -1], dim=2) & self.real[:, None]


def windows_of(mask: Mask, length: int, size: int, device: torch.device) -> CompressedWindows:
    """The windows of `size` tokens in rows of this length, counted from the start of each document."""
    place = positions(mask, length, device)
    last = place % size == size - 1
    counts = last.sum(dim=1)
    most = int(counts.max())
    ends = last.to(torch.int8).argsort(dim=1, descending=True, stable=True)[:, :most]
    index = ends[:, :, None] + torch.arange(1 - size, 1, device=device)
    real = torch.arange(most, device=device) < counts[:, None]
    return CompressedWindows(index.clamp(min=0), real, place.gather(1, ends) >= size)


def windowed(x: Tensor, index: Tensor) -> Tensor:
    """The tokens of each window: x (b, t, w), index (b or 1, n, m) -> (b, n, m, w)."""
    place = index.flatten(1)[:, :, None].expand(len(x), -1, x.size(-1))
    return x.gather(1, place).unflatten(1, index.shape[1:])
