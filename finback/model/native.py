"""Attention of a decoding step as one C++ kernel: norm, rotation, storing, and attention over everything stored.

Otherwise these are a dozen small operations, whose overhead would exceed half of a small model's step. The plain code runs where the
kernels do not handle a pass: see Cache.native.
"""

import torch
from torch import Tensor

from finback.kernels import native
from finback.kernels.documents import Mask
from finback.kernels.heads import rotate_half
from finback.model.block_calls import use_one_call
from finback.model.cache import LayerCache
from finback.model.dsa import DSA
from finback.model.mla import MLA
from finback.model.pack import PackedGQA
from finback.model.replace import recast, recast_modules, replace_modules
from finback.model.transformer import Transformer


def use_native(model: Transformer) -> Transformer:
    """Makes the model's attention decode with the C++ kernels, in place; training is unchanged.

    DSA has no kernel: it reads different tokens for each query.
    """
    replace_modules(model, MLA, lambda _, module: module if isinstance(module, DSA) else recast(module, NativeMLA))
    return use_one_call(recast_modules(model, PackedGQA, NativeGQA))


class NativeMLA(MLA):
    """MLA that decodes a few tokens in absorbed form with a kernel."""

    def forward(
        self, x: Tensor, cos: Tensor, sin: Tensor, cache: LayerCache | None = None, attention_mask: Mask = None
    ) -> Tensor:
        if cache is None or not cache.native or self.kv_up.weight.dtype != x.dtype:
            return super().forward(x, cos, sin, cache, attention_mask)
        c, rows, gain = self.config, cache, self.kv_norm.weight.float()
        kv_up = self.kv_up.matrix(x.dtype)  # including its adapter
        q, kv = (t.contiguous() for t in self.project(x))
        count, new, heads = q.size(0), q.size(1), c.num_attention_heads
        out = q.new_empty(count, new, heads * c.v_head_dim)
        sizes = count, new, heads, c.qk_nope_head_dim, c.qk_rope_head_dim, c.v_head_dim, c.kv_lora_rank
        native.call(
            "latent",
            q.dtype == torch.bfloat16,
            *(q, kv, kv_up, rows.entries, out, rows.slots, rows.table, rows.lengths, rows.starts),
            *(cos, sin, gain, c.rope_interleaved, *sizes, rows.size, rows.table.size(1), self.kv_norm.eps, self.scale),
        )
        return self.out(out)


class NativeGQA(PackedGQA):
    """GQA that decodes a few tokens with a kernel, from the single product that packing made of its projections."""

    def forward(
        self, x: Tensor, cos: Tensor, sin: Tensor, cache: LayerCache | None = None, attention_mask: Mask = None
    ) -> Tensor:
        c, window = self.config, self.window
        is_usual = self.rotate is rotate_half and c.qk_norm_over == "head" and (window is None or x.size(1) == 1)
        if cache is None or not cache.native or not is_usual:
            return super().forward(x, cos, sin, cache, attention_mask)
        rows = cache if window is None else cache.last(window)
        cos, sin = self.angles(cos).contiguous(), self.angles(sin).contiguous()
        qkv: Tensor = self.stacked(x).contiguous()
        gains = (self.query_norm.gain().float(), self.key_norm.gain().float()) if c.qk_norm else (None, None)
        count, new, heads = qkv.size(0), qkv.size(1), c.num_attention_heads
        out = qkv.new_empty(count, new, heads * c.head_dim)
        sizes = count, new, heads, c.num_key_value_heads, c.head_dim, rows.size, rows.table.size(1)
        native.call(
            "grouped_query",
            qkv.dtype == torch.bfloat16,
            *(qkv, rows.entries, out, rows.slots, rows.table, rows.lengths, rows.starts, cos, sin, *gains),
            *(*sizes, c.rms_norm_eps, self.scale),
        )
        return self.out(out)
