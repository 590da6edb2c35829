"""Multi-head latent attention (MLA), in its two equal forms.

Keys and values of all heads are functions of one latent c (kv_lora_rank numbers) and one rotary key
(qk_rope_head_dim numbers) per token, and these are all that is cached (V2 2.1).

  expanded  k, v materialised per head: fewest FLOPs per pair, for training and prompts
  absorbed  W_UK folded into the query and W_UV into the output: attention runs on the latents themselves, so a
            cached token is read once for all heads, for decoding

Letters: b batch, t query, s key, h head, n qk_nope_head_dim, r qk_rope_head_dim, c kv_lora_rank, v v_head_dim.
"""

import torch
from torch import Tensor, nn

from finback.kernels.attention import causal_attention
from finback.model.cache import LayerCache
from finback.model.config import ModelConfig
from finback.model.layers import Linear, RMSNorm
from finback.model.rope import rotate_half, rotate_interleaved, softmax_scale

LATENT_EPS = 1e-6  # a constant in every implementation, whatever rms_norm_eps says for the other norms


class LatentAttention(nn.Module):
    """MLA of V2 2.1 and V3 2.1.1; `q_lora_rank=None` takes queries straight from the hidden state (V2-Lite)."""

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

    def forward(self, x: Tensor, cos: Tensor, sin: Tensor, cache: LayerCache | None = None) -> Tensor:
        """x (b, t, hidden) -> (b, t, hidden); cos and sin (b or 1, t, r / 2) of the new tokens' positions.

        With a cache the new latents are stored, and attention covers everything stored before as well.
        """
        q_nope, q_rope = self.queries(x, cos, sin)
        latent, k_rope = self.latents(x, cos, sin)
        if cache is None:
            return self.out(self.attend_expanded(q_nope, q_rope, latent, k_rope))
        cache.append(torch.cat([latent, k_rope], dim=-1))
        if cache.is_first:  # a whole prompt: nothing stored before it, so the cheaper form serves
            return self.out(self.attend_expanded(q_nope, q_rope, latent, k_rope))
        return self.out(self.attend_absorbed(q_nope, q_rope, cache.stored(), cache.mask()))

    def queries(self, x: Tensor, cos: Tensor, sin: Tensor) -> tuple[Tensor, Tensor]:
        """x -> q_nope (b, t, h, n) and rotated q_rope (b, t, h, r)."""
        c = self.config
        if c.q_lora_rank is not None:
            x = self.q_norm(self.q_down(x))
        q = self.q_up(x).unflatten(-1, (c.num_attention_heads, c.qk_head_dim))
        q_nope, q_rope = q.split([c.qk_nope_head_dim, c.qk_rope_head_dim], dim=-1)
        return q_nope, self.rotate(q_rope, cos[:, :, None].to(x.dtype), sin[:, :, None].to(x.dtype))

    def latents(self, x: Tensor, cos: Tensor, sin: Tensor) -> tuple[Tensor, Tensor]:
        """x -> normed latent (b, t, c) and rotated shared key (b, t, r): what a token leaves in the cache."""
        c = self.config
        latent, k_rope = self.kv_down(x).split([c.kv_lora_rank, c.qk_rope_head_dim], dim=-1)
        return self.kv_norm(latent), self.rotate(k_rope, cos.to(x.dtype), sin.to(x.dtype))

    def attend_expanded(self, q_nope: Tensor, q_rope: Tensor, latent: Tensor, k_rope: Tensor) -> Tensor:
        """Causal attention of t tokens over themselves with per-head keys and values -> (b, t, h·v)."""
        c = self.config
        kv = self.kv_up(latent).unflatten(-1, (c.num_attention_heads, -1))
        k_nope, value = kv.split([c.qk_nope_head_dim, c.v_head_dim], dim=-1)
        query = torch.cat([q_nope, q_rope], dim=-1).transpose(1, 2)
        shared = k_rope[:, :, None].expand(-1, -1, c.num_attention_heads, -1)
        key = torch.cat([k_nope, shared], dim=-1).transpose(1, 2)
        out = causal_attention(query, key, value.transpose(1, 2), self.scale)
        return out.transpose(1, 2).flatten(2)

    def attend_absorbed(self, q_nope: Tensor, q_rope: Tensor, entries: Tensor, mask: Tensor) -> Tensor:
        """Attention over s cached entries [latent | rotary key] (b, s, c + r) -> (b, t, h·v).

        mask (b, t, s) is True where visible. An entry is the key of all heads, its latent part their value.
        """
        w_uk, w_uv = self.absorbed_weights(entries.dtype)
        query = torch.cat([torch.einsum("bthn,hnc->bhtc", q_nope, w_uk), q_rope.transpose(1, 2)], dim=-1)
        b, h, t, _ = query.shape
        # One shared key head: fold heads into rows, so the cache is read by a single product per sequence.
        scores = torch.bmm(query.reshape(b, h * t, -1), entries.transpose(1, 2)) * self.scale
        scores = scores.view(b, h, t, -1)
        weights = scores.float().masked_fill(~mask[:, None], float("-inf")).softmax(dim=-1).to(entries.dtype)
        latent = entries[:, :, : self.config.kv_lora_rank]
        read = torch.bmm(weights.view(b, h * t, -1), latent).view(b, h, t, -1)
        return torch.einsum("bhtc,hvc->bthv", read, w_uv).flatten(2)

    def absorbed_weights(self, dtype: torch.dtype) -> tuple[Tensor, Tensor]:
        """W_UK (h, n, c) and W_UV (h, v, c), the two blocks of each head's rows in kv_up."""
        c = self.config
        weight = self.kv_up.matrix(dtype).view(c.num_attention_heads, -1, c.kv_lora_rank)
        return weight[:, : c.qk_nope_head_dim], weight[:, c.qk_nope_head_dim :]
