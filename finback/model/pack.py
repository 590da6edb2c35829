"""Lays out a model's weights for CPU inference: packed matrices, and one product where several share an input."""

from typing import Literal

from torch import Tensor, nn

from finback.kernels import quants
from finback.kernels.packed import PackedLinear
from finback.kernels.quants import BlockLinear, Blocks
from finback.model.gqa import GQA
from finback.model.layers import GroupedLinear, Linear, RMSNorm, SwiGLU
from finback.model.mla import MLA
from finback.model.quantized import QuantizedLinear, QuantizedTransformer
from finback.model.replace import recast, replace_modules
from finback.model.transformer import Transformer

# layout of linear maps; "kept": those that a GGUF file stores in blocks stay so, and the others remain plain
Form = Literal["bf16", "int8", "kept"]
Packed = PackedLinear | BlockLinear


def pack(model: Transformer, form: Form) -> Transformer:
    """Packs a model's linear maps for inference, in place, layer by layer, without a second copy.

    Afterwards its weights cannot be trained, saved or read back. Experts, the matrix that MLA absorbs and those of V4's
    groups keep their form, and so do embeddings except with "kept".
    """
    for module in list(model.modules()):
        if isinstance(module, GQA):
            stack_inputs(module, PackedGQA, ["query", "key_value"], form)
        elif isinstance(module, MLA):
            first = "q_up" if module.config.q_lora_rank is None else "q_down"
            stack_inputs(module, PackedMLA, [first, "kv_down"], form)
        elif isinstance(module, RMSNorm):
            module.float()  # required by its kernel

    if form == "kept":
        replace_modules(model, SwiGLU, lambda _, part: _one_call(part))

    def packed(name: str, layer: Linear) -> nn.Module:
        is_apart = name.endswith("kv_up") or isinstance(layer, GroupedLinear) or not _fits([layer], form)
        return layer if is_apart else _stack([layer], form)

    replace_modules(model, Linear, packed)
    if isinstance(model, QuantizedTransformer):
        table: nn.Module = model.head  # shares it if tied
        if not (isinstance(table, BlockLinear) and model.config.tie_word_embeddings):
            table = BlockLinear([model.embed_format], [model.embed], [None])
        model.table, model.embed = table, table.weight
    return model


def is_kept(layer: nn.Module) -> bool:
    """Whether a linear map's weight is stored as in a GGUF file."""
    return isinstance(layer, QuantizedLinear) and isinstance(layer.format, Blocks)


class PackedMLA(MLA):
    """MLA that computes queries and latents with one product."""

    stacked: Packed
    # the linear maps combined into one product
    names: list[str]

    def inputs(self, x: Tensor) -> tuple[Tensor, Tensor]:
        c, both = self.config, self.stacked(x)
        size = c.kv_lora_rank + c.qk_rope_head_dim
        q = both[..., :-size]
        return q if c.q_lora_rank is None else self.q_norm(q), both[..., -size:]


class PackedGQA(GQA):
    """GQA that computes queries, keys and values with one product."""

    stacked: Packed
    # the linear maps combined into one product
    names: list[str]

    def project(self, x: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        c = self.config
        heads = self.stacked(x).unflatten(-1, (-1, c.head_dim))
        query, key, value = heads.split([c.num_attention_heads] + 2 * [c.num_key_value_heads], dim=2)
        return query, key, value


class BlockSwiGLU(SwiGLU):
    """SwiGLU with matrices as in a GGUF file, in one call."""

    def forward(self, x: Tensor) -> Tensor:
        gate_up: nn.Module = self.gate_up
        down: nn.Module = self.down
        if type(gate_up) is BlockLinear and type(down) is BlockLinear:  # without adapters
            return quants.feed_forward(x, gate_up, down)
        return super().forward(x)


def _one_call(part: SwiGLU) -> SwiGLU:
    is_plain = part.limit is None and is_kept(part.gate_up) and is_kept(part.down)
    return recast(part, BlockSwiGLU) if is_plain else part


def stack_inputs(module: MLA | GQA, to: type[PackedMLA] | type[PackedGQA], names: list[str], form: Form) -> None:
    """Combines the linear maps of these names into one product and drops them; does nothing unless the form applies to all."""
    layers = [getattr(module, name) for name in names]
    if not _fits(layers, form):
        return
    attention = recast(module, to)
    attention.stacked, attention.names = _stack(layers, form), names
    for name in names:
        delattr(attention, name)


def product_of(model: Transformer, name: str) -> tuple[nn.Module, int]:
    """The module that computes the linear map of this name, packed or not, and where its outputs begin."""
    above, _, leaf = name.rpartition(".")
    parent = model.get_submodule(above)
    if hasattr(parent, leaf):
        return model.get_submodule(name), 0
    assert isinstance(parent, PackedMLA | PackedGQA) and leaf in parent.names, f"{name} is not part of a product"
    outputs = parent.stacked.outputs
    return parent.stacked, sum(outputs[: parent.names.index(leaf)])


def _fits(layers: list[Linear], form: Form) -> bool:
    return form != "kept" or all(map(is_kept, layers))


def _stack(layers: list[Linear], form: Form) -> Packed:
    biases = [layer.bias for layer in layers]
    if form == "kept":
        kept = [(layer.format, layer.weight) for layer in layers if isinstance(layer, QuantizedLinear)]
        formats, values = zip(*kept, strict=True)
        return BlockLinear(formats, values, biases)
    return PackedLinear([layer.matrix(layer.weight.dtype) for layer in layers], biases, form)
