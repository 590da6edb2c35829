"""Routing replay: experts chosen in one pass are recorded and used again in another.

Two forms of the same model may route a token to different experts when affinities nearly tie, and then differ by far more than
rounding. Training on sampled answers therefore uses the experts that the engine chose (R3, 2510.11370; V3.2's "keep
routing"). Only the choice is replayed: affinities, and with them the gates and their gradient, come from the live router.

Layers are counted from the bottom, dense ones included. MTP modules' routers always choose by themselves.
"""

from collections.abc import Iterator
from contextlib import contextmanager

import torch
from torch import Tensor

from finback.model.moe import MoE, Router
from finback.model.replace import recast
from finback.model.transformer import Transformer


class Routing:
    """What the routers of one model record and replay in the current pass; by default nothing."""

    def __init__(self) -> None:
        # (tokens, layers, k) expert ids in the order of choice, -1 where the router chooses itself
        self.given: Tensor | None = None
        # destination of choices: a store (slots, layers, k) and the slot of each token (tokens,)
        self.sink: tuple[Tensor, Tensor] | None = None

    @contextmanager
    def recording(self, store: Tensor, slots: Tensor, given: Tensor | None = None) -> Iterator[None]:
        """Records the choices of passes within to `store` (slots, layers, k) at `slots` (tokens,); `given` as in replaying."""
        self.sink = store, slots
        try:
            with self.replaying(given):
                yield
        finally:
            self.sink = None

    @contextmanager
    def replaying(self, given: Tensor | None) -> Iterator[None]:
        """Makes passes within use the experts `given` (..., layers, k), -1: none given; None: all routers choose.

        Recomputation chooses again in the backward pass, which must therefore also run within.
        """
        self.given = None if given is None else given.flatten(0, -3)
        try:
            yield
        finally:
            self.given = None


class TracedRouter(Router):
    """A router whose choice is recorded or replayed according to its model's Routing."""

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
    """Makes the routers of the model's trunk follow one Routing, in place, or returns the one they already follow."""
    found = [(layer, b.feed_forward.router) for layer, b in enumerate(model.blocks) if isinstance(b.feed_forward, MoE)]
    known = [router.routing for _, router in found if isinstance(router, TracedRouter)]
    routing = known[0] if known else Routing()
    for layer, router in found:
        traced = recast(router, TracedRouter)
        traced.routing, traced.layer = routing, layer
    return routing
