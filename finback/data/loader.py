"""Batches from weighted sources: seeded, resumable, the same rows whatever the number of ranks."""

from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from finback.config import UserError
from finback.data import pack


class Loader:
    """Rows of `length` + `extra` tokens from several shards, mixed by weight.

    A row is a window of a source's token stream; windows of one epoch are a seeded permutation. Each row goes to
    the source that lags furthest behind its share, so the mixture is exact and needs no random state.
    """

    def __init__(self, folder: Path, mixture: dict[str, float], length: int, extra: int, seed: int) -> None:
        if not mixture or min(mixture.values()) < 0 or sum(mixture.values()) <= 0:
            raise UserError(
                "mixture", mixture, "weights must be >= 0 and not all 0", "Give each source a share."
            )
        self.length, self.extra, self.seed = length, extra, seed
        total = sum(mixture.values())
        self.shares = {name: weight / total for name, weight in mixture.items() if weight > 0}
        self.shards = {name: pack.read(folder / f"{name}.train.bin") for name in self.shares}
        self.windows = {name: (len(shard) - extra) // length for name, shard in self.shards.items()}
        for name, windows in self.windows.items():
            if windows < 1:
                raise UserError(
                    f"mixture.{name}", self.shares[name], f"the source has only {len(self.shards[name])} tokens",
                    f"Give it at least {length + extra} or shorten the rows.",
                )  # fmt: skip
        self.drawn = dict.fromkeys(self.shares, 0)
        self._order: dict[str, tuple[int, np.ndarray]] = {}

    def batch(self, rows: int, rank: int = 0, ranks: int = 1) -> Tensor:
        """This rank's share of the next `rows` rows: (rows / ranks, length + extra) ids."""
        assert rows % ranks == 0, f"{rows} rows do not divide among {ranks} ranks"
        picked = []
        for row in range(rows):
            total = sum(self.drawn.values()) + 1
            name = max(self.shares, key=lambda n: self.shares[n] * total - self.drawn[n])
            if row % ranks == rank:
                picked.append(self._row(name, self.drawn[name]))
            self.drawn[name] += 1
        return torch.from_numpy(np.stack(picked).astype(np.int64))

    def tokens_by_source(self) -> dict[str, int]:
        """Tokens drawn from each source so far."""
        return {name: count * self.length for name, count in self.drawn.items()}

    def state(self) -> dict[str, Any]:
        """What resuming needs."""
        return {"drawn": dict(self.drawn)}

    def load_state(self, state: dict[str, Any]) -> None:
        """Continue after the row that `state` was taken at."""
        assert set(state["drawn"]) == set(self.drawn), "the checkpoint drew from other sources"
        self.drawn = {name: int(count) for name, count in state["drawn"].items()}

    def _row(self, name: str, draw: int) -> np.ndarray:
        epoch, index = divmod(draw, self.windows[name])
        if self._order.get(name, (-1, None))[0] != epoch:
            rng = np.random.default_rng([self.seed, epoch, *name.encode()])
            self._order[name] = epoch, rng.permutation(self.windows[name])
        start = int(self._order[name][1][index]) * self.length
        return np.asarray(self.shards[name][start : start + self.length + self.extra])
