"""The KV cache: pages of a pool, and the view that one forward pass has of them.

A page holds the entries of `size` consecutive tokens, at the same place for every layer. The engine decides which pages belong
to which request; attention layers read and extend them.
"""

from collections.abc import Collection, Sequence
from dataclasses import dataclass, replace

import torch
from torch import Tensor

from finback.kernels import decode, native, reference
from finback.kernels.decode import PagedRows
from finback.model.config import ModelConfig
from finback.model.rope_scaling import LongRope

PAGE = 16  # tokens; requests share whole pages
FEW = 8  # up to this many new tokens per row, pages are read in place instead of being gathered for one large product


class Pool:
    """Storage of all layers, (layers, pages · size, elements); for the last dimension see ModelConfig.cache_elements.

    Page 0 is for the entries of padding. `drafts` adds a layer for the first MTP module; `choices` names what else is stored
    per token: the "experts" that it is routed to, the "entries" that its indexers select.
    """

    def __init__(
        self,
        config: ModelConfig,
        pages: int,
        dtype: torch.dtype,
        device: torch.device,
        drafts: bool = False,
        choices: Collection[str] = (),
    ) -> None:
        layers, self.size = config.num_hidden_layers + drafts, PAGE
        self.drafts = drafts
        self.lined = False  # whether a row has state besides its pages, see `line`
        # under LongRoPE the stored keys of a prefix depend on the length of the whole row
        self.reusable = not isinstance(config.rope_scaling, LongRope)
        # the system allocates memory when it is first touched, so a large pool costs nothing until it is used
        self.data = torch.zeros(layers, pages * self.size, config.cache_elements, dtype=dtype, device=device)
        # (pages · size, modules, k) each; see choice_shapes
        self.choices = {
            name: torch.zeros(pages * self.size, *shape, dtype=ids, device=device)
            for name, (shape, ids) in choice_shapes(config).items()
            if name in choices
        }

    def copy(self, pages: Sequence[int], to: Sequence[int]) -> None:
        """Copies the contents of some pages to others."""
        device = self.data.device
        source, target = (torch.tensor(list(numbers), device=device) for numbers in (pages, to))
        stored = self.data.unflatten(1, (-1, self.size))
        stored[:, target] = stored[:, source]
        for chosen in self.choices.values():
            of_pages = chosen.unflatten(0, (-1, self.size))
            of_pages[target] = of_pages[source]

    def line(self, row: int) -> list[Tensor]:
        """A copy of the state that a running row has besides its pages, for `continue_from`; empty here."""
        return []

    def continue_from(self, row: int, line: list[Tensor]) -> None:
        """Restores in a row the state that `line` copied from another."""

    @property
    def bytes_per_token(self) -> int:
        """Bytes per token over all layers, choices included (70,272 for V3 in bf16 without drafts and choices)."""
        return self.data.size(0) * self.data.size(2) * self.data.element_size() + self.choice_bytes

    @property
    def choice_bytes(self) -> int:
        """Bytes of recorded choices per token."""
        return sum(chosen[0].numel() * chosen.element_size() for chosen in self.choices.values())


def choice_shapes(config: ModelConfig) -> dict[str, tuple[tuple[int, int], torch.dtype]]:
    """Shape (modules, k) and dtype of a token's choices, by kind.

    experts: modules are all layers; dense ones store 0. entries: modules are the layers with indexers, see picking.py.
    """
    ids = torch.uint8 if config.n_routed_experts <= 256 else torch.int16
    places = torch.int16 if config.max_position_embeddings <= 1 << 15 else torch.int32
    experts, entries = (config.num_hidden_layers, config.num_experts_per_tok), (config.indexers, config.index_topk)
    return {"experts": (experts, ids), "entries": (entries, places)}


