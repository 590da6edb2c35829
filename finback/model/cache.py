"""What decoding keeps of past tokens: pages of a pool, and what one forward pass sees of them.

A page holds the entries of `size` consecutive tokens, for every layer at the same place. Which pages belong to which
request is the engine's business; here they are storage that attention layers read and extend.
"""

from collections.abc import Sequence
from dataclasses import dataclass, replace

import torch
from torch import Tensor

from finback.kernels import decode, native, reference
from finback.kernels.decode import PagedRows
from finback.model.config import ModelConfig
from finback.model.rope_scaling import LongRope

PAGE = 16  # tokens; what requests share is shared in such units
FEW = 8  # new tokens per row up to which pages are read in place rather than gathered for one large product


class Pool:
    """Storage for all layers, (layers, pages · size, elements); see ModelConfig.cache_elements for the last.

    Page 0 is nobody's: the entries of padding go there. `drafts` adds a layer for the first MTP module; `routes` room for the
    experts that each token is sent to.
    """

    def __init__(
        self,
        config: ModelConfig,
        pages: int,
        dtype: torch.dtype,
        device: torch.device,
        drafts: bool = False,
        routes: bool = False,
    ) -> None:
        layers, self.size = config.num_hidden_layers + drafts, PAGE
        self.drafts = drafts
        self.lined = False  # whether a row is more than its pages: see `line`
        # under LongRoPE what is stored of a prefix depends on how much follows it
        self.reusable = not isinstance(config.rope_scaling, LongRope)
        # the system hands out the memory as it is touched, so a large pool costs nothing until it is used
        self.data = torch.zeros(layers, pages * self.size, config.cache_elements, dtype=dtype, device=device)
        # (pages · size, layers, k), 0 in dense layers
        self.routes: Tensor | None = None
        if routes:
            shape = pages * self.size, config.num_hidden_layers, config.num_experts_per_tok
            ids = torch.uint8 if config.n_routed_experts <= 256 else torch.int16
            self.routes = torch.zeros(shape, dtype=ids, device=device)

    def copy(self, pages: Sequence[int], to: Sequence[int]) -> None:
        """Write what stands in some pages to others."""
        device = self.data.device
        source, target = (torch.tensor(list(numbers), device=device) for numbers in (pages, to))
        stored = self.data.unflatten(1, (-1, self.size))
        stored[:, target] = stored[:, source]
        if self.routes is not None:
            routes = self.routes.unflatten(0, (-1, self.size))
            routes[target] = routes[source]

    def line(self, row: int) -> list[Tensor]:
        """A copy of what is kept of a running row beside its pages, for `continue_from`: here nothing."""
        return []

    def continue_from(self, row: int, line: list[Tensor]) -> None:
        """Give a row what another had beside its pages."""

    @property
    def bytes_per_token(self) -> int:
        """Bytes one token occupies over all layers (70,272 for V3 in bf16 without drafts)."""
        return self.data.size(0) * self.data.size(2) * self.data.element_size()


class Cache:
    """The rows of one forward pass: `new` tokens each, behind the `lengths` that their pages hold already.

    table (rows, pages) names each row's pages in order. Rows may bring fewer tokens than `new`: `counts` says how
    many, the others are padding at the end and are not written. Entries before starts (rows,) are not seen. `reaches`
    (rows,) are the tokens that rows are known to have in all, at least those that are stored after this pass.
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
        self.fresh = not any(lengths)  # nothing was stored before this pass
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
            # padding may stand behind the last position there is; it is rotated by any angle
            self.positions = self.positions.masked_fill(padding, 0)
        self.slots = slots.flatten()
        self.few = new <= FEW
        # whether the C++ kernels serve this pass
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
        """Store the new tokens' entries (rows, new, elements)."""
        self.entries.index_copy_(0, self.slots, entries.flatten(0, 1).to(self.entries.dtype))

    def attend(self, query: Tensor, groups: int, value_dim: int, value_at: int, scale: float) -> Tensor:
        """Attention of the new tokens over all that is stored, them included; see reference.paged_attention."""
        form = decode.paged_attention if self.native else reference.paged_attention
        return form(query, self, groups, value_dim, value_at, scale)

    @property
    def reach(self) -> int:
        """Slots of a row's pages: no row holds more tokens."""
        return self.table.size(1) * self.size

    def stored(self, start: int = 0) -> Tensor:
        """Everything the rows hold, new tokens included, of each entry from `start` on: (rows, slots, elements)."""
        return reference.gather_pages(self, start)

    def at(self, place: Tensor) -> Tensor:
        """The entries at places of the rows' slots: place (rows, new, n) -> (rows, new, n, elements)."""
        pages = self.table.gather(1, (place // self.size).flatten(1)).view_as(place)
        return self.entries[pages * self.size + place % self.size]

    def last(self, window: int) -> "LayerCache":
        """The same of which one new token per row sees the last `window` entries, its own included."""
        starts = (self.lengths + 1 - window).clamp(min=0)
        return replace(self, starts=starts if self.starts is None else starts.maximum(self.starts))

    def mask(self, window: int | None = None) -> Tensor:
        """(rows, new, slots): True where a new token may look; with a window at its last entries alone."""
        slot = torch.arange(self.table.size(1) * self.size, device=self.table.device)
        reach = self.lengths[:, None] + torch.arange(len(self.slots) // len(self.lengths), device=self.table.device)
        seen = slot <= reach[:, :, None]
        if window is not None:
            seen = seen & (slot > reach[:, :, None] - window)
        return seen if self.starts is None else seen & (slot >= self.starts[:, None, None])
