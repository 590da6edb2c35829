"""Attention of a decoding step as one C++ kernel: norm, rotation, storing, and the products with all that is stored.

A dozen small operations each, whose own cost would be more than half of a small model's step. The plain lines run where
the kernels do not serve a pass: see Cache.native.
"""

from torch import Tensor

from finback.kernels import decode
from finback.model.cache import LayerCache
from finback.model.mla import MLA
from finback.model.pack import PackedGQA
from finback.model.replace import recast_modules
from finback.model.transformer import Transformer


def use_native(model: Transformer) -> Transformer:
    """Have the model's attention decode by the C++ kernels from now on, in place; training stays as it is."""
    return recast_modules(recast_modules(model, MLA, NativeMLA), PackedGQA, NativeGQA)


class NativeMLA(MLA):
    """MLA that decodes a few tokens in absorbed form by a kernel."""

    def forward(
        self, x: Tensor, cos: Tensor, sin: Tensor, cache: LayerCache | None = None, attention_mask: Tensor | None = None
    ) -> Tensor:
        if cache is None or not cache.native or self.kv_up.weight.dtype != x.dtype:
            return super().forward(x, cos, sin, cache, attention_mask)
        c = self.config
        q, kv = self.project(x)
        heads = decode.LatentHeads(
            c.qk_nope_head_dim, c.qk_rope_head_dim, c.v_head_dim, c.rope_interleaved, self.kv_norm.eps, self.scale
        )
        return self.out(decode.latent(q, kv, self.kv_up.weight, self.kv_norm.weight, cos, sin, cache, heads))


class NativeGQA(PackedGQA):
    """GQA that decodes a few tokens by a kernel, from the one product that packing has made of its projections."""

    def forward(
        self, x: Tensor, cos: Tensor, sin: Tensor, cache: LayerCache | None = None, attention_mask: Tensor | None = None
    ) -> Tensor:
        if cache is None or not cache.native:
            return super().forward(x, cos, sin, cache, attention_mask)
        c = self.config
        gains = (self.query_norm.weight, self.key_norm.weight) if c.qk_norm else None
        heads = decode.GroupedHeads(c.num_key_value_heads, c.head_dim, c.rms_norm_eps, self.scale)
        return self.out(decode.grouped_query(self.stacked(x), gains, cos, sin, cache, heads))
