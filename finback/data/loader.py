"""Batches from weighted sources: seeded, resumable, the same rows whatever the number of ranks."""

from pathlib import Path
from typing import Any, Literal

from finback.config import UserError
from finback.data import pack
from finback.data.rows import Fitted, Row, RowOrder, Windows


class Loader:
    """Rows of `length` + `extra` tokens from several shards, mixed by weight.

    With packing "stream" a row is a window of a source's token stream; with "best_fit" it holds whole documents. Each
    row goes to the source that lags furthest behind its share of the tokens, so the mixture is exact to a row and needs
    no random state.
    """

    def __init__(
        self,
        folder: Path,
        mixture: dict[str, float],
        length: int,
        extra: int,
        seed: int,
        packing: Literal["stream", "best_fit"] = "stream",
    ) -> None:
        if not mixture or min(mixture.values()) < 0 or sum(mixture.values()) <= 0:
            raise UserError("mixture", mixture, "weights must be >= 0 and not all 0", "Give each source a share.")
        self.length, self.extra, self.seed, self.packing = length, extra, seed, packing
        total = sum(mixture.values())
        self.shares = {name: weight / total for name, weight in mixture.items() if weight > 0}
        self.shards = {name: pack.read(folder / f"{name}.train.bin") for name in self.shares}
        kind = Windows if packing == "stream" else Fitted
        self.orders: dict[str, RowOrder] = {
            name: kind(name, shard, length, extra, seed) for name, shard in self.shards.items()
        }
        for name, order in self.orders.items():
            if order.count < 1:
                problem = f"the source has only {len(self.shards[name])} tokens"
                remedy = f"Give it at least {length + extra} or shorten the rows."
                raise UserError(f"mixture.{name}", self.shares[name], problem, remedy)
        self.drawn = dict.fromkeys(self.shares, 0)  # tokens that the trunk reads, padding left out

    def draw(self, rows: int, rank: int = 0, ranks: int = 1, document_ids: bool = True) -> list[Row]:
        """This rank's share of the next `rows` rows, rows / ranks of them; with `document_ids`, which document each token
        belongs to. Every rank walks past all rows and reads its own."""
        assert rows % ranks == 0, f"{rows} rows do not divide among {ranks} ranks"
        picked = []
        for row in range(rows):
            name = self._lagging()
            place, tokens = self.orders[name].next()
            self.drawn[name] += tokens
            if row % ranks == rank:
                picked.append(self.orders[name].row(place, document_ids))
        return picked

    def tokens_by_source(self) -> dict[str, int]:
        """Tokens drawn from each source so far."""
        return dict(self.drawn)

    def state(self) -> dict[str, Any]:
        """What resuming needs."""
        return {"tokens": dict(self.drawn), "at": {name: order.state() for name, order in self.orders.items()}}

    def load_state(self, state: dict[str, Any]) -> None:
        """Continue after the row that `state` was taken at."""
        if "drawn" in state:  # of before there was best-fit packing: rows
            state = {"tokens": {n: c * self.length for n, c in state["drawn"].items()}, "at": state["drawn"]}
        assert set(state["at"]) == set(self.orders), "the checkpoint drew from other sources"
        for name, place in state["at"].items():
            assert isinstance(place, int) == (self.packing == "stream"), "the checkpoint packed otherwise"
            self.orders[name].load_state(place)
        self.drawn = {name: int(count) for name, count in state["tokens"].items()}

    def _lagging(self) -> str:
        """The source furthest behind its share once another row is drawn, counted in rows."""
        total = sum(self.drawn.values()) / self.length + 1
        return max(self.shares, key=lambda n: self.shares[n] * total - self.drawn[n] / self.length)
