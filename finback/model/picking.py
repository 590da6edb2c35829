"""Indexer replay: entries that lightning indexers select in one pass are recorded and used again in another, see replay.py.

Recorded per token and indexer: the `index_topk` selected entries in ascending order, counted from the row's first, as V3.2's
tokens or V4's compressed entries; -1 throughout where everything visible is selected. These are index_topk integers of 2 bytes,
or of 4 in models with windows above 32,768 tokens: 499,712 bytes per token for V3.2 (2,048 of 4 bytes in 61 layers), 5.8 times
its cache entry. MTP modules' indexers always choose by themselves.
"""

from collections.abc import Collection
from contextlib import AbstractContextManager, ExitStack

from torch import Tensor

from finback.config import UserError
from finback.model.cache import Pool
from finback.model.dsa import IndexerQueries, listed, marked
from finback.model.replace import recast
from finback.model.replay import Replay
from finback.model.routing import trace_routers
from finback.model.transformer import Transformer


class TracedIndexer(IndexerQueries):
    """An indexer whose selection is recorded or replayed according to its model's Replay."""

    picking: Replay
    # its number among the trunk's indexers
    number: int

    def select(self, scores: Tensor, seen: Tensor, part: slice) -> Tensor:
        """As IndexerQueries.select for tokens without a given choice."""
        given, sink = self.picking.given, self.picking.sink
        picked = super().select(scores, seen, part)
        if given is not None:
            ids = given[:, part, self.number]
            assert ids.shape[:2] == scores.shape[:2], f"entries for {tuple(ids.shape)}, scores {tuple(scores.shape)}"
            picked = marked(ids, picked)
        if sink is not None:
            store, slots = sink
            ids = listed(picked, seen, self.config.index_topk)
            store[slots.view(len(scores), -1)[:, part], self.number] = ids.to(store.dtype)
        return picked


def trace_indexers(model: Transformer) -> Replay:
    """Makes the indexers of the model's trunk follow one Replay, in place, or returns the one they already follow."""
    found = [module for module in model.blocks.modules() if isinstance(module, IndexerQueries)]
    known = [indexer.picking for indexer in found if isinstance(indexer, TracedIndexer)]
    picking = known[0] if known else Replay()
    for number, indexer in enumerate(found):
        traced = recast(indexer, TracedIndexer)  # type: ignore[type-abstract]  # laid over a class that rotates
        traced.picking, traced.number = picking, number
    return picking


class Choices:
    """What passes of a model record and replay, by the names of Pool.choices: "experts" of routers, "entries" of indexers."""

    def __init__(self, kinds: dict[str, Replay]) -> None:
        self.kinds = kinds

    def replaying(self, experts: Tensor | None, entries: Tensor | None) -> AbstractContextManager[object]:
        """Makes passes within use these experts (rows, tokens, layers, k) and entries (rows, tokens, indexers, k); see Replay."""
        given, stack = {"experts": experts, "entries": entries}, ExitStack()
        for name, replay in self.kinds.items():
            stack.enter_context(replay.replaying(given[name]))
        return stack

    def recording(self, pool: Pool, slots: Tensor, given: dict[str, Tensor]) -> AbstractContextManager[object]:
        """Records choices of passes within to the pool at `slots` (tokens,), and replays `given` ones, by kind."""
        stack = ExitStack()
        for name, replay in self.kinds.items():
            if name == "entries":  # clears another request's entries, since a pass that selects everything writes none
                pool.choices[name][slots] = -1
            stack.enter_context(replay.recording(pool.choices[name], slots, given.get(name)))
        return stack


def follow(model: Transformer, kinds: Collection[str]) -> Choices | None:
    """The choices of these kinds that passes of a model will record and replay; None if there are none.

    UserError, with the engine's names, if the model has no such modules.
    """
    c, traced = model.config, dict[str, Replay]()
    if "experts" in kinds:
        if not c.n_routed_experts:
            raise UserError("return_routed_experts", True, "the model has no routed experts", "Leave it out.")
        traced["experts"] = trace_routers(model)
    if "entries" in kinds:
        if not c.indexers:
            raise UserError("return_indexer_topk", True, "the model has no indexers", "Leave it out.")
        traced["entries"] = trace_indexers(model)
    return Choices(traced) if traced else None
