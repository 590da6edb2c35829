"""Quantization-aware training in FP4: passes compute with the numbers that an FP4 file would hold (V4, post-training).

Routed experts' weights are rounded to MXFP4 in every pass, and so are the queries and keys of V4's indexers (rounding.py); the
model's config records this for all later readers. Gradients pass through the rounding as if it were not there, onto the fp32 masters.
"""

from dataclasses import dataclass, replace
from functools import partial
from typing import Literal

from torch import Tensor

from finback.config import UserError
from finback.kernels import moe_gemm
from finback.kernels.formats import MXFP4_BLOCK
from finback.model.config import ModelConfig
from finback.model.csa import CompressedIndexer
from finback.model.moe import MoE
from finback.model.replace import recast_modules
from finback.model.rounding import RoundedIndexer, rounded
from finback.model.transformer import Transformer

Qat = Literal["none", "mxfp4"]


def checked(config: ModelConfig, field: str) -> ModelConfig:
    """The config of the trained model. UserError if the experts' weights have no MXFP4 form, or there are none."""
    if not config.n_routed_experts:
        raise UserError(field, "mxfp4", "rounds routed experts, and the model has none", "Leave it out.")
    for name in ("hidden_size", "moe_intermediate_size"):
        if (width := getattr(config, name)) % MXFP4_BLOCK:
            problem = f"rounds blocks of {MXFP4_BLOCK} numbers, which do not divide {name} = {width}"
            raise UserError(field, "mxfp4", problem, "Leave it out, or change the width.")
    config = _with_rounded_indexers(config)
    if config.attention == "compressed" and (width := config.index_head_dim) & width - 1:
        problem = f"mixes an indexer's numbers by a Hadamard matrix, which does not exist for index_head_dim = {width}"
        raise UserError(field, "mxfp4", problem, "Leave it out, or use a power of two.")
    return config


def _with_rounded_indexers(config: ModelConfig) -> ModelConfig:
    return replace(config, index_fp4=config.attention == "compressed")


def use_fp4(model: Transformer) -> Transformer:
    """Rounds a model's routed experts and indexers in every pass, in place. Call it after other changes to experts."""
    for module in model.modules():
        if isinstance(module, MoE):
            module.experts = RoundedExperts(_exact(module.experts))
    return round_indexers(model)


def round_indexers(model: Transformer) -> Transformer:
    """Rounds the queries and keys of V4's indexers in every pass, in place, and says so in the model's config."""
    model.config = _with_rounded_indexers(model.config)
    return recast_modules(model, CompressedIndexer, RoundedIndexer)


def is_fp4(model: Transformer) -> bool:
    """Whether a model's passes round its experts."""
    return any(isinstance(m, MoE) and isinstance(m.experts, RoundedExperts) for m in model.modules())


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
