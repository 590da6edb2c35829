"""Routing replay: the experts that tokens are sent to, recorded in one pass and used again in another.

Two forms of the same model can send a token to different experts where affinities nearly tie, and then differ by far more
than rounding. Training on what an engine sampled therefore takes the experts that the engine took (R3, 2510.11370; V3.2's
"keep routing"). Only the choice is replayed: affinities, and with them the gates and their gradient, are the live router's.

Layers are counted from the model's bottom, dense ones included. The MTP modules' routers always choose for themselves.
"""

from collections.abc import Iterator
from contextlib import contextmanager

import torch
from torch import Tensor

from finback.model.moe import MoE, Router
from finback.model.replace import recast
from finback.model.transformer import Transformer


class Routing:
    """What the routers of one model record and replay in the pass that runs; nothing by default."""

    def __init__(self) -> None:
        # (tokens, layers, k) expert ids in the order in which they were chosen, -1 where the router chooses itself
        self.given: Tensor | None = None
        # where choices go: a store (slots, layers, k) and the slot of each token (tokens,)
        self.sink: tuple[Tensor, Tensor] | None = None

    @contextmanager
    def recording(self, store: Tensor, slots: Tensor, given: Tensor | None = None) -> Iterator[None]:
        """Write the choices of the passes within to `store` (slots, layers, k) at `slots` (tokens,); `given` as in replaying."""
        self.sink = store, slots
        try:
            with self.replaying(given):
                yield
        finally:
            self.sink = None

    @contextmanager
    def replaying(self, given: Tensor | None) -> Iterator[None]:
        """Have the passes within take the experts `given` (..., layers, k), -1 where none are; None: choose.

        What recomputes activations chooses again in the backward pass, which has to lie within too.
        """
        self.given = None if given is None else given.flatten(0, -3)
        try:
            yield
        finally:
            self.given = None


class TracedRouter(Router):
    """A router whose choice is recorded or replayed as its model's Routing says."""

    routing: Routing
    layer: int

    def select(self, affinity: Tensor, tokens: Tensor | None = None) -> Tensor:
        """As Router.select, where nothing is given."""
        given, sink = self.routing.given, self.routing.sink
        index = super().select(affinity, tokens)
        if given is not None:
            ids = given[:, self.layer].to(index)
            assert ids.shape == index.shape, f"experts for {tuple(ids.shape)} choices, {tuple(index.shape)} are made"
            index = torch.where(ids >= 0, ids, index)
        if sink is not None:
            store, slots = sink
            store[slots, self.layer] = index.to(store.dtype)
        return index


def trace_routers(model: Transformer) -> Routing:
    """Have the routers of the model's trunk follow one Routing, in place; the one that they follow already, if they do."""
    found = [(layer, b.feed_forward.router) for layer, b in enumerate(model.blocks) if isinstance(b.feed_forward, MoE)]
    known = [router.routing for _, router in found if isinstance(router, TracedRouter)]
    routing = known[0] if known else Routing()
    for layer, router in found:
        traced = recast(router, TracedRouter)
        traced.routing, traced.layer = routing, layer
    return routing
