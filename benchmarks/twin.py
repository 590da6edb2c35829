"""transformers' DeepseekV3ForCausalLM with the shapes and weights of a finback model, without MTP."""

import dataclasses
from typing import Any

import torch
from torch import Tensor, nn

from finback.checkpoint.hf_config import raw_config
from finback.checkpoint.names import table
from finback.model.transformer import Transformer


def twin(model: Transformer, **settings: Any) -> Any:
    """The peer's model; `settings` go into its config. Every tensor of the trunk is used."""
    import transformers  # here, so that finback's processes need not load it

    c = dataclasses.replace(model.config, num_nextn_predict_layers=0)
    assert c.attention == "mla" and c.rope_scaling is None, "the benchmarks' models are plain MLA"
    config = transformers.DeepseekV3Config.from_dict(raw_config(c, "float32") | settings)
    other = transformers.DeepseekV3ForCausalLM(config)
    state: dict[str, Tensor] = {}
    for ours, theirs in table(c).items():
        rows = model.state_dict()[ours].detach()
        rows = rows.flatten(0, 1) if rows.ndim == 3 else rows
        state.update(zip(theirs, rows.chunk(len(theirs), dim=0), strict=True))
    for layer in range(c.first_k_dense_replace, c.num_hidden_layers):
        _stack(state, f"model.layers.{layer}.mlp.experts.", c.n_routed_experts)
    other.load_state_dict(state, strict=True)
    return other


def _stack(state: dict[str, Tensor], prefix: str, experts: int) -> None:
    """Stacks the separate experts of files, as transformers holds them in memory."""
    gate, up, down = (
        torch.stack([state.pop(f"{prefix}{e}.{part}_proj.weight") for e in range(experts)])
        for part in ("gate", "up", "down")
    )
    state[f"{prefix}gate_up_proj"] = torch.cat([gate, up], dim=1)
    state[f"{prefix}down_proj"] = down


def count(model: nn.Module) -> int:
    """Number of parameters."""
    return sum(p.numel() for p in model.parameters())
