"""Activations made again in the backward pass instead of being kept, by policy.

  none       everything is kept
  attention  of each attention only its input: queries, keys, values and scores are made again
  block      of each block only its input: about one more forward pass, for the least memory

V3 (3.2.3) makes norms and up-projections again, which lies between the first two. Same bits with any policy.
"""

from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager, nullcontext
from typing import Any, Literal

import torch
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from finback.model.moe import Router

Policy = Literal["none", "attention", "block"]


def checkpointed(module: nn.Module, run: Callable[..., Tensor], *arguments: Any) -> Tensor:
    """run(*arguments), of which only the arguments are kept; `module` holds the routers that `run` meets."""
    if not torch.is_grad_enabled():
        return run(*arguments)

    def contexts() -> tuple[AbstractContextManager[None], AbstractContextManager[None]]:
        return nullcontext(), _uncounted(module)

    result: Tensor = checkpoint(run, *arguments, use_reentrant=False, preserve_rng_state=False, context_fn=contexts)
    return result


@contextmanager
def _uncounted(module: nn.Module) -> Iterator[None]:
    """The second time that a token comes by it is no load: it would steer the balance twice."""
    routers = [m for m in module.modules() if isinstance(m, Router)]
    for router in routers:
        router.counting = False
    try:
        yield
    finally:
        for router in routers:
            router.counting = True
