"""Reads an adapter's base and quantizes it module by module: at most one module is in memory in bf16 at a time."""

import torch
from torch import nn

from finback.checkpoint import peft
from finback.checkpoint.shares import Values, whole
from finback.model.config import ModelConfig
from finback.model.frozen import BaseFormat, base_dtype, freeze
from finback.model.layers import Linear
from finback.model.moe import MoE, router_buffers
from finback.model.transformer import Transformer


def load_quantized(
    config: ModelConfig, values: Values, form: BaseFormat, compute: torch.dtype
) -> tuple[Transformer, str]:
    """Returns the frozen model and the digest of its weights before quantization."""
    model = Transformer(config, compute, base_dtype(form))  # pages that nothing has written to take no memory yet
    left = {id(parameter): name for name, parameter in model.named_parameters()}  # a tied head is the embedding
    known: dict[str, bytes] = {}

    def read(module: nn.Module) -> None:
        own = [parameter for parameter in module.parameters(recurse=False) if id(parameter) in left]
        values.fill([whole(left.pop(id(parameter)), parameter) for parameter in own])

    def filled(name: str, module: Linear | MoE) -> None:
        read(module)
        known[name] = peft.samples(name, module)

    for module in model.modules():
        if not isinstance(module, Linear | MoE):
            read(module)
    values.fill([whole(name, bias) for name, bias in router_buffers(model).items()])
    freeze(model, form, filled)
    return model, peft.digest(model, known=known)
