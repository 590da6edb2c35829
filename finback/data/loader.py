"""Batches from weighted sources: seeded, resumable, and the same rows for any number of ranks."""

from pathlib import Path
from typing import Any, Literal

from finback.config import UserError
from finback.data import pack
from finback.data.rows import Fitted, Row, RowOrder, Windows


class Loader:
    """Rows of `length` + `extra` tokens from several shards, mixed by weight.

    With packing "stream" a row is a window of a source's token stream; with "best_fit" it contains whole documents. Each row
    comes from the source that is furthest behind its share of tokens, so the mixture is exact to within a row and needs no
    random state.
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
        self.extra, self.seed, self.packing = extra, seed, packing
        total = sum(mixture.values())
        self.shares = {name: weight / total for name, weight in mixture.items() if weight > 0}
        self.shards = {name: pack.read(folder / f"{name}.train.bin") for name in self.shares}
        self.length, self.orders = length, self._orders(length)
        self.drawn = dict.fromkeys(self.shares, 0)  # tokens that the trunk reads, without padding

    def _orders(self, length: int) -> dict[str, RowOrder]:
        """Each source's rows of this length, from the first."""
        kind = Windows if self.packing == "stream" else Fitted
        orders: dict[str, RowOrder] = {
            name: kind(name, shard, length, self.extra, self.seed) for name, shard in self.shards.items()
        }
        for name, order in orders.items():
            if order.count < 1:
                problem = f"the source has only {len(self.shards[name])} tokens"
                remedy = f"Give it at least {length + self.extra} or shorten the rows."
                raise UserError(f"mixture.{name}", self.shares[name], problem, remedy)
        return orders

    def resize(self, length: int) -> None:
        """Draws rows of another length from now on, from the start of each source, so some text may be read again."""
        if length != self.length:
            self.length, self.orders = length, self._orders(length)

    def draw(self, rows: int, rank: int = 0, ranks: int = 1, document_ids: bool = True) -> list[Row]:
        """This rank's share of the next `rows` rows; with `document_ids`, also the document of each token.

        Every rank advances over all rows and reads only its own.
        """
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
        """State for a checkpoint."""
        at = {name: order.state() for name, order in self.orders.items()}
        return {"tokens": dict(self.drawn), "at": at, "length": self.length}

    def load_state(self, state: dict[str, Any]) -> None:
        """Continues after the row at which `state` was taken."""
        if "drawn" in state:  # from versions without best-fit packing: counts rows
            state = {"tokens": {n: c * self.length for n, c in state["drawn"].items()}, "at": state["drawn"]}
        self.resize(state.get("length", self.length))  # earlier versions had one length
        assert set(state["at"]) == set(self.orders), "the checkpoint used other sources"
        for name, place in state["at"].items():
            assert isinstance(place, int) == (self.packing == "stream"), "the checkpoint used another packing"
            self.orders[name].load_state(place)
        self.drawn = {name: int(count) for name, count in state["tokens"].items()}

    def _lagging(self) -> str:
        """The source furthest behind its share after the next row, counted in rows."""
        total = sum(self.drawn.values()) / self.length + 1
        return max(self.shares, key=lambda n: self.shares[n] * total - self.drawn[n] / self.length)
