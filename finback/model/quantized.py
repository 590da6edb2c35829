"""Weights that stay quantized: products run in the activations' dtype, dequantizing one matrix at a time."""

from collections.abc import Callable, Iterable
from typing import Any

import torch
from torch import Tensor, nn

from finback.kernels import fp8, frozen
from finback.kernels.formats import FP8, Format
from finback.kernels.frozen import Product
from finback.kernels.quants import BlockLinear, Blocks, blocks
from finback.model.layers import Linear
from finback.model.moe import MoE
from finback.model.replace import Model, recast
from finback.model.transformer import Transformer

FACTORS = "_scale"  # suffix of the name of the values


class QuantizedLinear(Linear):
    """A linear map whose weight is packed values with scales."""

    format: Format
    weight_scale: Tensor

    def matrix(self, dtype: torch.dtype) -> Tensor:
        return self.format.dequantize(self.weight, self.weight_scale, dtype)


class QuantizedMoE(MoE):
    """Routed experts whose weights are packed values with scales; only the experts in use are dequantized."""

    format: Format
    gate_up_scale: Tensor
    down_scale: Tensor

    def experts(self, x: Tensor, index: Tensor, weight: Tensor, gate_up: Tensor, down: Tensor) -> Tensor:  # type: ignore[override]
        if self.config.swiglu_alpha is not None:
            one, other = (matrices_product(self, name) for name in ("gate_up", "down"))
            return self.by_products(x, index, weight, len(gate_up), one, other)
        met, index = index.unique(return_inverse=True)
        gate_up = self.format.dequantize(gate_up[met], self.gate_up_scale[met], x.dtype)
        down = self.format.dequantize(down[met], self.down_scale[met], x.dtype)
        made: Tensor = super().experts(x, index, weight, gate_up, down)
        return made


class QuantizedTransformer(Transformer):
    """A model whose embedding stays as in a GGUF file: the bytes of its rows, or a matrix laid out for products."""

    embed_format: Blocks
    # holds the embedding once the model is packed
    table: BlockLinear | None

    def lookup(self, tokens: Tensor) -> Tensor:
        if self.table is not None:
            return self.table.rows(tokens, self.compute)
        ((kind, rows),) = self.embed_format.parts
        found = self.embed.view(rows, -1)[tokens.flatten()]
        form = blocks(self.embed_format.columns, ((kind, len(found)),))
        return form.dequantize(found.flatten(), found, self.compute).view(*tokens.shape, -1)


def keep_embedding(model: Transformer, form: Blocks, values: Tensor) -> None:
    """Replaces a model's embedding by bytes, and its head too if they are tied."""
    quantized = recast(model, QuantizedTransformer)
    quantized.embed_format, quantized.table = form, None
    model.embed = nn.Parameter(values, requires_grad=False)
    if model.config.tie_word_embeddings:
        store(model.head, "weight", form, values, values[:0])
        model.head.weight = model.embed


def matrices_product(moe: MoE, name: str, here: Callable[[Tensor], Tensor] = lambda stack: stack) -> Product:
    """Rows sorted by expert times each expert's frozen gate_up or down; `here` as in expert_matrix."""
    width = 2 * moe.config.moe_intermediate_size if name == "gate_up" else moe.config.hidden_size
    return lambda rows, blocks: frozen.per_expert(
        rows, blocks, width, lambda expert, dtype: expert_matrix(moe, name, expert, dtype, here)
    )


def expert_matrix(
    moe: MoE, name: str, expert: int, dtype: torch.dtype, here: Callable[[Tensor], Tensor] = lambda stack: stack
) -> Tensor:
    """One expert's gate_up (2m, d) or down (d, m), by `name`, in the dtype of the arithmetic.

    `here` selects the part of the full expert stack in which `expert` is an index.
    """
    values = here(getattr(moe, name))[expert]
    if not isinstance(moe, QuantizedMoE):
        return values.to(dtype)
    return moe.format.dequantize(values, here(getattr(moe, name + FACTORS))[expert], dtype)


def row_norms(module: Linear) -> Tensor:
    """Norms of the rows of a stored weight, (out,) in fp32; if rows are sharded, each rank computes those of its own."""
    shards: Any = module.weight.detach()
    is_sharded = hasattr(shards, "full_tensor")
    # formats pack each row separately, and take no DTensors
    local: Callable[[Any], Tensor] = (lambda t: t.to_local()) if is_sharded else lambda t: t
    if isinstance(module, QuantizedLinear):
        norms = module.format.dequantize(local(shards), local(module.weight_scale), torch.float32).norm(dim=1)
    else:
        norms = local(shards).float().norm(dim=1)
    if not is_sharded:
        return norms
    size = {"shape": shards.shape[:1], "stride": (1,)}
    made = type(shards).from_local(norms, shards.device_mesh, shards.placements, run_check=False, **size)
    whole: Tensor = made.full_tensor()
    return whole


def matrix_names(module: Linear | MoE) -> tuple[str, ...]:
    """Names of a module's matrix parameters."""
    return ("gate_up", "down") if isinstance(module, MoE) else ("weight",)


@torch.no_grad()
def quantize(module: Linear | MoE, form: Format) -> None:
    """Packs a module's matrices in place; expert stacks one expert at a time, without a second copy."""
    for name in matrix_names(module):
        whole = getattr(module, name).detach()
        parts = [form.quantize(matrix) for matrix in whole] if whole.ndim > 2 else [form.quantize(whole)]
        values, scale = (torch.stack(p) if whole.ndim > 2 else p[0] for p in zip(*parts, strict=True))
        store(module, name, form, values, scale)


def make_room_for_fp8(module: Linear | MoE, names: Iterable[str]) -> None:
    """Replaces a module's parameters of these names by FP8 parameters without values, and buffers for their scales."""
    for name in names:
        shape = getattr(module, name).shape
        factors = torch.empty(*shape[:-2], fp8.blocks(shape[-2]), fp8.blocks(shape[-1]))
        store(module, name, FP8, torch.empty(shape, dtype=torch.float8_e4m3fn), factors)


def store(module: Linear | MoE, name: str, form: Format, values: Tensor, scale: Tensor) -> None:
    """Stores values and scales in place of a parameter."""
    if isinstance(module, MoE):
        recast(module, QuantizedMoE).format = form
    else:
        recast(module, QuantizedLinear).format = form
    setattr(module, name, nn.Parameter(values, requires_grad=False))
    module.register_buffer(name + FACTORS, scale)


def factors_as_parameters(model: Model) -> Model:
    """Turns scales into frozen parameters, in place, so that they are sharded with their values."""
    for module in model.modules():
        if isinstance(module, QuantizedLinear | QuantizedMoE):
            for name in matrix_names(module):
                scale = getattr(module, name + FACTORS)
                delattr(module, name + FACTORS)
                setattr(module, name + FACTORS, nn.Parameter(scale, requires_grad=False))
    return model
