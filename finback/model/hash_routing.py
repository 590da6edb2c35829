"""Hash routing (V4 2.1; Hash Layers, arXiv 2106.04426): the experts of a token are those that a table gives its id.

How much each counts is still the learnt gate's. V4 routes its first layers so, whose hidden states say little yet.
"""

import torch
from torch import Tensor

from finback.model.config import ModelConfig
from finback.model.layers import OwnStart
from finback.model.moe import Router


class HashRouter(Router, OwnStart):
    """A router whose choice is a table (vocabulary, k) that comes with the weights and never changes."""

    table: Tensor
    kept = ("table",)
    starts = ("table",)

    def __init__(self, config: ModelConfig) -> None:
        super().__init__(config)
        self.register_buffer("bias", self.bias, persistent=False)  # nothing chooses by it
        self.register_buffer("table", torch.zeros(config.vocab_size, config.num_experts_per_tok, dtype=torch.long))

    def start(self, generator: torch.Generator) -> None:
        """Different experts for each id, drawn evenly. How V4's own table was made is not published."""
        drawn = torch.rand(len(self.table), self.config.n_routed_experts, generator=generator)
        self.table.copy_(drawn.topk(self.config.num_experts_per_tok, dim=-1).indices)

    def select(self, affinity: Tensor, tokens: Tensor | None = None) -> Tensor:
        """The experts of the ids tokens (n,): (n, k)."""
        assert tokens is not None, "hash routing goes by token ids"
        return self.table[tokens]

    def update_bias(self, speed: float) -> None:
        """Only forgets the load, for no bias moves a table."""
        super().update_bias(0.0)
