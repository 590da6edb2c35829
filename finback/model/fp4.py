"""Quantization-aware training in FP4: passes compute with the numbers that an FP4 file would hold (V4, post-training).

Routed experts' weights are rounded to MXFP4 in every pass, and so are the queries and keys of V4's indexers, which a Hadamard
matrix mixes first so that no element stands out. Gradients pass through the rounding as if it were not there, onto the fp32 masters.
"""

from collections.abc import Callable
from dataclasses import dataclass, replace
from functools import partial
from typing import Any, Literal

import torch
from torch import Tensor

from finback.config import UserError
from finback.kernels import moe_gemm
from finback.kernels.formats import MXFP4_BLOCK, round_mxfp4
from finback.model.config import ModelConfig
from finback.model.csa import CompressedIndexer
from finback.model.dsa import IndexerQueries
from finback.model.moe import MoE
from finback.model.replace import recast_modules
from finback.model.transformer import Transformer

Qat = Literal["none", "mxfp4"]


def check(config: ModelConfig, field: str) -> None:
    """Raises UserError if the experts' weights have no MXFP4 form, or there are none."""
    if not config.n_routed_experts:
        raise UserError(field, "mxfp4", "rounds routed experts, and the model has none", "Leave it out.")
    for name in ("hidden_size", "moe_intermediate_size"):
        if (width := getattr(config, name)) % MXFP4_BLOCK:
            problem = f"rounds blocks of {MXFP4_BLOCK} numbers, which do not divide {name} = {width}"
            raise UserError(field, "mxfp4", problem, "Leave it out, or change the width.")
    if config.attention == "compressed" and (width := config.index_head_dim) & width - 1:
        problem = f"mixes an indexer's numbers by a Hadamard matrix, which does not exist for index_head_dim = {width}"
        raise UserError(field, "mxfp4", problem, "Leave it out, or use a power of two.")


def use_fp4(model: Transformer) -> Transformer:
    """Rounds a model's routed experts and indexers in every pass, in place. Call it after other changes to experts."""
    for module in model.modules():
        if isinstance(module, MoE):
            module.experts = RoundedExperts(_exact(module.experts))
    return round_indexers(model)


def round_indexers(model: Transformer) -> Transformer:
    """Rounds the queries and keys of V4's indexers in every pass, in place."""
    return recast_modules(model, CompressedIndexer, RoundedIndexer)


def as_indexers_of(other: Transformer) -> Callable[[Transformer], Transformer]:
    """Rounds the indexers of a model, in place, if another model's are rounded."""
    rounds = any(isinstance(m, RoundedIndexer) for m in other.modules())
    return round_indexers if rounds else lambda model: model


def is_fp4(model: Transformer) -> bool:
    """Whether a model's passes round its experts."""
    return any(isinstance(m, MoE) and isinstance(m.experts, RoundedExperts) for m in model.modules())


def rounded(x: Tensor, block: int = MXFP4_BLOCK) -> Tensor:
    """x (..., columns) in MXFP4's numbers; the gradient is that of x itself (straight-through)."""
    return _Rounded.apply(x, block)


def is_expert_stack(name: str, shape: tuple[int, ...]) -> bool:
    """Whether a parameter is the gate_up or down of routed experts (experts, rows, columns)."""
    return len(shape) == 3 and name.endswith((".gate_up", ".down"))


@dataclass(frozen=True)
class RoundedExperts:
    """Routed experts whose weights pass through MXFP4 on their way into `form`."""

    form: moe_gemm.Experts

    def __call__(self, x: Tensor, index: Tensor, weight: Tensor, gate_up: Tensor, down: Tensor) -> Tensor:
        return self.form(x, index, weight, rounded(gate_up), rounded(down))


def _exact(form: moe_gemm.Experts) -> moe_gemm.Experts:
    """Makes FP8 products scale weights by powers of two, so that FP4 numbers stay exact; keeps other forms."""
    if isinstance(form, partial) and "numerics" in form.keywords:
        return partial(form.func, numerics=replace(form.keywords["numerics"], weight_power_of_two=True))
    return form


class RoundedIndexer(IndexerQueries):
    """An indexer whose queries and keys pass through a Hadamard matrix and MXFP4 before they are multiplied."""

    @staticmethod
    def scores(query: Tensor, weight: Tensor, key: Tensor) -> Tensor:
        """As IndexerQueries.scores. Heads narrower than a block, as toy models have, are one block."""
        return IndexerQueries.scores(_mixed(query), weight, _mixed(key))


def _mixed(x: Tensor) -> Tensor:
    """x (..., e) through the Hadamard matrix and MXFP4, in fp32."""
    width = x.size(-1)
    return rounded(x.float() @ _hadamard(width, x.device), min(width, MXFP4_BLOCK))


def _hadamard(width: int, device: torch.device) -> Tensor:
    """The symmetric orthogonal matrix of Sylvester's construction, (width, width)."""
    assert width & width - 1 == 0, "widths are powers of two"
    matrix = torch.ones(1, 1)
    while len(matrix) < width:
        matrix = torch.cat([torch.cat([matrix, matrix], dim=1), torch.cat([matrix, -matrix], dim=1)])
    return (matrix * width**-0.5).to(device)


class _Rounded(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, block: int) -> Tensor:
        return round_mxfp4(x, block)

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor | None, ...]:
        return grads[0], None
