"""Routed experts with biases, and a router whose logits have biases: gpt-oss (arXiv 2508.10925).

An expert is down((up + 1) ⊙ gate · sigmoid(alpha · gate)) with clamped gate and up. It is always computed as two products of rows
sorted by expert, so that frozen, quantized and adapted experts can supply their own products; the biases are added here.
"""

import torch
from torch import Tensor, nn

from finback.kernels import frozen
from finback.kernels.frozen import Product
from finback.kernels.moe_gemm import Blocks
from finback.kernels.swiglu import clamped
from finback.model.config import ModelConfig
from finback.model.moe import MoE, Router


class BiasedRouter(Router):
    """A router whose logits have a trained bias, in addition to V3's bias that affects only the selection."""

    def __init__(self, config: ModelConfig) -> None:
        super().__init__(config)
        self.logit_bias = nn.Parameter(torch.empty(config.n_routed_experts))

    def logits(self, x: Tensor) -> Tensor:
        return super().logits(x) + self.logit_bias.float()


class BiasedMoE(MoE):
    """A mixture of experts with biases: `gate_up_bias` (e · 2m,) and `down_bias` (e · d,), in the order of experts."""

    router: BiasedRouter

    def __init__(self, config: ModelConfig, router: BiasedRouter) -> None:
        super().__init__(config, router)
        self.gate_up_bias = nn.Parameter(torch.empty(self.gate_up.shape[:2].numel()))
        self.down_bias = nn.Parameter(torch.empty(self.down.shape[:2].numel()))

    def experts(self, x: Tensor, index: Tensor, weight: Tensor, gate_up: Tensor, down: Tensor) -> Tensor:  # type: ignore[override]
        return self.by_products(x, index, weight, len(gate_up), _learnt(gate_up), _learnt(down))

    def by_products(
        self, x: Tensor, index: Tensor, weight: Tensor, experts: int, gate_up: Product, down: Product
    ) -> Tensor:
        one, other = (_biased(p, b, experts // len(b)) for p, b in zip((gate_up, down), self.biases(), strict=True))
        return frozen.routed_experts(x, index, weight, experts, one, other, self.activation)

    def biases(self) -> tuple[Tensor, Tensor]:
        """The biases of gate_up (e, 2m) and of down (e, d)."""
        c = self.config
        return self.gate_up_bias.view(-1, 2 * c.moe_intermediate_size), self.down_bias.view(-1, c.hidden_size)

    def activation(self, x: Tensor) -> Tensor:
        """x (..., [gate | up]) -> (..., half)."""
        c = self.config
        assert c.swiglu_limit is not None and c.swiglu_alpha is not None, "these experts have clamped gates"
        gate, up = clamped(x, c.swiglu_limit).chunk(2, dim=-1)
        return (up + 1) * (gate * torch.sigmoid(gate * c.swiglu_alpha))


def _learnt(weights: Tensor) -> Product:
    return lambda rows, blocks: frozen.learnt_per_expert(rows, weights, blocks)


def _biased(product: Product, bias: Tensor, blocks_of_each: int) -> Product:
    """A product of rows in blocks, a fixed number per expert, plus the experts' biases (e, out)."""

    def made(rows: Tensor, blocks: Blocks) -> Tensor:
        experts = torch.tensor([block // blocks_of_each for block, _, _ in blocks], device=rows.device)
        heights = torch.tensor([stop - start for _, start, stop in blocks], device=rows.device)
        return product(rows, blocks) + bias[experts].repeat_interleave(heights, dim=0).to(rows.dtype)

    return made
