"""Near duplicates by MinHash and locality-sensitive hashing (Broder 1997), using datasketch."""

import re
from dataclasses import dataclass
from itertools import islice
from pathlib import Path
from typing import Any

import numpy as np

from finback.config import UserError, check_fields, check_positive
from finback.data.blocks import runs, squeeze
from finback.extras import how_to_get

TOGETHER = 20_000  # shingles hashed at a time
_WORD = re.compile(r"\S+")


@dataclass(frozen=True)
class NearDuplicates:
    """Drops a document if the estimated Jaccard index of its shingles with those of a kept one reaches `threshold`.

    The estimate's standard error is sqrt(J (1 - J) / permutations): 0.035 at 0.8. Kept signatures stay in memory, with 4 bytes
    per permutation and about as much for the index.
    """

    # estimated Jaccard index, 0 to 1, from which a document is a duplicate
    threshold: float = 0.8
    # consecutive words in a shingle
    shingle: int = 5
    # hash functions per signature; more are more accurate and more expensive
    permutations: int = 128

    def __post_init__(self) -> None:
        check_fields(self, "near")
        check_positive(self, "near", "shingle", "permutations")
        if not 0 < self.threshold < 1:
            remedy = "Exact repeats are dropped anyway."
            raise UserError("near.threshold", self.threshold, "not between 0 and 1", remedy)


class MinHashSigner:
    """Computes MinHash signatures of texts: (permutations,) uint32, the same for the same seed on every machine."""

    def __init__(self, near: NearDuplicates, seed: int) -> None:
        self.near = near
        self.empty = _library().MinHash(near.permutations, seed=seed % 2**32, scheme="affine32")

    def sign(self, text: str) -> np.ndarray:
        """A text's signature; a text shorter than a shingle is one shingle."""
        sketch = self.empty.copy()
        shingles = runs(text.casefold(), _WORD, self.near.shingle)
        some = set(islice(shingles, TOGETHER)) or {squeeze(text.casefold())}
        while some:
            sketch.update_batch([s.encode("utf-8", "surrogatepass") for s in some])
            some = set(islice(shingles, TOGETHER))
        return np.asarray(sketch.hashvalues, dtype="<u4")


class SignatureIndex:
    """The signatures of all documents kept so far, and search for similar ones."""

    def __init__(self, near: NearDuplicates) -> None:
        self.near = near
        # a false candidate costs a comparison, a missed one stays in the data: favor recall
        self.buckets = _library().MinHashLSH(near.threshold, near.permutations, weights=(0.1, 0.9))
        self.names: list[str] = []
        self.signatures: list[np.ndarray] = []

    def closest(self, signature: np.ndarray) -> str | None:
        """The name of the first kept document that is similar, None if there is none."""
        for number in sorted(self.buckets.query(_sketch(signature))):
            if np.mean(self.signatures[number] == signature) >= self.near.threshold:
                return self.names[number]
        return None

    def add(self, name: str, signature: np.ndarray) -> None:
        """Adds a kept document."""
        self.buckets.insert(len(self.names), _sketch(signature), check_duplication=False)
        self.names.append(name)
        self.signatures.append(signature)

    def load(self, path: Path, source: str) -> None:
        """Adds documents kept by an interrupted call, written by `dump_signature`."""
        with path.open("rb") as handle:
            while block := handle.read(8 + 4 * self.near.permutations):
                number = int.from_bytes(block[:8], "little")
                self.add(f"{source}:{number}", np.frombuffer(block[8:], dtype="<u4"))


def dump_signature(number: int, signature: np.ndarray) -> bytes:
    """A signature in the format that `SignatureIndex.load` reads."""
    return number.to_bytes(8, "little") + signature.tobytes()


def _sketch(signature: np.ndarray) -> Any:
    return _library().LeanMinHash(seed=0, hashvalues=signature, scheme="affine32")


def _library() -> Any:
    try:
        import datasketch
    except ImportError:
        problem = "the package `datasketch` is not installed"
        raise UserError("near", "MinHash", problem, how_to_get("data")) from None
    return datasketch
