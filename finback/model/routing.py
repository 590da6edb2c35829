"""Routing replay: experts chosen in one pass are recorded and used again in another, see replay.py.

Only the choice is replayed: affinities, and with them the gates and their gradient, come from the live router. Layers are counted
from the bottom, dense ones included. MTP modules' routers always choose by themselves.
"""

import torch
from torch import Tensor

from finback.model.moe import MoE, Router
from finback.model.replace import recast
from finback.model.replay import Replay
from finback.model.transformer import Transformer


class TracedRouter(Router):
    """A router whose choice is recorded or replayed according to its model's Replay; choices are (…, layers, k) expert ids."""

    routing: Replay
    layer: int

    def select(self, affinity: Tensor, tokens: Tensor | None = None) -> Tensor:
        """As Router.select for tokens without a given choice."""
        given, sink = self.routing.given, self.routing.sink
        index = super().select(affinity, tokens)
        if given is not None:
            ids = given[..., self.layer, :].flatten(0, -2).to(index)
            assert ids.shape == index.shape, f"experts for {tuple(ids.shape)} choices, {tuple(index.shape)} are made"
            index = torch.where(ids >= 0, ids, index)
        if sink is not None:
            store, slots = sink
            store[slots, self.layer] = index.to(store.dtype)
        return index


def trace_routers(model: Transformer) -> Replay:
    """Makes the routers of the model's trunk follow one Replay, in place, or returns the one they already follow."""
    found = [(layer, b.feed_forward.router) for layer, b in enumerate(model.blocks) if isinstance(b.feed_forward, MoE)]
    known = [router.routing for _, router in found if isinstance(router, TracedRouter)]
    routing = known[0] if known else Replay()
    for layer, router in found:
        traced = recast(router, TracedRouter)
        traced.routing, traced.layer = routing, layer
    return routing
