"""V4's KV cache: the last tokens of each row uncompressed, and compressed entries for all others.

A running row has ring buffers, one for its window's entries and one for the inputs of incomplete compression windows, whose
size is independent of the row's length. Compressed entries are in pages of the pool, in the page of their window's last token,
so that a distant token costs only its share of an entry. The rings of a row are not shared: a row that starts after another's
prompt gets a copy.

Letters: b row, t new token, w width, n compressed entry.
"""

from collections.abc import Callable, Collection, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from finback.model.cache import PAGE, Cache, LayerCache, Pool
from finback.model.config import CSA, SLIDING, ModelConfig
from finback.model.windows import CompressedWindows


def kept_per_layer(config: ModelConfig, layer: int) -> tuple[int, int, int, int]:
    """For a layer: tokens per compressed entry (0: none), its width, tokens whose records are kept, and their width."""
    kind = config.layer_type(layer)
    if kind == SLIDING:
        return 0, 0, 0, 0
    if kind != CSA:
        rate, width = config.compress_rate_hca, config.head_dim
        return rate, width, rate, 2 * width + config.rope_dim
    rate, width = config.compress_rate_csa, config.head_dim + config.index_head_dim
    return rate, width, 2 * rate, 4 * width + config.rope_dim


class CompressedPool(Pool):
    """Ring buffers for `rows` rows, and pages of compressed entries, per layer.

    A rejected token, such as a wrong draft, does no harm: the entry that it overwrote in a ring is outside the window of
    the token that replaces it, and a compressed entry that it completed is written again.
    """

    def __init__(
        self,
        config: ModelConfig,
        pages: int,
        rows: int,
        dtype: torch.dtype,
        device: torch.device,
        drafts: bool = False,
        choices: Collection[str] = (),
    ) -> None:
        super().__init__(config, pages, dtype, device, drafts, choices)
        assert config.sliding_window is not None, "compressed attention has a sliding window"
        self.lined = True
        self.rates, self.windows, self.records, self.far = [], [], [], []
        for layer in range(config.num_hidden_layers + drafts):
            rate, width, kept, record = kept_per_layer(config, layer)
            self.rates.append(rate)
            self.windows.append(torch.zeros(rows, config.sliding_window, config.head_dim, dtype=dtype, device=device))
            self.records.append(torch.zeros(rows, kept, record, dtype=dtype, device=device))
            per_page = -(-PAGE // rate) if rate else 0
            self.far.append(torch.zeros(pages, per_page, width, dtype=dtype, device=device))

    def copy(self, pages: Sequence[int], to: Sequence[int]) -> None:
        """Copies the contents of some pages to others."""
        super().copy(pages, to)
        source, target = (torch.tensor(list(numbers), device=self.data.device) for numbers in (pages, to))
        for entries in self.far:
            entries[target] = entries[source]

    def line(self, row: int) -> list[Tensor]:
        return [ring[row].clone() for ring in (*self.windows, *self.records)]

    def continue_from(self, row: int, line: list[Tensor]) -> None:
        for ring, kept in zip((*self.windows, *self.records), line, strict=True):
            ring[row] = kept

    @property
    def bytes_per_token(self) -> int:
        """Bytes of compressed entries and choices per token over all layers, without rings."""
        return sum(entries[0].numel() * entries.element_size() for entries in self.far) // PAGE + self.choice_bytes


def pool_of(config: ModelConfig, pages: int, rows: int, dtype: torch.dtype, device: torch.device, **more: Any) -> Pool:
    """The pool for a config's attention, for `rows` running rows; drafts and choices as in Pool."""
    if config.attention != "compressed":
        return Pool(config, pages, dtype, device, **more)
    return CompressedPool(config, pages, rows, dtype, device, **more)


class CompressedCache(Cache):
    """A Cache on a CompressedPool; `lines` (rows,) are the rows' indices in its rings."""

    pool: CompressedPool

    def __init__(
        self,
        pool: CompressedPool,
        table: Tensor,
        lengths: Sequence[int],
        new: int,
        counts: Sequence[int] | None = None,
        starts: Sequence[int] | None = None,
        lines: Sequence[int] | None = None,
    ) -> None:
        super().__init__(pool, table, lengths, new, counts, starts)
        self.lines = torch.tensor(lines or list(range(len(lengths))), device=table.device)
        self.counts = torch.tensor(counts or [new] * len(lengths), device=table.device)

    def layer(self, index: int) -> "CompressedLayer":
        """The view of one layer."""
        pool, far = self.pool, self.pool.far[index].flatten(0, 1)
        rows = far, self.slots, self.table, self.lengths, self.starts, pool.size, self.fresh, self.few, False
        window, records = (
            Ring(ring[index], self.lines, self.lengths, self.counts) for ring in (pool.windows, pool.records)
        )
        return CompressedLayer(*rows, window, records, pool.rates[index], self.counts)


@dataclass
class Ring:
    """The last tokens of rows, token p at index p modulo the ring's size."""

    # (lines, size, w)
    store: Tensor
    # (b,) ring index of each row
    lines: Tensor
    # (b,) tokens before this pass, and new ones
    lengths: Tensor
    counts: Tensor

    def extended(self, new: Tensor) -> Tensor:
        """The last tokens in order followed by the new ones, new (b, t, w) -> (b, size + t, w); also stores the new ones.

        If a row has fewer tokens, the values before them are invalid.
        """
        size = self.store.size(1)
        place = (self.lengths[:, None] - size + torch.arange(size, device=new.device)) % size
        known = self.store[self.lines[:, None], place].to(new.dtype)
        index = torch.arange(new.size(1), device=new.device)
        kept = (index < self.counts[:, None]) & (index >= self.counts[:, None] - size)
        row, token = kept.nonzero(as_tuple=True)
        self.store[self.lines[row], (self.lengths[row] + token) % size] = new[row, token].to(self.store.dtype)
        return torch.cat([known, new], dim=1)


@dataclass
class CompressedLayer(LayerCache):
    """One layer of a CompressedCache; `entries` (slots, w) are compressed, `rate` tokens each."""

    window: Ring
    records: Ring
    rate: int
    counts: Tensor

    def near(self, part: slice, new: int) -> Tensor:
        """(b, part, size + new) bool, True for tokens of the ring and new ones that a query may attend to, window aside."""
        size, device = self.window.store.size(1), self.lengths.device
        index = torch.arange(size + new, device=device)
        own = self.lengths if self.starts is None else self.lengths - self.starts
        is_own = index >= size - own[:, None]
        return is_own[:, None] & (index <= size + torch.arange(new, device=device)[part, None])

    def compress(self, record: Tensor, entries_of: Callable[[Tensor, CompressedWindows], Tensor]) -> int:
        """Stores the entries of windows completed by the new tokens' records (b, t, r). Returns the most that a row has."""
        rows, device = self.records.extended(record), record.device
        first, after = self.lengths // self.rate, (self.lengths + self.counts) // self.rate
        number = first[:, None] + torch.arange(record.size(1) // self.rate + 1, device=device)
        real = number < after[:, None]
        start = (number * self.rate - self.lengths[:, None] + self.records.store.size(1)).clamp(min=0)
        index = (start[:, :, None] + torch.arange(self.rate, device=device)).clamp(max=rows.size(1) - 1)
        made = entries_of(rows, CompressedWindows(index, real, number > 0))
        row, place = real.nonzero(as_tuple=True)
        self.entries[self.at_entry(number)[row, place]] = made[row, place].to(self.entries.dtype)
        return int(after.max())

    def read(self, number: Tensor, part: slice) -> Tensor:
        """A slice of some entries' elements: the index (b, n) of each in its row -> (b, n, part)."""
        return self.entries[:, part][self.at_entry(number)]

    def at_entry(self, number: Tensor) -> Tensor:
        """Slots of some entries: the index (b, n) of each in its row -> (b, n)."""
        page = (self.rate * (number + 1) - 1) // self.size
        within = number - page * self.size // self.rate
        pages = self.table.gather(1, page.clamp(max=self.table.size(1) - 1))
        return pages * -(-self.size // self.rate) + within

    def seen(self, part: slice, new: int, entries: int) -> Tensor:
        """(b, part, entries) bool, True for entries whose window is complete at the new token's position."""
        reach = self.lengths[:, None] + 1 + torch.arange(new, device=self.lengths.device)[part]
        return torch.arange(entries, device=self.lengths.device) < reach[:, :, None] // self.rate
