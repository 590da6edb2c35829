"""One C++ call for all blocks of a decoding step, for dense models whose weights stay as in a GGUF file.

At one row of a small model, calling each block's kernels from Python takes as long as reading its weights.
"""

from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from finback.kernels import native
from finback.kernels.heads import rotate_half
from finback.kernels.quants import BlockLinear
from finback.model.cache import PAGE, Cache
from finback.model.gqa import GQA
from finback.model.layers import OffsetNorm, RMSNorm
from finback.model.pack import BlockSwiGLU, PackedGQA
from finback.model.replace import recast
from finback.model.transformer import Block, Transformer


@dataclass(frozen=True)
class BlockTable:
    """The blocks' weights by address: (blocks, 22) int64, the fields of `Block` in decode.cpp."""

    addresses: Tensor
    # what the addresses point at
    tensors: list[Tensor]
    form: int
    # whether some layers have a sliding window
    slides: bool

    @property
    def is_current(self) -> bool:
        """False in a copy, or after the weights were moved."""
        return int(self.addresses[0, 0]) == self.tensors[0].data_ptr()

    @classmethod
    def of(cls, model: Transformer) -> "BlockTable | None":
        """The table of a model; None if one of its blocks needs its own code, as with adapters."""
        tensors: list[Tensor] = []

        def at(tensor: Tensor | None) -> int:
            if tensor is None:
                return 0
            tensors.append(tensor)
            return tensor.data_ptr()

        def matrices(layer: BlockLinear) -> list[int]:
            bias = None if layer.bias is None else layer.bias.to(model.compute).contiguous()
            weight, parts, count = layer.matrices
            return [at(weight), at(parts), count, at(bias)]

        lines, forms = [], set[int]()
        for block in model.blocks:
            if not _is_usual(block):
                return None
            own: Any = block
            attention, feed_forward = own.attention, own.feed_forward
            gains = [own.attention_norm.gain(), *_head_gains(attention), own.feed_forward_norm.gain()]
            layers = [attention.stacked, attention.out, feed_forward.gate_up, feed_forward.down]
            forms |= {layer.form for layer in layers}
            line = [at(None if gain is None else gain.float()) for gain in gains]
            line += [number for layer in layers for number in matrices(layer)]
            lines.append([*line, feed_forward.down.columns, attention.window or 0])
        if len(forms) != 1:
            return None
        return cls(torch.tensor(lines), tensors, forms.pop(), any(line[-1] for line in lines))


def _head_gains(attention: GQA) -> tuple[Tensor | None, Tensor | None]:
    if not attention.config.qk_norm:
        return None, None
    return attention.query_norm.gain(), attention.key_norm.gain()


def _is_usual(block: nn.Module) -> bool:
    """Whether decode.cpp computes what this block computes."""
    if (
        type(block) is not Block
        or not isinstance(block.attention, PackedGQA)
        or type(block.feed_forward) is not BlockSwiGLU
    ):
        return False
    attention, c = block.attention, block.attention.config
    parts: list[Any] = [attention.stacked, attention.out, block.feed_forward.gate_up, block.feed_forward.down]
    norms = block.attention_norm, block.feed_forward_norm
    return (
        all(type(part) is BlockLinear for part in parts)
        and all(type(norm) in (RMSNorm, OffsetNorm) for norm in norms)
        and attention.reads_pages  # no sinks
        and attention.rotate is rotate_half
        and attention.own is None
        and not (c.qk_norm and c.qk_norm_over != "head")
    )


def use_one_call(model: Transformer) -> Transformer:
    """Makes a model decode in one call, in place, if all its blocks allow it."""
    if all(map(_is_usual, model.blocks)):
        # the addresses are collected at the next step: adapters may be added until then
        recast(model, OneCallTransformer)._table = None
    return model


class OneCallTransformer(Transformer):
    """A model that decodes a few tokens in one call, see BlockTable."""

    _table: BlockTable | None

    def through(self, x: Tensor, cos: Tensor, sin: Tensor, cache: Cache | None, *context: Any) -> Tensor:
        if cache is not None and cache.native and x.dtype == cache.pool.data.dtype:
            if self._table is None or not self._table.is_current:
                self._table = BlockTable.of(self)
            if self._table is not None and not (self._table.slides and x.size(1) > 1):
                return self._decode(self._table, x.contiguous(), cos.contiguous(), sin.contiguous(), cache)
        return super().through(x, cos, sin, cache, *context)

    def _decode(self, table: BlockTable, x: Tensor, cos: Tensor, sin: Tensor, cache: Cache) -> Tensor:
        c, data, attention = self.config, cache.pool.data, self.blocks[0].attention
        assert isinstance(attention, GQA)
        pages = cache.slots, cache.table, cache.lengths, cache.starts
        sizes = c.hidden_size, c.num_attention_heads, c.num_key_value_heads, c.head_dim, PAGE, cache.table.size(1)
        native.call(
            "decode_blocks",
            *(x.dtype == torch.bfloat16, table.form, x, table.addresses, len(table.addresses)),
            *(data, data.stride(0), *pages, cos, sin, x.size(0), x.size(1), *sizes),
            *(c.rms_norm_eps, attention.scale),
        )
        return x
