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

from finback.kernels.documents import Documents
from finback.model.cache import LayerCache
from finback.model.layers import SwiGLU
from finback.model.moe import MoE
from finback.model.native import use_native
from finback.model.recompute import Recomputed
from finback.model.replace import recast
from finback.model.transformer import Block, Transformer
from finback.train.precision import Fp8SwiGLU


def compile_blocks(model: Transformer) -> Transformer:
    """Have a model's blocks run compiled from now on where gradients are taken, in place.

    Sums are rounded in another order than without, and in bf16 less often. Blocks whose attention alone is recomputed,
    or whose products are in FP8, cannot be compiled.
    """
    use_native(model)  # before, for a module whose class changes later is compiled anew
    for module in list(model.modules()):
        assert not isinstance(module, Fp8SwiGLU), "FP8 products are not compiled"
        if isinstance(module, Block):
            assert not isinstance(module.attention, Recomputed), "attention is compiled in one piece with its norms"
            recast(module, CompiledBlock)
        elif isinstance(module, MoE):
            recast(module, CompiledMoE)
        elif isinstance(module, SwiGLU):
            recast(module, CompiledSwiGLU)
    return model


def _in_training(part: Callable[..., Any]) -> Callable[..., Any]:
    """A method that runs compiled where gradients are taken and nothing is cached.

    Attention document by document is not compiled: its shapes change with every batch.
    """

    def run(*arguments: Any) -> Any:
        trains = torch.is_grad_enabled() and not any(isinstance(a, LayerCache | Documents) for a in arguments)
        return (compiled(part) if trains else part)(*arguments)

    return run


class CompiledBlock(Block):
    """A block whose attention and norms are compiled in one piece."""

    attend = _in_training(Block.attend)


class CompiledMoE(MoE):
    """A mixture of experts whose router and balance loss are compiled."""

    route = _in_training(MoE.route)


class CompiledSwiGLU(SwiGLU):
    """A compiled feed-forward."""

    forward = _in_training(SwiGLU.forward)


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
