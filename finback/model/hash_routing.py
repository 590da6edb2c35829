"""Hash routing (V4 2.1; Hash Layers, arXiv 2106.04426): a table maps a token's id to its experts.

The experts' weights still come from the trained gate. V4 routes its first layers this way, since their hidden states carry little
information yet.
"""

import torch
from torch import Tensor

from finback.model.config import ModelConfig
from finback.model.layers import OwnStart
from finback.model.moe import Router


class HashRouter(Router, OwnStart):
    """A router that selects by a table (vocabulary, k), which is part of the weights and never changes."""

    table: Tensor
    kept = ("table",)
    starts = ("table",)

    def __init__(self, config: ModelConfig) -> None:
        super().__init__(config)
        self.register_buffer("bias", self.bias, persistent=False)  # unused in selection
        self.register_buffer("table", torch.zeros(config.vocab_size, config.num_experts_per_tok, dtype=torch.long))

    def start(self, generator: torch.Generator) -> None:
        """Distinct experts for each id, drawn uniformly. How V4's table was made is not published."""
        drawn = torch.rand(len(self.table), self.config.n_routed_experts, generator=generator)
        self.table.copy_(drawn.topk(self.config.num_experts_per_tok, dim=-1).indices)

    def select(self, affinity: Tensor, tokens: Tensor | None = None) -> Tensor:
        """The experts of the token ids `tokens` (n,): (n, k)."""
        assert tokens is not None, "hash routing needs token ids"
        return self.table[tokens]

    def update_bias(self, speed: float) -> None:
        """Only resets the load, since no bias changes a table."""
        super().update_bias(0.0)
