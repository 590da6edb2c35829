"""Keeps a model's matrices in their stored format, as packed folders and GGUF files have them, without dequantizing."""

from collections.abc import Sequence

import torch
from torch import Tensor

from finback.checkpoint import names
from finback.checkpoint.gguf import GGUF
from finback.checkpoint.shards import Weights
from finback.kernels import quants
from finback.kernels.formats import Format
from finback.kernels.quants import Blocks
from finback.model.layers import Linear
from finback.model.moe import MoE
from finback.model.quantized import keep_embedding, matrix_names, store
from finback.model.transformer import Transformer

# format, values, factors
Stored = tuple[Format, Tensor, Tensor]


def keep(model: Transformer, shards: Weights) -> set[str]:
    """Gives modules their matrices as stored, where the parts of each can be joined; returns these matrices' names."""
    table, done = names.table(model.config), set[str]()
    for prefix, module in model.named_modules():
        if not isinstance(module, Linear | MoE):
            continue
        # not experts in GGUF blocks, nor kv_up, which absorbed attention reads by kernels of its own
        if isinstance(shards, GGUF) and (isinstance(module, MoE) or prefix.endswith("kv_up")):
            continue
        matrices = {}
        for kind in matrix_names(module):
            found = [shards.packed(name) for name in table.get(f"{prefix}.{kind}", ())]
            parts = [each for each in found if each is not None]
            if parts and len(parts) == len(found) and (joined := _joined(parts)) is not None:
                matrices[kind] = joined
        if len(matrices) < len(matrix_names(module)) or len({form.name for form, _, _ in matrices.values()}) > 1:
            continue
        for kind, (form, values, factors) in matrices.items():
            if isinstance(module, MoE):
                experts = (module.config.n_routed_experts, -1)
                values, factors = values.unflatten(0, experts), factors.unflatten(0, experts)
            store(module, kind, form, values, factors)
            done.add(f"{prefix}.{kind}")
    if isinstance(shards, GGUF):
        embedding = shards.packed(table["embed"][0])
        if embedding is not None and isinstance(embedding[0], Blocks):
            keep_embedding(model, embedding[0], embedding[1])
            done.add("embed")
    return done


def _joined(parts: Sequence[Stored]) -> Stored | None:
    """Stacks matrices row-wise into one: GGUF blocks of any kinds, other formats if all parts share one; else None."""
    values, factors = (torch.cat([part[i] for part in parts]) for i in (1, 2))  # type: ignore[misc]
    formats = [form for form, _, _ in parts]
    kept = [form for form in formats if isinstance(form, Blocks)]
    if len(kept) == len(formats):
        return quants.blocks(kept[0].columns, tuple(part for form in kept for part in form.parts)), values, factors
    alike = len({(form.name, f.shape[1:]) for form, _, f in parts}) == 1
    return (formats[0], values, factors) if alike else None
