"""Blocks that train compiled: torch.compile fuses what lies between their products.

Compiled are attention with both norms, the feed-forward of dense layers and of shared experts, and the router with its
balance loss. The routed experts are not: the router decides their shapes, and moe_gemm.py has their fusion by hand. Blocks
of a model share what is compiled, so the cost is that of four parts, once: 10 to 60 seconds at the first step. Rollouts,
probes and validation run as they are, for their shapes change all the time.
"""

from collections.abc import Callable
from functools import cache
from typing import Any

import torch

from finback.model.layers import SwiGLU
from finback.model.moe import MoE
from finback.model.transformer import Block, Transformer


def compile_blocks(model: Transformer) -> Transformer:
    """Have a model's blocks run compiled from now on where gradients are taken, in place.

    Sums are rounded in another order than without, and in bf16 less often. Blocks whose attention alone is recomputed,
    or whose products are in FP8, cannot be compiled.
    """
    for module in model.modules():
        if isinstance(module, Block):
            assert module.recompute != "attention", "attention is compiled in one piece with its norms"
            module.compiled = compiled(Block.attend)
        elif isinstance(module, MoE):
            assert module.numerics is None, "FP8 products are not compiled"
            module.compiled = compiled(MoE.gate)
        elif isinstance(module, SwiGLU):
            module.compiled = compiled(SwiGLU.plain)
    return model


def why_not() -> str:
    """What stands in the way of compiling on this machine, in one line; "" if nothing does."""
    try:
        compiled(_sum)(torch.ones(8))
    except Exception as error:  # torch's compiler fails in as many ways as there are machines
        lines = [line.strip() for line in str(error).splitlines() if line.strip()]
        return (lines or [type(error).__name__])[0][:200]
    return ""


def _sum(x: torch.Tensor) -> torch.Tensor:
    return (x * 2).sum()


@cache
def compiled(part: Callable[..., Any]) -> Callable[..., Any]:
    """One compiled form of a part for all modules and models: weights are what it is called with."""
    import torch._inductor.config as inductor

    inductor.compile_threads = 1  # in this process: helpers would outlive a rank that is killed
    result: Callable[..., Any] = torch.compile(part)
    return result


def count() -> int:
    """How many graphs this process has compiled."""
    import torch._dynamo.utils as dynamo

    return int(dynamo.counters["stats"]["unique_graphs"])
