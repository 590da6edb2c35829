"""Near duplicates by MinHash and locality-sensitive hashing (Broder 1997); datasketch does both."""

import re
from dataclasses import dataclass
from itertools import islice
from pathlib import Path
from typing import Any

import numpy as np

from finback.config import UserError, check_fields, check_positive
from finback.data.blocks import runs, squeeze
from finback.extras import how_to_get

TOGETHER = 20_000  # shingles that are hashed at a time
_WORD = re.compile(r"\S+")


@dataclass(frozen=True)
class NearDuplicates:
    """A document goes if the estimated Jaccard index of its shingles and an earlier, kept one's reaches `threshold`.

    The estimate's standard error is sqrt(J (1 - J) / permutations): 0.035 at 0.8. Kept signatures stay in memory,
    4 bytes for each permutation and about as much for the index.
    """

    # estimated Jaccard index, 0 to 1, from which on a document is a duplicate
    threshold: float = 0.8
    # words in a row
    shingle: int = 5
    # hash functions of a signature: more of them estimate better and cost more
    permutations: int = 128

    def __post_init__(self) -> None:
        check_fields(self, "near")
        check_positive(self, "near", "shingle", "permutations")
        if not 0 < self.threshold < 1:
            remedy = "Repeats that are exact go anyway."
            raise UserError("near.threshold", self.threshold, "not between 0 and 1", remedy)


class MinHashSigner:
    """Texts to MinHash signatures: (permutations,) uint32, the same for the same seed on every machine."""

    def __init__(self, near: NearDuplicates, seed: int) -> None:
        self.near = near
        self.empty = _library().MinHash(near.permutations, seed=seed % 2**32, scheme="affine32")

    def sign(self, text: str) -> np.ndarray:
        """A text's signature; one that is shorter than a shingle is one shingle."""
        sketch = self.empty.copy()
        shingles = runs(text.casefold(), _WORD, self.near.shingle)
        some = set(islice(shingles, TOGETHER)) or {squeeze(text.casefold())}
        while some:
            sketch.update_batch([s.encode("utf-8", "surrogatepass") for s in some])
            some = set(islice(shingles, TOGETHER))
        return np.asarray(sketch.hashvalues, dtype="<u4")


class SignatureIndex:
    """The signatures of the documents kept so far, and which of them a new one is close to."""

    def __init__(self, near: NearDuplicates) -> None:
        self.near = near
        # a candidate that is too far costs a comparison, one that is missed stays in: recall counts for more
        self.buckets = _library().MinHashLSH(near.threshold, near.permutations, weights=(0.1, 0.9))
        self.names: list[str] = []
        self.signatures: list[np.ndarray] = []

    def closest(self, signature: np.ndarray) -> str | None:
        """The name of the first kept document that is near, if there is one."""
        for number in sorted(self.buckets.query(_sketch(signature))):
            if np.mean(self.signatures[number] == signature) >= self.near.threshold:
                return self.names[number]
        return None

    def add(self, name: str, signature: np.ndarray) -> None:
        """Remember a document that is kept."""
        self.buckets.insert(len(self.names), _sketch(signature), check_duplication=False)
        self.names.append(name)
        self.signatures.append(signature)

    def load(self, path: Path, source: str) -> None:
        """Remember what an earlier, interrupted call kept of a source, as `dump_signature` wrote it."""
        with path.open("rb") as handle:
            while block := handle.read(8 + 4 * self.near.permutations):
                number = int.from_bytes(block[:8], "little")
                self.add(f"{source}:{number}", np.frombuffer(block[8:], dtype="<u4"))


def dump_signature(number: int, signature: np.ndarray) -> bytes:
    """A signature as `SignatureIndex.load` reads it."""
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
