"""Token shards: one flat file of 16- or 32-bit ids per source and side, written whole or not at all."""

import hashlib
import os
from collections.abc import Iterable
from pathlib import Path

import numpy as np

from finback.config import UserError

VALIDATION = 20  # one document in twenty, by hash, is never trained on


def is_validation(text: str) -> bool:
    """Whether a document belongs to the validation side; depends on its text alone."""
    return hashlib.blake2b(text.encode("utf-8", "surrogatepass"), digest_size=2).digest()[0] % VALIDATION == 0


def write(path: Path, documents: Iterable[list[int]]) -> int:
    """Write documents one after the other as little-endian uint16; returns the number of tokens."""
    temporary, total = path.with_suffix(".part"), 0
    with temporary.open("wb") as handle:
        for ids in documents:
            array = np.asarray(ids, dtype="<u4")
            assert array.max(initial=0) < 65536, "token ids beyond 16 bits"
            handle.write(array.astype("<u2").tobytes())
            total += len(ids)
        handle.flush()
        os.fsync(handle.fileno())
    temporary.replace(path)
    return total


def read(path: Path) -> np.ndarray:
    """Memory-map a shard as a flat array of ids."""
    if not path.is_file():
        raise UserError("data", str(path), "no such shard", "Run the prepare stage, or correct `mixture`.")
    if not path.stat().st_size:
        return np.empty(0, dtype="<u2")  # there is nothing to map
    return np.memmap(path, dtype="<u2", mode="r")
