"""metrics.jsonl as columns, read incrementally. Does not import torch."""

import json
import time
from array import array
from operator import itemgetter
from pathlib import Path
from typing import Any

import numpy as np
from pydantic_core import from_json

from finback.runs.thinning import Line

PIECE = 1 << 20  # bytes read at a time


class Tail:
    """The complete lines added to a file since the last look; an incomplete line is left for later."""

    def __init__(self, path: Path) -> None:
        self.path, self.offset, self.size = path, 0, 0
        self._identity: tuple[int, int] | None = None

    def restarted(self) -> bool:
        """Whether the file has been replaced or truncated since the last look: then all of it is new."""
        try:
            found = self.path.lstat()
        except OSError:
            return False
        identity, self.size = (found.st_dev, found.st_ino), found.st_size
        again = self._identity not in (None, identity) or self.size < self.offset
        self._identity = identity
        if again:
            self.offset = 0
        return again

    def piece(self) -> bytes:
        """Some more complete lines, which end at `offset`; b"" if there are none."""
        if self.path.is_symlink():  # symbolic links are not followed
            return b""
        try:
            with self.path.open("rb") as handle:
                handle.seek(self.offset)
                content = handle.read(PIECE)
                while content and b"\n" not in content:
                    more = handle.read(PIECE)
                    if not more:
                        return b""
                    content += more
        except OSError:
            return b""
        whole = content[: content.rfind(b"\n") + 1]
        self.offset += len(whole)
        return whole


class Following:
    """Reads a file's lines incrementally."""

    complete = False  # whether the whole file has been read

    def __init__(self, path: Path) -> None:
        self.tail = Tail(path)
        self.clear()

    def clear(self) -> None:
        """Forgets everything."""

    def take(self, lines: bytes, place: int) -> None:
        """Processes complete lines that start at `place` in the file."""

    def update(self, seconds: float) -> None:
        """Reads new lines for about `seconds`; call again for the rest."""
        if self.tail.restarted():
            self.clear()
        end, self.complete = time.monotonic() + seconds, False
        while lines := self.tail.piece():
            self.take(lines, self.tail.offset - len(lines))
            if time.monotonic() > end:
                return
        self.complete = True


class MetricsTable(Following):
    """One stage's metrics: for each name the rows that have it and the values; nested lists stay as they are."""

    def clear(self) -> None:
        self.rows = 0
        self.columns: dict[str, tuple[array[int], array[float]]] = {}
        self.nested: dict[str, tuple[list[int], list[Any]]] = {}

    @property
    def share(self) -> float:
        """The share of the file that has been read."""
        return 1.0 if self.complete else self.tail.offset / max(1, self.tail.size)

    def column(self, name: str) -> tuple[Line, Line]:
        """Rows and values of a name, both empty if it was never logged."""
        rows, values = self.columns.get(name, (array("q"), array("d")))
        return np.array(rows, dtype=np.float64), np.array(values, dtype=np.float64)

    def filled(self, name: str) -> Line:
        """A value for every row: 0 where it was not logged."""
        rows, values = self.column(name)
        if len(rows) == self.rows:
            return values
        found = np.zeros(self.rows)
        found[rows.astype(np.int64)] = values
        return found

    def carried(self, name: str) -> Line:
        """A value for every row: the last one logged; 0 before the first."""
        rows, values = self.column(name)
        if len(rows) in (0, self.rows):
            return values if len(rows) else np.zeros(self.rows)
        place = np.searchsorted(rows, np.arange(self.rows), side="right") - 1
        return np.where(place >= 0, values[np.maximum(place, 0)], 0.0)

    def take(self, lines: bytes, place: int) -> None:
        found, begin = records(lines), 0
        while begin < len(found):  # consecutive records with the same names are added column by column
            names = found[begin].keys()
            end = begin + 1
            while end < len(found) and found[end].keys() == names:
                end += 1
            stretch = found[begin:end]
            for name in names:
                self._extend(name, list(map(itemgetter(name), stretch)))
            self.rows += end - begin
            begin = end

    def _extend(self, name: str, values: list[Any]) -> None:
        try:
            fresh = array("d", values)
            rows = range(self.rows, self.rows + len(values))
        except (TypeError, OverflowError):
            if all(isinstance(v, list) for v in values):
                places, matrices = self.nested.setdefault(name, ([], []))
                places.extend(range(self.rows, self.rows + len(values)))
                matrices.extend(values)
                return
            pairs = [(self.rows + i, float(v)) for i, v in enumerate(values) if isinstance(v, int | float)]
            fresh, rows = array("d", (v for _, v in pairs)), [r for r, _ in pairs]  # type: ignore[assignment]
        places_, numbers = self.columns.setdefault(name, (array("q"), array("d")))
        places_.extend(rows)
        numbers.extend(fresh)


def read(path: Path) -> MetricsTable:
    """Reads a whole file at once."""
    table = MetricsTable(path)
    table.update(float("inf"))
    return table


def outline(path: Path, lines: int) -> MetricsTable:
    """A table of single lines spread evenly over a file, including the first and last: a preview of its curves."""
    table = MetricsTable(path)
    table.take(b"".join(_spread(path, lines)), 0)
    return table


def _spread(path: Path, lines: int) -> list[bytes]:
    if path.is_symlink() or not path.is_file():
        return []
    size, found = path.stat().st_size, []
    with path.open("rb") as handle:
        for place in range(0, size, max(1, size // lines)):
            if place > handle.tell():  # otherwise the previous line already reached this place
                handle.seek(place - 1)
                handle.readline(PIECE)
            found.append(handle.readline(PIECE))
        handle.seek(max(0, size - PIECE // 16))
        found += handle.read().split(b"\n")[1:-1][-1:]
    return [line.rstrip(b"\n") + b"\n" for line in found]


def records(lines: bytes) -> list[dict[str, Any]]:
    """The objects in lines of JSON; invalid ones, such as an incomplete line, are skipped."""
    try:
        # one call, three times as fast as json; JSON values contain no raw line breaks
        found = from_json(b"[" + lines.strip(b"\n").replace(b"\n", b",") + b"]")
    except ValueError:
        found = []
        for line in lines.split(b"\n"):
            try:
                found.append(json.loads(line))
            except ValueError:
                continue
    return [r for r in found if isinstance(r, dict)]
