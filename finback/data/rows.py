"""Rows of a source: windows of its token stream, or packed whole documents."""

import random
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, Protocol

import numpy as np

from finback.config import UserError
from finback.data.pack import Shard

PADDING = -1  # document id of padding
WINDOW = 1024  # documents packed into rows together


@dataclass(frozen=True)
class Row:
    """One row as arrays of length + extra: ids, and each token's document; the first `size` are not padding."""

    tokens: np.ndarray
    document_ids: np.ndarray | None
    size: int


class RowOrder(Protocol):
    """The endless sequence of a source's rows, epoch by epoch; its position is a small state."""

    # number of units that an epoch permutes
    count: int

    def next(self) -> tuple[Any, int]:
        """The location of the next row, and how many of its tokens the trunk reads."""
        ...

    def row(self, place: Any, document_ids: bool) -> Row:
        """The row at a location."""
        ...

    def state(self) -> Any:
        """The place in the order, as JSON values."""
        ...

    def load_state(self, state: Any) -> None:
        """Continues from what `state` returned."""
        ...


class Windows:
    """Windows of `length` tokens plus `extra`; an epoch is a seeded permutation of them."""

    def __init__(self, name: str, shard: Shard, length: int, extra: int, seed: int) -> None:
        self.name, self.shard, self.length, self.extra, self.seed = name, shard, length, extra, seed
        self.count = (len(shard) - extra) // length
        self.drawn = 0
        self._order: tuple[int, np.ndarray] = (-1, np.empty(0))

    def next(self) -> tuple[int, int]:
        """The number of the next window over all epochs, and the tokens to learn from it."""
        self.drawn += 1
        return self.drawn - 1, self.length

    def row(self, place: int, document_ids: bool) -> Row:
        """The window at a place that `next` returned."""
        epoch, index = divmod(place, self.count)
        if self._order[0] != epoch:
            self._order = epoch, _permutation(self.seed, epoch, self.name, self.count)
        start = int(self._order[1][index]) * self.length
        stop = start + self.length + self.extra
        numbers = _numbers(_ends(self.name, self.shard), start, stop) if document_ids else None
        return Row(self.shard[start:stop], numbers, stop - start)

    def state(self) -> int:
        return self.drawn

    def load_state(self, state: int) -> None:
        self.drawn = state


class Fitted:
    """Whole documents in rows of `length` + 1 tokens, packed by best fit (V3 4.1: packing for integrity).

    A longer document is cut every `length` tokens into pieces that overlap by one token, so that each of its tokens is
    predicted once; only its last piece shares a row. If a piece fills its row and the document continues, the `extra` tokens
    (for MTP) come from the same document. Pieces are permuted every epoch and packed 1,024 at a time: a state is an epoch,
    a window of pieces, and a row in it.
    """

    def __init__(self, name: str, shard: Shard, length: int, extra: int, seed: int) -> None:
        self.name, self.shard, self.length, self.extra, self.seed = name, shard, length, extra, seed
        self.ends = _ends(name, shard)
        self.starts, self.sizes = _pieces(self.ends, length)
        self.count = len(self.starts)
        self.epoch, self.window, self.place = 0, 0, 0
        self._order: tuple[int, np.ndarray] = (-1, np.empty(0))
        self._arranged: tuple[tuple[int, int], list[list[int]]] = ((-1, -1), [])

    def next(self) -> tuple[list[int], int]:
        """The pieces of the next row, as indices, and the tokens to learn from it."""
        rows = self._rows()
        if self.place == len(rows):
            self.window, self.place = self.window + 1, 0
            if self.window * WINDOW >= self.count:
                self.epoch, self.window = self.epoch + 1, 0
            rows = self._rows()
        self.place += 1
        pieces = rows[self.place - 1]
        return pieces, min(self.length, int(self.sizes[pieces].sum()))

    def row(self, place: list[int], document_ids: bool) -> Row:
        """The row of the pieces that `next` returned, padded with zeros."""
        tokens = np.zeros(self.length + self.extra, dtype=np.int64)
        numbers = np.full(self.length + self.extra, PADDING)
        begin = 0
        for number, piece in enumerate(place):
            start, size = int(self.starts[piece]), int(self.sizes[piece])
            if size > self.length:  # it fills the row, and MTP needs the tokens after it
                whole = self.ends[np.searchsorted(self.ends, start, side="right")]
                size = min(int(whole) - start, self.length + self.extra)
            tokens[begin : begin + size] = self.shard[start : start + size]
            numbers[begin : begin + size] = number
            begin += size
        return Row(tokens, numbers if document_ids else None, begin)

    def state(self) -> list[int]:
        return [self.epoch, self.window, self.place]

    def load_state(self, state: list[int]) -> None:
        self.epoch, self.window, self.place = state

    def _rows(self) -> list[list[int]]:
        """The rows of the current window, as lists of pieces."""
        if self._order[0] != self.epoch:
            self._order = self.epoch, _permutation(self.seed, self.epoch, self.name, self.count)
        if self._arranged[0] != (self.epoch, self.window):
            pieces = self._order[1][self.window * WINDOW : (self.window + 1) * WINDOW]
            rng = random.Random(f"{self.seed} {self.name} {self.epoch} {self.window}")
            found = arrange(self.sizes[pieces].tolist(), self.length + 1, rng)
            self._arranged = (self.epoch, self.window), [pieces[row].tolist() for row in found]
        return self._arranged[1]


