"""Trains with compiled blocks: torch.compile fuses the operations between matrix products.

It compiles attention with both norms, the feed-forward of dense layers and shared experts, and the router with its balance
loss. Routed experts are not compiled, because their shapes depend on the router; moe_gemm.py fuses them by hand. Nor is sparse
attention, whose shapes depend on what is selected; V4's mixtures of streams are, with their Sinkhorn steps. All blocks
of a model share the compiled code, so only four parts are compiled, once: 10 to 60 seconds in the first step. Rollouts,
probes and validation run uncompiled, because their shapes keep changing.
"""

from collections.abc import Callable
from functools import cache
from typing import Any

import torch

from finback.kernels.documents import Documents
from finback.model.cache import LayerCache
from finback.model.dsa import DSA
from finback.model.layers import SwiGLU
from finback.model.mhc import HyperConnection
from finback.model.moe import MoE
from finback.model.native import use_native
from finback.model.recompute import Recomputed
from finback.model.replace import recast
from finback.model.swa import SWA
from finback.model.transformer import Block, Transformer
from finback.train.precision import Fp8SwiGLU


def compile_blocks(model: Transformer) -> Transformer:
    """Makes a model's blocks run compiled whenever gradients are needed, in place.

    Sums are rounded in a different order than without compilation, and less often in bf16. Blocks that recompute only their
    attention, or whose products are in FP8, cannot be compiled.
    """
    use_native(model)  # first: a module whose class changes later is compiled again
    for module in list(model.modules()):
        assert not isinstance(module, Fp8SwiGLU), "FP8 products are not compiled"
        if isinstance(module, HyperConnection):
            recast(module, CompiledHyperConnection)
        elif isinstance(module, Block) and not isinstance(module.attention, DSA | SWA):
            assert not isinstance(module.attention, Recomputed), "attention is compiled together with its norms"
            recast(module, CompiledBlock)
        elif isinstance(module, MoE):
            recast(module, CompiledMoE)
        elif isinstance(module, SwiGLU):
            recast(module, CompiledSwiGLU)
    return model


def _in_training(part: Callable[..., Any]) -> Callable[..., Any]:
    """Wraps a method so that it runs compiled if gradients are needed and nothing is cached.

    Per-document attention is not compiled: its shapes change with every batch.
    """

    def run(*arguments: Any) -> Any:
        trains = torch.is_grad_enabled() and not any(isinstance(a, LayerCache | Documents) for a in arguments)
        return (compiled(part) if trains else part)(*arguments)

    return run


class CompiledBlock(Block):
    """A block whose attention and norms are compiled as one function."""

    attend = _in_training(Block.attend)


class CompiledHyperConnection(HyperConnection):
    """Mixtures of streams in one function."""

    forward = _in_training(HyperConnection.forward)


class CompiledMoE(MoE):
    """A mixture of experts whose router and balance loss are compiled."""

    route = _in_training(MoE.route)


class CompiledSwiGLU(SwiGLU):
    """A compiled feed-forward."""

    forward = _in_training(SwiGLU.forward)


def why_not() -> str:
    """Why compilation fails on this machine, in one line; "" if it works."""
    try:
        compiled(_sum)(torch.ones(8))
    except Exception as error:  # torch's compiler raises many kinds of errors
        lines = [line.strip() for line in str(error).splitlines() if line.strip()]
        return (lines or [type(error).__name__])[0][:200]
    return ""


def _sum(x: torch.Tensor) -> torch.Tensor:
    return (x * 2).sum()


@cache
def compiled(part: Callable[..., Any]) -> Callable[..., Any]:
    """The compiled form of a function, shared by all modules and models; the weights are among its arguments."""
    import torch._inductor.config as inductor

    inductor.compile_threads = 1  # compile in this process: workers would outlive a killed rank
    result: Callable[..., Any] = torch.compile(part)
    return result
