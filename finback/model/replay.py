"""Choices of a pass that are recorded and used again in another pass: experts of routers, entries of indexers.

Where two scores nearly tie, two forms of the same model may choose differently, and then differ by far more than rounding.
Training on sampled answers therefore uses what the engine chose (R3, 2510.11370; V3.2's "keep routing").
"""

from collections.abc import Iterator
from contextlib import contextmanager

from torch import Tensor


class Replay:
    """What modules of one kind, routers or indexers, record and replay in the current pass of a model; by default nothing."""

    def __init__(self) -> None:
        # (..., modules, k) choices for the tokens of the pass, -1 where a module chooses itself
        self.given: Tensor | None = None
        # destination of choices: a store (slots, modules, k) and the slot of each token (tokens,)
        self.sink: tuple[Tensor, Tensor] | None = None

    @contextmanager
    def recording(self, store: Tensor, slots: Tensor, given: Tensor | None = None) -> Iterator[None]:
        """Records the choices of passes within to `store` (slots, modules, k) at `slots` (tokens,); `given` as in replaying."""
        self.sink = store, slots
        try:
            with self.replaying(given):
                yield
        finally:
            self.sink = None

    @contextmanager
    def replaying(self, given: Tensor | None) -> Iterator[None]:
        """Makes passes within use the choices `given` (..., modules, k), -1: none given; None: all modules choose.

        Recomputation chooses again in the backward pass, which must therefore also run within.
        """
        self.given = given
        try:
            yield
        finally:
            self.given = None