def _permutation(seed: int, epoch: int, name: str, n: int) -> np.ndarray:
    return np.random.default_rng([seed, epoch, *name.encode()]).permutation(n)


def _ends(name: str, shard: Shard) -> np.ndarray:
    if shard.ends is None:
        problem = "its shards do not say where documents end"
        raise UserError("data", name, problem, "Run the prepare stage of this version again.")
    return shard.ends


def _numbers(ends: np.ndarray, start: int, stop: int) -> np.ndarray:
    """The index, from 0, of the document of each token from start to stop."""
    first, last = np.searchsorted(ends, (start, stop - 1), side="right")
    return np.asarray(np.searchsorted(ends[first:last], np.arange(start, stop), side="right"))


def _pieces(ends: np.ndarray, length: int) -> tuple[np.ndarray, np.ndarray]:
    """Starts and sizes of the pieces of documents, each of 2 to length + 1 tokens."""
    ends = np.asarray(ends, dtype=np.int64)
    begins = np.concatenate([[0], ends[:-1]]).astype(np.int64)
    counts = np.maximum(0, -((ends - begins - 1) // -length))
    document = np.repeat(np.arange(len(ends)), counts)
    within = np.arange(len(document)) - np.repeat(np.cumsum(counts) - counts, counts)
    starts = begins[document] + within * length
    return starts, np.minimum(ends[document] - starts, length + 1)


def arrange(lengths: Sequence[int], row: int, rng: random.Random) -> list[list[int]]:
    """Best-fit packing of documents, given by length, into rows of at most `row` tokens; returns lists of indices in random order.

    Within a window of documents the longest comes first, each into the fullest row that has room for it.
    """
    order = list(range(len(lengths)))
    rng.shuffle(order)
    rows: list[list[int]] = []
    for start in range(0, len(order), WINDOW):
        window = sorted(order[start : start + WINDOW], key=lambda i: -lengths[i])
        fresh: list[list[int]] = []
        room: list[int] = []
        for index in window:
            fits = [r for r, left in enumerate(room) if left >= lengths[index]]
            if fits:
                best = min(fits, key=lambda r: room[r])
                fresh[best].append(index)
                room[best] -= lengths[index]
            else:
                fresh.append([index])
                room.append(row - lengths[index])
        rng.shuffle(fresh)
        rows += fresh
    return rows
