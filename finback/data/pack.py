"""Token shards: flat files of 16- or 32-bit ids, one set per source and split, written completely or not at all.

x.train.bin    ids, one document after the other; if large, continued in x.train.001.bin and so on
x.train.idx    where each document ends, 64-bit
x.train.json   dtype, files and counts, written last
"""

import hashlib
import os
from collections.abc import Iterable
from pathlib import Path
from types import TracebackType
from typing import Any, BinaryIO

import numpy as np

from finback.config import UserError
from finback.runs.files import read_json, write_json

VALIDATION = 20  # one document in twenty, by hash, is for validation
LARGE = 2**30  # tokens; a file ends with the document that exceeds this


def is_validation(text: str) -> bool:
    """Whether a document is for validation; depends only on its text."""
    return hashlib.blake2b(text.encode("utf-8", "surrogatepass"), digest_size=2).digest()[0] % VALIDATION == 0


class ShardWriter:
    """Writes shards; they get their names only when everything is on disk."""

    def __init__(self, path: Path, vocab_size: int = 65536, large: int = LARGE) -> None:
        self.path, self.vocab_size, self.large = path, vocab_size, large
        self.dtype = "<u2" if vocab_size <= 65536 else "<u4"
        self.sizes: list[int] = []  # tokens per file
        self.documents = 0
        self._open: list[BinaryIO] = []
        self._index = self._part(path.with_suffix(".idx")).open("wb")

    @property
    def tokens(self) -> int:
        """Number of tokens written so far."""
        return sum(self.sizes)

    def add(self, ids: np.ndarray) -> None:
        """Appends one document."""
        assert ids.max(initial=0) < min(self.vocab_size, 2**32), f"token ids beyond {_bits(self.dtype)} bits"
        if not self._open or self.sizes[-1] >= self.large:
            self._open.append(self._part(_name(self.path, len(self.sizes))).open("wb"))
            self.sizes.append(0)
        self._open[-1].write(ids.astype(self.dtype).tobytes())
        self.sizes[-1] += len(ids)
        self.documents += 1
        self._index.write(self.tokens.to_bytes(8, "little"))

    def __enter__(self) -> "ShardWriter":
        return self

    def __exit__(self, kind: type[BaseException] | None, _: BaseException | None, __: TracebackType | None) -> None:
        if kind is None and not self._open:
            self.add(np.empty(0, dtype="<u4"))  # without documents, write an empty file
            self.documents = 0
            self._index.truncate(0)
        for handle in (*self._open, self._index):
            handle.flush()
            os.fsync(handle.fileno())
            handle.close()
        if kind is None:
            self._publish()

    def _publish(self) -> None:
        names = [_name(self.path, i) for i in range(len(self.sizes))]
        self.path.with_suffix(".json").unlink(missing_ok=True)  # it is about to become invalid
        for name in (*names, self.path.with_suffix(".idx")):
            self._part(name).replace(name)
        write_json(
            self.path.with_suffix(".json"),
            {
                "dtype": self.dtype,
                "vocab_size": self.vocab_size,
                "tokens": self.tokens,
                "documents": self.documents,
                "files": {name.name: size for name, size in zip(names, self.sizes, strict=True)},
            },
        )

    def _part(self, path: Path) -> Path:
        return path.with_name(path.name + ".part")


def write(path: Path, documents: Iterable[list[int]], vocab_size: int = 65536, large: int = LARGE) -> int:
    """Writes documents consecutively as little-endian ids. Returns the number of tokens."""
    with ShardWriter(path, vocab_size, large) as writer:
        for ids in documents:
            writer.add(np.asarray(ids, dtype="<u4"))
    return writer.tokens


class Shard:
    """One split of a source, memory-mapped: a flat array of ids over several files, and where documents end."""

    def __init__(self, files: list[np.ndarray], ends: np.ndarray | None) -> None:
        self.files, self.ends = files, ends
        self.starts = np.cumsum([0, *(len(file) for file in files)])
        self.dtype = files[0].dtype

    def __len__(self) -> int:
        return int(self.starts[-1])

    def __getitem__(self, where: slice) -> np.ndarray:
        """Ids from start to stop; a view if they are in one file."""
        start, stop, step = where.indices(len(self))
        assert step == 1, "shards are read forwards"
        first = int(np.searchsorted(self.starts, start, side="right")) - 1
        if stop <= start or stop <= self.starts[first + 1]:
            first = min(first, len(self.files) - 1)
            return np.asarray(self.files[first][start - self.starts[first] : max(start, stop) - self.starts[first]])
        parts = zip(self.files, self.starts.tolist(), strict=False)
        return np.concatenate([file[max(0, start - begin) : max(0, stop - begin)] for file, begin in parts])


def read(path: Path) -> Shard:
    """Memory-maps the shards of one split of a source, checked against their description."""
    if not path.is_file():
        raise UserError("data", str(path), "no such shard", "Run the prepare stage, or correct `mixture`.")
    described = path.with_suffix(".json")
    if not described.is_file():  # from versions without descriptions
        return Shard([_map(path, "<u2")], None)
    record: dict[str, Any] = read_json(described)
    files = [_map(path.with_name(name), record["dtype"]) for name in record["files"]]
    sizes = [len(file) for file in files]
    ends = _map(path.with_suffix(".idx"), "<u8")
    whole = sizes == list(record["files"].values()) and len(ends) == record["documents"]
    if not whole or (len(ends) and int(ends[-1]) != record["tokens"]):
        problem = f"has {sum(sizes):,} tokens of {_bits(record['dtype'])} bits, but {record['tokens']:,} were written"
        remedy = "The file is damaged: delete the prepare stage's folder and run it again."
        raise UserError("data", str(path), problem, remedy)
    return Shard(files, ends)


def _name(path: Path, number: int) -> Path:
    return path.with_suffix(f".{number:03}.bin") if number else path


def _map(path: Path, dtype: str) -> np.ndarray:
    if not path.is_file():
        raise UserError("data", str(path), "no such file", "Delete the prepare stage's folder and run it again.")
    if path.stat().st_size % np.dtype(dtype).itemsize:
        problem = f"size is not a multiple of {_bits(dtype)} bits"
        raise UserError("data", str(path), problem, "Delete the prepare stage's folder and run it again.")
    if not path.stat().st_size:
        return np.empty(0, dtype=dtype)  # an empty file cannot be mapped
    return np.memmap(path, dtype=dtype, mode="r")


def _bits(dtype: str) -> int:
    return 8 * np.dtype(dtype).itemsize
