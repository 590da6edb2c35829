"""Common parts of V4's three kinds of attention (V4 2.3): a sliding window of entries that are key and value of all heads.

Each token has one entry (head_dim elements), a normed projection of its hidden state, rotated in its last dimensions. Queries
come from a latent as in MLA and are normed per head. The softmax has one additional term per head, a trained sink, which takes
weight but has no value. Since values are rotated too, the output is rotated back by the query's own position, so that an entry's
contribution depends only on its distance. Groups of heads are projected separately, then together.

SWA is the plain kind, with a window only; hca.py and csa.py add compressed entries.

Letters: b batch, t query, s entry, h head, c head_dim, n compressed entry.
"""

from collections.abc import Iterator

import torch
from torch import Tensor

from finback.kernels.attention import SCORES, sink_attention
from finback.kernels.documents import Mask, visible
from finback.model.cache import LayerCache
from finback.model.compressed_cache import CompressedLayer
from finback.model.config import SLIDING, ModelConfig
from finback.model.dsa import Seen
from finback.model.layers import GroupedLinear, Linear, OwnStart, RMSNorm, UnweightedNorm, precise
from finback.model.rope import rotate_last, softmax_scale, unrotate_last

# compressed entries (b, n, c), and their visibility
Far = tuple[Tensor, Seen]


class SWA(OwnStart):
    """Attention over the last `sliding_window` tokens, itself included."""

    starts = ("sink",)

    def __init__(self, config: ModelConfig, layer: int) -> None:
        super().__init__()
        c = self.config = config
        assert c.q_lora_rank is not None and c.sliding_window is not None, (
            "compressed attention has a query latent and a window"
        )
        self.window = c.sliding_window
        # which half of each row of the rotary tables this layer uses
        self.own = int(c.layer_type(layer) == SLIDING)
        self.q_down = Linear(c.hidden_size, c.q_lora_rank)
        self.q_norm = RMSNorm(c.q_lora_rank, c.rms_norm_eps)
        self.q_up = Linear(c.q_lora_rank, c.num_attention_heads * c.head_dim)
        self.query_norm = UnweightedNorm(c.rms_norm_eps)
        self.entry = Linear(c.hidden_size, c.head_dim)
        self.entry_norm = RMSNorm(c.head_dim, c.rms_norm_eps)
        self.out_down = GroupedLinear(
            c.num_attention_heads * c.head_dim // c.o_groups, c.o_groups * c.o_lora_rank, c.o_groups
        )
        self.out = Linear(c.o_groups * c.o_lora_rank, c.hidden_size)
        self.sink = precise(c.num_attention_heads)
        self.scale = softmax_scale(config)

    def start(self, generator: torch.Generator) -> None:
        """Sinks start like one more key with score 0."""
        self.sink.zero_()

    def forward(
        self, x: Tensor, cos: Tensor, sin: Tensor, cache: LayerCache | None = None, attention_mask: Mask = None
    ) -> Tensor:
        """x (b, t, hidden) -> (b, t, hidden); cos and sin (b or 1, t, r) of the tokens' positions, for both kinds of layers.

        With a cache the new tokens continue its rows. Without one, attention_mask may restrict which tokens see which; by default
        all earlier ones are visible.
        """
        assert cache is None or isinstance(cache, CompressedLayer), "compressed attention needs its own kind of cache"
        c, new = self.config, x.size(1)
        cos, sin = (table.chunk(2, dim=-1)[self.own].to(x.dtype) for table in (cos, sin))
        q_latent = self.q_norm(self.q_down(x))
        query = self.query_norm(self.q_up(q_latent).unflatten(-1, (c.num_attention_heads, c.head_dim)))
        query = rotate_last(query, cos[:, :, None], sin[:, :, None]).transpose(1, 2)
        entries = rotate_last(self.entry_norm(self.entry(x)), cos, sin)
        far = self.far(x, q_latent, (cos, sin), attention_mask, cache)
        if cache is None:
            rows, first = self.whole(entries), self.first(new)
            length, entries = rows.size(1), rows[:, : first + new]
            whole: Seen = lambda part: visible(attention_mask, shifted(part, first), length, x.device)  # noqa: E731
            near: Seen = lambda part: whole(part)[:, :, : first + new]  # noqa: E731
        else:
            entries, near = cache.window.extended(entries), lambda part: cache.near(part, new)
        read = self.attend(query, entries, near, far).transpose(1, 2)
        read = unrotate_last(read, cos[:, :, None], sin[:, :, None])
        return self.out(self.out_down(read.flatten(2).unflatten(-1, (c.o_groups, -1))))

    def whole(self, x: Tensor) -> Tensor:
        """Whole rows (b, s, w) from what this pass has computed of them, (b, t, w): here the same."""
        return x

    def first(self, new: int) -> int:
        """Position in whole rows of the first of this pass's `new` tokens: here 0."""
        return 0

    def far(
        self, x: Tensor, q_latent: Tensor, angles: tuple[Tensor, Tensor], mask: Mask, cache: CompressedLayer | None
    ) -> Far:
        """The entries outside the window: here none.

        x (b, t, hidden), q_latent (b, t, q_lora_rank), angles: cos and sin (b or 1, t, r / 2).
        """
        none = torch.ones(1, x.size(1), 0, dtype=torch.bool, device=x.device)
        return x.new_empty(x.size(0), 0, self.config.head_dim), lambda part: none[:, part]

    def attend(self, query: Tensor, entries: Tensor, near: Seen, far: Far) -> Tensor:
        """query (b, h, t, c) over the window's entries (b, s, c), the last t of which are its own tokens', and far entries.

        -> (b, h, t, c).
        """
        read, (compressed, seen_far) = [], far
        for part in self.parts(query, compressed.size(1)):
            window, seen = self.near_of(query.size(2), entries, part, near)
            rows = torch.cat([entries[:, window], compressed], dim=1)
            both = torch.cat([seen.expand(len(query), -1, -1), seen_far(part).expand(len(query), -1, -1)], dim=2)
            read.append(sink_attention(query[:, :, part], rows, self.sink, self.scale, both))
        return torch.cat(read, dim=2)

    def near_of(self, queries: int, entries: Tensor, part: slice, near: Seen) -> tuple[slice, Tensor]:
        """Location of the window entries for a part of the queries, and their visibility, (b or 1, part, window)."""
        before, index = entries.size(1) - queries, torch.arange(entries.size(1), device=entries.device)
        window = slice(max(0, before + part.start + 1 - self.window), before + part.stop)
        is_near = index[before:][part, None] - index[window] < self.window
        return window, near(part)[:, :, window] & is_near

    def parts(self, query: Tensor, compressed: int) -> Iterator[slice]:
        """Blocks of queries (b, h, t, c) whose scores fit SCORES, no longer than the window."""
        rows, heads, length = query.shape[:3]
        size = max(1, min(self.window + compressed, SCORES // (rows * heads * (2 * self.window + compressed))))
        for start in range(0, length, size):
            yield slice(start, min(start + size, length))


def shifted(part: slice, by: int) -> slice:
    """A slice moved by some tokens; it may be open only if `by` is 0."""
    return slice(part.start + by, part.stop + by) if by else part
