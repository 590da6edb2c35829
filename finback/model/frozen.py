"""A frozen base: no gradients of its weights, no copies of them for the backward pass, in any storage format."""

from collections.abc import Callable
from typing import Literal

import torch
from torch import Tensor, nn

from finback.kernels import frozen
from finback.kernels.formats import FORMATS
from finback.kernels.frozen import Product
from finback.model.biased_experts import BiasedMoE
from finback.model.layers import GroupedLinear, Linear
from finback.model.moe import ClampedMoE, MoE
from finback.model.quantized import QuantizedLinear, QuantizedMoE, expert_matrix, matrices_product, quantize
from finback.model.replace import recast
from finback.model.transformer import Transformer

# storage of a frozen base; int8 and nf4 apply to the matrices of blocks, the rest of the model is then bf16
BaseFormat = Literal["fp32", "bf16", "int8", "nf4"]


class FrozenLinear(Linear):
    """A linear map with a frozen weight."""

    def forward(self, x: Tensor) -> Tensor:
        y = frozen.linear(x, super().matrix, self.groups)
        return y if self.bias is None else y + self.bias.to(x.dtype)


class FrozenMoE(MoE):
    """A mixture of experts with frozen router and experts."""

    # which of its experts are on this rank, with their adapters
    local_experts: slice = slice(None)

    def experts(self, x: Tensor, index: Tensor, weight: Tensor, gate_up: Tensor, down: Tensor) -> Tensor:  # type: ignore[override]
        if not self.is_adapted and not torch.is_grad_enabled():
            y: Tensor = super().experts(x, index, weight, gate_up, down)
            return y
        return self.by_products(x, index, weight, len(gate_up), self.product("gate_up"), self.product("down"))

    @property
    def is_adapted(self) -> bool:
        """Whether its products differ from those of the weights."""
        return False

    def product(self, name: str) -> Product:
        """Rows sorted by expert times each expert's gate_up or down."""
        return matrices_product(self, name)


def freeze(
    model: Transformer, form: BaseFormat, filled: Callable[[str, Linear | MoE], None] = lambda name, module: None
) -> Transformer:
    """Freezes a model's weights in place, in fp32 or bf16 as they are, or quantized.

    Embedding, head, norms and routers are not quantized, nor are MTP modules. `filled` is called for each module with matrices
    before it is frozen and may load its values only then, so that no more than one unquantized module is in memory.
    """
    blocks = set(model.blocks.modules())
    for name, module in list(model.named_modules()):
        if isinstance(module, Linear | MoE):
            filled(name, module)
            if form in FORMATS and module in blocks:
                quantize(module, FORMATS[form])
            recast(module, FrozenMoE if isinstance(module, MoE) else FrozenLinear)
    return model.requires_grad_(False)


def base_dtype(form: BaseFormat) -> torch.dtype:
    """The dtype in which a base of this format is loaded."""
    return torch.float32 if form == "fp32" else torch.bfloat16


def thaw(module: Linear | MoE, name: str, weight: Tensor) -> None:
    """Replaces a module's stored weight of this name, with its scales, by a plain weight."""
    if hasattr(module, f"{name}_scale"):
        delattr(module, f"{name}_scale")
    setattr(module, name, nn.Parameter(weight))


@torch.no_grad()
def unfreeze(model: Transformer, dtype: torch.dtype) -> Transformer:
    """Makes a frozen model plain, in place, with parameters in `dtype`; undoes `freeze` except for quantization error."""
    for module in list(model.modules()):
        if isinstance(module, QuantizedLinear) and hasattr(module, "weight_scale"):
            thaw(module, "weight", module.matrix(dtype))
        elif isinstance(module, QuantizedMoE) and hasattr(module, "gate_up_scale"):
            for name in ("gate_up", "down"):
                experts = range(len(module.gate_up))
                thaw(module, name, torch.stack([expert_matrix(module, name, e, dtype) for e in experts]))
        if isinstance(module, Linear | MoE):
            plain = (BiasedMoE, ClampedMoE, MoE, GroupedLinear, Linear)  # its original class
            module.__class__ = next(kind for kind in plain if isinstance(module, kind))
    with torch.device("meta"):
        bare = dict(Transformer(model.config, param_dtype=dtype).named_parameters())
    for name, parameter in model.named_parameters():
        parameter.data = parameter.data.to(bare[name].dtype)
    model.__class__ = Transformer
    return model.requires_grad_(True)
