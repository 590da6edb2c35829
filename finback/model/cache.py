"""What decoding keeps of past tokens, as plain storage that attention layers read and extend.

One row per sequence, one slot per position. Rows have their own lengths: a row of length n sees slots 0..n.
"""

import torch
from torch import Tensor

from finback.model.config import ModelConfig


class Cache:
    """Storage for all layers: (layers, rows, slots, elements); see ModelConfig.cache_elements for the last.

    `lengths` (rows,) says how many tokens each row holds. A forward pass appends to every row, after which
    `advance` moves the lengths on. Prompts of unequal length are padded on the right: their `advance` counts
    only real tokens, so padding slots are overwritten by the next token and never seen.
    """

    def __init__(
        self, config: ModelConfig, rows: int, slots: int, dtype: torch.dtype, device: torch.device
    ) -> None:
        layers = config.num_hidden_layers
        self.data = torch.zeros(layers, rows, slots, config.cache_elements, dtype=dtype, device=device)
        self.lengths = torch.zeros(rows, dtype=torch.long, device=device)
        self.longest = 0  # a Python number, so that no step waits for the device
        self.new = 0

    def begin(self, new: int) -> None:
        """Announce a forward pass of `new` tokens per row."""
        assert self.longest + new <= self.data.size(2), (
            f"cache of {self.data.size(2)} slots cannot hold {new} more"
        )
        self.new = new
        slots = torch.arange(self.longest + new, device=self.lengths.device)
        queries = self.lengths[:, None] + torch.arange(new, device=self.lengths.device)
        self.positions = queries  # (rows, new)
        self.visible = slots <= queries[:, :, None]  # (rows, new, slots in use)

    def layer(self, index: int) -> "LayerCache":
        """The view of one layer for the forward pass announced by `begin`."""
        return LayerCache(self, index)

    def advance(self, counts: Tensor | int, longest: int) -> None:
        """Add real tokens per row after a forward pass; `longest` is the new maximum of lengths."""
        self.lengths = self.lengths + counts
        self.longest = longest

    def keep(self, rows: Tensor, longest: int) -> None:
        """Keep only these rows, in this order: finished sequences leave, their storage with them."""
        self.data = self.data[:, rows]
        self.lengths = self.lengths[rows]
        self.longest = longest

    @property
    def bytes_per_token(self) -> int:
        """Bytes one token occupies over all layers (70,272 for V3 in bf16)."""
        return self.data.size(0) * self.data.size(3) * self.data.element_size()


class LayerCache:
    """One layer of a Cache during one forward pass."""

    def __init__(self, cache: Cache, index: int) -> None:
        self.cache, self.index = cache, index

    @property
    def is_first(self) -> bool:
        """True when nothing was stored before this pass."""
        return self.cache.longest == 0

    def append(self, entries: Tensor) -> None:
        """Store entries (rows, new, elements) behind what each row holds."""
        cache = self.cache
        rows = torch.arange(entries.size(0), device=entries.device)[:, None]
        cache.data[self.index, rows, cache.positions] = entries.to(cache.data.dtype)

    def stored(self) -> Tensor:
        """Everything in use, new tokens included: (rows, slots, elements)."""
        return self.cache.data[self.index, :, : self.cache.longest + self.cache.new]

    def mask(self) -> Tensor:
        """(rows, new, slots): True where a new token may look."""
        return self.cache.visible
