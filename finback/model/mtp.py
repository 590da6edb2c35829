"""Multi-token prediction: one more block that predicts the token after the next (V3 2.2)."""

from typing import Any

import torch
from torch import Tensor, nn

from finback.model.config import ModelConfig
from finback.model.layers import Linear, RMSNorm
from finback.model.mhc import StreamMerge


class MTP(nn.Module):
    """h' = M [RMSNorm(Emb(t_{i+k})) ; RMSNorm(h_i)], then a block, then a norm (V3 eq. 21-22).

    The concatenation order is that of the released weights (embedding first), the reverse of the paper's formula.
    Embedding and head are the trunk's.
    """

    def __init__(self, config: ModelConfig, block: nn.Module) -> None:
        super().__init__()
        self.embed_norm = RMSNorm(config.hidden_size, config.rms_norm_eps)
        self.hidden_norm = RMSNorm(config.hidden_size, config.rms_norm_eps)
        self.project = Linear(2 * config.hidden_size, config.hidden_size)
        self.block = block
        self.norm = RMSNorm(config.hidden_size, config.rms_norm_eps)

    def forward(self, hidden: Tensor, embedded: Tensor, *context: Any) -> Tensor:
        """hidden and embedded (b, t, d) -> (b, t, d); positions are those of `hidden`. context: as in Block.forward."""
        joined = torch.cat([self.embed_norm(embedded), self.hidden_norm(hidden)], dim=-1)
        return self.norm(self.block(self.project(joined), *context))

    def states(self, made: Tensor) -> Tensor:
        """The states for logits, (b, t, d), from the output of `forward`, which is also the next depth's input."""
        return made


class StreamMTP(nn.Module):
    """The same on mHC's streams (V4 2.1): x_k = M_e RMSNorm(Emb) + M_h RMSNorm(x_k), then a block, and its own merge.

    Its input is the trunk's streams, not their merged state.
    """

    def __init__(self, config: ModelConfig, block: nn.Module) -> None:
        super().__init__()
        self.embed_norm = RMSNorm(config.hidden_size, config.rms_norm_eps)
        self.hidden_norm = RMSNorm(config.hidden_size, config.rms_norm_eps)
        self.embed_project = Linear(config.hidden_size, config.hidden_size)
        self.hidden_project = Linear(config.hidden_size, config.hidden_size)
        self.block = block
        self.merge = StreamMerge(config)
        self.norm = RMSNorm(config.hidden_size, config.rms_norm_eps)

    def forward(self, streams: Tensor, embedded: Tensor, *context: Any) -> Tensor:
        """streams (b, t, n, d), embedded (b, t, d) -> streams; context: as in Block.forward."""
        added = self.embed_project(self.embed_norm(embedded))[:, :, None]
        y: Tensor = self.block(self.hidden_project(self.hidden_norm(streams)) + added, *context)
        return y

    def states(self, made: Tensor) -> Tensor:
        """The states for logits, (b, t, d)."""
        return self.norm(self.merge(made))
