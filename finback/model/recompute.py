"""Activation recomputation in the backward pass, by policy.

  none       everything is kept
  attention  keeps only the input of each attention: queries, keys, values and scores are recomputed
  block      keeps only the input of each block: about one more forward pass, for the least memory

V3 (3.2.3) recomputes norms and up-projections, which is between the first two. All policies give the same bits.
"""

from collections.abc import Callable, Iterator
from contextlib import contextmanager, nullcontext
from typing import Any, Literal

import torch
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from finback.model.cache import LayerCache
from finback.model.gqa import GQA
from finback.model.mla import MLA
from finback.model.moe import MoE
from finback.model.replace import recast_modules
from finback.model.swa import SWA
from finback.model.transformer import Block, Transformer

Policy = Literal["none", "attention", "block"]
KINDS: dict[Policy, tuple[type[nn.Module], ...]] = {"none": (), "attention": (MLA, GQA, SWA), "block": (Block,)}


def policy_of(asked: Policy | None, adapted: bool) -> Policy:
    """The requested policy; by default "block" for adapters, to save memory, otherwise nothing."""
    return asked or ("block" if adapted else "none")


def use_recompute(model: Transformer, policy: Policy) -> Transformer:
    """Applies a policy to the model's blocks, in place."""
    return recast_modules(model, KINDS[policy], Recomputed)


class Recomputed(nn.Module):
    """A block or an attention that keeps only its inputs in training."""

    def forward(self, x: Tensor, cos: Tensor, sin: Tensor, cache: LayerCache | None = None, *masks: Any) -> Tensor:
        run: Callable[..., Tensor] = super().forward
        if cache is not None or not torch.is_grad_enabled():
            return run(x, cos, sin, cache, *masks)
        options: dict[str, Any] = {"use_reentrant": False, "preserve_rng_state": False}
        again = lambda: (nullcontext(), _uncounted(self))  # noqa: E731
        result: Tensor = checkpoint(run, x, cos, sin, None, *masks, **options, context_fn=again)
        return result


@contextmanager
def _uncounted(module: nn.Module) -> Iterator[None]:
    """Restores loads and balance losses: counting a token twice would distort balancing."""
    known = [(m, m.router.load.clone(), m.balance) for m in module.modules() if isinstance(m, MoE)]
    try:
        yield
    finally:
        for moe, load, balance in known:
            moe.router.load.copy_(load)
            moe.balance = balance
