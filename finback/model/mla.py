"""Multi-head latent attention (MLA), in its two equivalent forms.

Keys and values of all heads are functions of one latent c (kv_lora_rank elements) and one rotary key (qk_rope_head_dim
elements) per token, and only these are cached (V2 2.1).

  expanded  k, v materialized per head: fewest FLOPs per pair, for training and prompts
  absorbed  W_UK folded into the query and W_UV into the output: attention runs on the latents themselves, so a
            cached token is read once for all heads, for decoding

Letters: b batch, t query, s key, h head, n qk_nope_head_dim, r qk_rope_head_dim, c kv_lora_rank, v v_head_dim.
"""

import torch
from torch import Tensor, nn

from finback.kernels.attention import Attention, causal_attention, torch_attention
from finback.kernels.documents import Mask
from finback.kernels.heads import rotate_half, rotate_heads, rotate_interleaved, split_heads
from finback.model.cache import LayerCache
from finback.model.config import ModelConfig
from finback.model.layers import Linear, RMSNorm
from finback.model.rope import softmax_scale

LATENT_EPS = 1e-6  # constant in every implementation, independent of rms_norm_eps


class MLA(nn.Module):
    """MLA of V2 2.1 and V3 2.1.1; `q_lora_rank=None` projects queries directly from the hidden state (V2-Lite)."""

    # replaced by another form if rows are split among ranks
    core: Attention = staticmethod(causal_attention)

    def __init__(self, config: ModelConfig) -> None:
        super().__init__()
        c = self.config = config
        heads = c.num_attention_heads
        self.rotate = rotate_interleaved if c.rope_interleaved else rotate_half
        if c.q_lora_rank is not None:
            self.q_down = Linear(c.hidden_size, c.q_lora_rank)
            self.q_norm = RMSNorm(c.q_lora_rank, LATENT_EPS)
        self.q_up = Linear(c.q_lora_rank or c.hidden_size, heads * c.qk_head_dim)
        self.kv_down = Linear(c.hidden_size, c.kv_lora_rank + c.qk_rope_head_dim)
        self.kv_norm = RMSNorm(c.kv_lora_rank, LATENT_EPS)
        self.kv_up = Linear(c.kv_lora_rank, heads * (c.qk_nope_head_dim + c.v_head_dim))
        self.out = Linear(heads * c.v_head_dim, c.hidden_size)
        self.scale = softmax_scale(config)

    def forward(
        self, x: Tensor, cos: Tensor, sin: Tensor, cache: LayerCache | None = None, attention_mask: Mask = None
    ) -> Tensor:
        """x (b, t, hidden) -> (b, t, hidden); cos and sin (b or 1, t, r / 2) of the new tokens' positions.

        With a cache the new latents are stored, and attention also covers everything stored before. Without one, attention_mask
        may restrict which tokens see which; by default all earlier ones are visible.
        """
        q, kv = self.project(x)
        if cache is None:
            return self.out(self.attend_rows(q, kv, cos, sin, attention_mask))
        q_nope, q_rope = self.queries(q, cos, sin)
        latent, k_rope = self.latents(kv, cos, sin)
        cache.append(torch.cat([latent, k_rope], dim=-1))
        return self.out(self.attend_stored(q_nope, q_rope, latent, k_rope, cache))

    def project(self, x: Tensor) -> tuple[Tensor, Tensor]:
        """x (b, t, hidden) -> queries (b, t, h·(n + r)) and [latent | rotary key] (b, t, c + r), not yet rotated."""
        q, kv = self.inputs(x)
        return self.q_of(q), kv

    def inputs(self, x: Tensor) -> tuple[Tensor, Tensor]:
        """The normed query latent (b, t, q_lora_rank), or the queries if there is none; and [latent | rotary key]."""
        q: Tensor = self.q_up(x) if self.config.q_lora_rank is None else self.q_norm(self.q_down(x))
        return q, self.kv_down(x)

    def q_of(self, latent: Tensor) -> Tensor:
        """Queries (b, t, h·(n + r)) from the first output of `inputs`."""
        q: Tensor = latent if self.config.q_lora_rank is None else self.q_up(latent)
        return q

    def queries(self, q: Tensor, cos: Tensor, sin: Tensor) -> tuple[Tensor, Tensor]:
        """q (b, t, h·(n + r)) -> q_nope (b, t, h, n) and rotated q_rope (b, t, h, r)."""
        c = self.config
        q_nope, q_rope = q.unflatten(-1, (c.num_attention_heads, c.qk_head_dim)).split(
            [c.qk_nope_head_dim, c.qk_rope_head_dim], dim=-1
        )
        return q_nope, self.rotate(q_rope, cos[:, :, None].to(q.dtype), sin[:, :, None].to(q.dtype))

    def latents(self, kv: Tensor, cos: Tensor, sin: Tensor) -> tuple[Tensor, Tensor]:
        """kv (b, t, c + r) -> normed latent (b, t, c) and rotated key (b, t, r): a token's cache entry."""
        latent, k_rope = kv.split([self.config.kv_lora_rank, self.config.qk_rope_head_dim], dim=-1)
        return self.kv_norm(latent), self.rotate(k_rope, cos.to(kv.dtype), sin.to(kv.dtype))

    def attend_rows(self, q: Tensor, kv: Tensor, cos: Tensor, sin: Tensor, mask: Mask) -> Tensor:
        """Attention of whole rows in expanded form, from what `project` gives -> (b, t, h·v)."""
        return self.attend_expanded(self.heads(q, cos, sin), *self.latents(kv, cos, sin), self.core, mask)

    def heads(self, q: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
        """q (b, t, h·(n + r)) -> rotated queries (b, h, t, n + r)."""
        return rotate_heads(
            q.unflatten(-1, (self.config.num_attention_heads, -1)), cos, sin, self.config.rope_interleaved
        )

    def attend_expanded(
        self, query: Tensor, latent: Tensor, k_rope: Tensor, core: Attention, mask: Mask = None
    ) -> Tensor:
        """Attention of t tokens, query (b, h, t, n + r), over s with per-head keys and values, by the given form `core` -> (b, t, h·v)."""
        key, value = self.expanded(latent, k_rope)
        return core(query, key, value, self.scale, mask).transpose(1, 2).flatten(2)

    def expanded(self, latent: Tensor, k_rope: Tensor) -> tuple[Tensor, Tensor]:
        """latent (b, s, c), rotary key (b, s, r) -> keys (b, h, s, n + r) and values (b, h, s, v)."""
        kv = self.kv_up(latent).unflatten(-1, (self.config.num_attention_heads, -1))
        return split_heads(kv, k_rope, self.config.qk_nope_head_dim)

    def attend_stored(
        self, q_nope: Tensor, q_rope: Tensor, latent: Tensor, k_rope: Tensor, cache: LayerCache
    ) -> Tensor:
        """Attention of t new tokens, already stored, over everything stored, in the cheaper form -> (b, t, h·v)."""
        if not cache.fresh and q_nope.size(1) <= self.longest_absorbed:
            return self.attend_absorbed(q_nope, q_rope, cache)
        query = torch.cat([q_nope, q_rope], dim=-1).transpose(1, 2)
        if cache.fresh:  # whole prompts: nothing was stored before
            return self.attend_expanded(query, latent, k_rope, causal_attention)
        c = self.config
        stored = cache.stored()[..., : c.kv_lora_rank + c.qk_rope_head_dim].to(q_nope.dtype)
        latent, k_rope = stored.split([c.kv_lora_rank, c.qk_rope_head_dim], dim=-1)
        return self.attend_expanded(query, latent, k_rope, torch_attention, cache.mask())

    def attend_absorbed(self, q_nope: Tensor, q_rope: Tensor, cache: LayerCache) -> Tensor:
        """Attention of t tokens over cached [latent | rotary key] entries -> (b, t, h·v).

        An entry is the key of all heads; its latent part is their value.
        """
        w_uk, w_uv = self.absorbed_weights(q_nope.dtype)
        query = torch.cat([self.into_latents(q_nope, w_uk), q_rope], dim=-1)
        read = cache.attend(query, 1, self.config.kv_lora_rank, 0, self.scale)
        return self.out_of_latents(read, w_uv).flatten(2)

    def into_latents(self, q_nope: Tensor, w_uk: Tensor) -> Tensor:
        """q_nope (b, t, h, n) -> queries for latents (b, t, h, c)."""
        return torch.einsum("bthn,hnc->bthc", q_nope, w_uk)

    def out_of_latents(self, read: Tensor, w_uv: Tensor) -> Tensor:
        """Weighted latents (b, t, h, c) -> the heads' outputs (b, t, h, v)."""
        return torch.einsum("bthc,hvc->bthv", read, w_uv)

    @property
    def longest_absorbed(self) -> int:
        """Number of new tokens up to which the absorbed form costs fewer FLOPs than expanding the stored latents.

        Per stored token and head, absorbed: t (2c + r); expanded: t (n + r + v) and once c (n + v). 170 for V3.
        """
        c = self.config
        expand = c.qk_nope_head_dim + c.v_head_dim
        saved = 2 * c.kv_lora_rank - expand
        return c.kv_lora_rank * expand // saved if saved > 0 else c.max_position_embeddings

    def absorbed_weights(self, dtype: torch.dtype) -> tuple[Tensor, Tensor]:
        """W_UK (h, n, c) and W_UV (h, v, c), the two blocks of each head's rows in kv_up."""
        c = self.config
        weight = self.kv_up.matrix(dtype).view(c.num_attention_heads, -1, c.kv_lora_rank)
        return weight[:, : c.qk_nope_head_dim], weight[:, c.qk_nope_head_dim :]
