"""Multi-token prediction: one more block that predicts the token after the next (V3 2.2)."""

from typing import Any

import torch
from torch import Tensor, nn

from finback.model.config import ModelConfig
from finback.model.layers import Linear, RMSNorm


class MTP(nn.Module):
    """h' = M [RMSNorm(Emb(t_{i+k})) ; RMSNorm(h_i)], then a block, then a norm (V3 eq. 21-22).

    The concatenation order is that of the released weights (embedding first), the reverse of the paper's formula.
    Embedding and head are the trunk's own.
    """

    def __init__(self, config: ModelConfig, block: nn.Module) -> None:
        super().__init__()
        self.embed_norm = RMSNorm(config.hidden_size, config.rms_norm_eps)
        self.hidden_norm = RMSNorm(config.hidden_size, config.rms_norm_eps)
        self.project = Linear(2 * config.hidden_size, config.hidden_size)
        self.block = block
        self.norm = RMSNorm(config.hidden_size, config.rms_norm_eps)

    def forward(self, hidden: Tensor, embedded: Tensor, *context: Any) -> Tensor:
        """hidden and embedded (b, t, d) -> (b, t, d); positions stay those of `hidden`. context: as Block.forward takes it."""
        joined = torch.cat([self.embed_norm(embedded), self.hidden_norm(hidden)], dim=-1)
        return self.norm(self.block(self.project(joined), *context))
