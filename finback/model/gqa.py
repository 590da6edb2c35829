"""Grouped-query attention: for the dense students that R1 is distilled into, and for layers of other families."""

import torch
from torch import Tensor, nn

from finback.kernels.attention import Attention, causal_attention, torch_attention, with_sinks
from finback.kernels.documents import Mask, Windowed
from finback.kernels.heads import rotate_half, rotate_heads
from finback.model.cache import LayerCache
from finback.model.config import ModelConfig
from finback.model.layers import Linear, OffsetNorm, RMSNorm
from finback.model.rope import rotate_first, rotate_nothing, softmax_scale


class HeadsNorm(RMSNorm):
    """RMSNorm over all heads at once of x (..., heads, head_dim)."""

    def forward(self, x: Tensor) -> Tensor:
        return super().forward(x.flatten(-2)).view_as(x)


class GQA(nn.Module):
    """num_attention_heads queries share num_key_value_heads keys and values; half-split rotary embedding.

    Layers may differ: some have a sliding window, some no rotation, some their own RoPE base.
    """

    # replaced by another form if rows are split among ranks
    core: Attention = staticmethod(causal_attention)
    # whether a kernel may read cached pages in place for a few new tokens
    reads_pages = True

    def __init__(self, config: ModelConfig, layer: int = 0) -> None:
        super().__init__()
        c = self.config = config
        self.window = c.window(layer)
        self.rotate = rotate_half if c.rope_dim == c.head_dim else rotate_first
        if layer in c.nope_layers:
            self.rotate = rotate_nothing
        # which half of each row of the rotary tables this layer uses, if rows have two
        self.own = None if c.local_rope_theta is None else int(self.window is not None)
        bias = c.attention_bias != "none"
        self.query = Linear(c.hidden_size, c.num_attention_heads * c.head_dim, bias)
        self.key_value = Linear(c.hidden_size, 2 * c.num_key_value_heads * c.head_dim, bias)
        self.out = Linear(c.num_attention_heads * c.head_dim, c.hidden_size, c.attention_bias == "all")
        if c.qk_norm and c.qk_norm_over == "head":
            norm = OffsetNorm if c.norm_offset else RMSNorm
            self.query_norm = norm(c.head_dim, c.rms_norm_eps)
            self.key_norm = norm(c.head_dim, c.rms_norm_eps)
        elif c.qk_norm:
            self.query_norm = HeadsNorm(c.num_attention_heads * c.head_dim, c.rms_norm_eps)
            self.key_norm = HeadsNorm(c.num_key_value_heads * c.head_dim, c.rms_norm_eps)
        self.scale = softmax_scale(config)

    def forward(
        self, x: Tensor, cos: Tensor, sin: Tensor, cache: LayerCache | None = None, attention_mask: Mask = None
    ) -> Tensor:
        """x (b, t, hidden) -> (b, t, hidden); cos and sin (b or 1, t, head_dim / 2); keys are cached rotated.

        Without a cache, attention_mask may restrict which tokens see which; by default all earlier ones are visible.
        """
        c, window = self.config, self.window
        query, key, value = self.project(x)
        if c.qk_norm:
            query, key = self.query_norm(query), self.key_norm(key)
        query, key, value = self.by_head(query, cos, sin), self.by_head(key, cos, sin), value.transpose(1, 2)
        mask, core = attention_mask, self.core
        if cache is not None:
            mask, core = None, causal_attention
            cache.append(torch.cat([t.transpose(1, 2).flatten(2) for t in (key, value)], dim=-1))
            if self.reads_pages and cache.few and not cache.fresh and (window is None or x.size(1) == 1):
                cache = cache if window is None else cache.last(window)
                values_at = c.num_key_value_heads * c.head_dim
                asked = query.transpose(1, 2)
                return self.out(
                    cache.attend(asked, c.num_key_value_heads, c.head_dim, values_at, self.scale).flatten(2)
                )
            if not cache.fresh:
                stored = cache.stored().to(x.dtype).unflatten(-1, (2 * c.num_key_value_heads, c.head_dim))
                key, value = stored.transpose(1, 2).chunk(2, dim=1)
                mask, window, core = cache.mask(window), None, torch_attention
        if window is not None:
            assert not isinstance(mask, Windowed), "sliding windows are not nested"
            mask = Windowed(mask, window)
        return self.out(self.attend(core, query, key, value, mask).transpose(1, 2).flatten(2))

    def by_head(self, x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
        """Rotates x (b, t, heads, head_dim) -> (b, heads, t, head_dim)."""
        cos, sin = self.angles(cos), self.angles(sin)
        if self.rotate is rotate_half:
            return rotate_heads(x, cos, sin, interleaved=False)
        return self.rotate(x, *(t[:, :, None].to(x.dtype) for t in (cos, sin))).transpose(1, 2)

    def attend(self, core: Attention, query: Tensor, key: Tensor, value: Tensor, mask: Mask) -> Tensor:
        """(b, heads, t, head_dim), computed by the given form of attention."""
        return core(query, key, value, self.scale, mask)

    def angles(self, table: Tensor) -> Tensor:
        """This layer's part of cos or sin (b or 1, t, ...)."""
        return table if self.own is None else table.chunk(2, dim=-1)[self.own]

    def project(self, x: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """x (b, t, hidden) -> query (b, t, heads, head_dim), key and value (b, t, kv heads, head_dim)."""
        c = self.config
        query = self.query(x).unflatten(-1, (c.num_attention_heads, c.head_dim))
        key, value = self.key_value(x).unflatten(-1, (2 * c.num_key_value_heads, c.head_dim)).chunk(2, dim=2)
        return query, key, value


class SinkGQA(GQA):
    """GQA whose softmax has one additional trained logit per head, without a value (gpt-oss)."""

    reads_pages = False

    def __init__(self, config: ModelConfig, layer: int = 0) -> None:
        super().__init__(config, layer)
        self.sink = nn.Parameter(torch.empty(config.num_attention_heads))

    def attend(self, core: Attention, query: Tensor, key: Tensor, value: Tensor, mask: Mask) -> Tensor:
        return with_sinks(core, query, key, value, self.scale, mask, self.sink)