class Cache:
    """The rows of one forward pass: `new` tokens each, after the `lengths` that their pages already hold.

    table (rows, pages) lists each row's pages in order. Rows may have fewer tokens than `new`: `counts` gives their number, the
    rest is padding at the end and goes to page 0. Entries before starts (rows,) are masked. `reaches` (rows,) is the known total
    length of each row, at least what is stored after this pass.
    """

    def __init__(
        self,
        pool: Pool,
        table: Tensor,
        lengths: Sequence[int],
        new: int,
        counts: Sequence[int] | None = None,
        starts: Sequence[int] | None = None,
        reaches: Sequence[int] | None = None,
    ) -> None:
        self.pool, self.table = pool, table.contiguous()
        device = table.device
        self.fresh = not any(lengths)  # no tokens stored before this pass
        self.lengths = torch.tensor(lengths, device=device)
        known = reaches or [0] * len(lengths)
        stored = (n + k for n, k in zip(lengths, counts or [new] * len(lengths), strict=True))
        self.reaches = torch.tensor([max(pair) for pair in zip(known, stored, strict=True)], device=device)
        self.starts = None if starts is None else torch.tensor(starts, device=device)
        self.positions = self.lengths[:, None] + torch.arange(new, device=device)  # (rows, new)
        pages = (self.positions // pool.size).clamp(max=table.size(1) - 1)
        slots = table.gather(1, pages) * pool.size + self.positions % pool.size
        if counts is not None and min(counts) < new:
            padding = torch.arange(new, device=device) >= torch.tensor(counts, device=device)[:, None]
            slots = slots.masked_fill(padding, 0)
            # padding may be beyond the last position; its rotation does not matter
            self.positions = self.positions.masked_fill(padding, 0)
        self.slots = slots.flatten()
        self.few = new <= FEW
        # whether the C++ kernels handle this pass
        self.native = self.few and native.ready(pool.data)

    def layer(self, index: int) -> "LayerCache":
        """The view of one layer."""
        rows = self.pool.data[index], self.slots, self.table, self.lengths, self.starts, self.pool.size
        return LayerCache(*rows, self.fresh, self.few, self.native)


@dataclass
class LayerCache(PagedRows):
    """One layer of a Cache; its other fields are those of the Cache."""

    fresh: bool
    few: bool
    native: bool

    def append(self, entries: Tensor) -> None:
        """Stores the new tokens' entries (rows, new, elements)."""
        self.entries.index_copy_(0, self.slots, entries.flatten(0, 1).to(self.entries.dtype))

    def attend(self, query: Tensor, groups: int, value_dim: int, value_at: int, scale: float) -> Tensor:
        """Attention of the new tokens over everything stored, including themselves; see reference.paged_attention."""
        form = decode.paged_attention if self.native else reference.paged_attention
        return form(query, self, groups, value_dim, value_at, scale)

    @property
    def reach(self) -> int:
        """Number of slots in a row's pages, an upper bound of its tokens."""
        return self.table.size(1) * self.size

    def stored(self, start: int = 0) -> Tensor:
        """All entries of the rows, new tokens included, from element `start` on: (rows, slots, elements)."""
        return reference.gather_pages(self, start)

    def at(self, place: Tensor) -> Tensor:
        """The entries at given slots of the rows: place (rows, new, n) -> (rows, new, n, elements)."""
        pages = self.table.gather(1, (place // self.size).flatten(1)).view_as(place)
        return self.entries[pages * self.size + place % self.size]

    def last(self, window: int) -> "LayerCache":
        """This view restricted to the last `window` entries, the new token's included; for one new token per row."""
        starts = (self.lengths + 1 - window).clamp(min=0)
        return replace(self, starts=starts if self.starts is None else starts.maximum(self.starts))

    def mask(self, window: int | None = None) -> Tensor:
        """(rows, new, slots) bool, True where a new token may attend; with a window, only to its last entries."""
        slot = torch.arange(self.table.size(1) * self.size, device=self.table.device)
        reach = self.lengths[:, None] + torch.arange(len(self.slots) // len(self.lengths), device=self.table.device)
        seen = slot <= reach[:, :, None]
        if window is not None:
            seen = seen & (slot > reach[:, :, None] - window)
        return seen if self.starts is None else seen & (slot >= self.starts[:, None, None])
