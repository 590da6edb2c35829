"""Lay a model's weights out for answering on a CPU: packed matrices, and one product where several share an input."""

from torch import nn

from finback.kernels.packed import Form, PackedLinear
from finback.model.gqa import GQA
from finback.model.layers import Linear, RMSNorm
from finback.model.mla import MLA
from finback.model.transformer import Transformer


def pack(model: Transformer, form: Form) -> Transformer:
    """Pack a bf16 model's linear maps in place, layer by layer, so that no second copy of the model is needed.

    Afterwards it only answers: its weights cannot be trained, saved or read back. Experts, embeddings and the matrix that
    MLA absorbs keep their form.
    """
    for module in list(model.modules()):
        if isinstance(module, GQA):
            module.fused = _stack([module.query, module.key_value], form)
            module.query = module.key_value = nn.Identity()  # type: ignore[assignment]
        elif isinstance(module, MLA):
            first = "q_up" if module.config.q_lora_rank is None else "q_down"
            module.fused = _stack([getattr(module, first), module.kv_down], form)
            setattr(module, first, nn.Identity())
            module.kv_down = nn.Identity()  # type: ignore[assignment]
        elif isinstance(module, RMSNorm):
            module.float()  # as its kernel reads it
    for module in list(model.modules()):
        for name, child in module.named_children():
            if isinstance(child, Linear) and name != "kv_up":
                setattr(module, name, _stack([child], form))
    return model


def _stack(layers: list[Linear], form: Form) -> PackedLinear:
    return PackedLinear([layer.matrix(layer.weight.dtype) for layer in layers], [layer.bias for layer in layers], form)
