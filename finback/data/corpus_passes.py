"""The two parallel passes over a corpus: reading a file, and encoding a segment of stored documents."""

import json
import os
from collections.abc import Iterable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import BinaryIO

import numpy as np

from finback.data import document_store, pack
from finback.data.clean import CheckedDocument, CleaningRules, check
from finback.data.encoding import encode_documents
from finback.data.sources import Document, Source
from finback.data.tokenizer import Tokenizer

TRAIN = -1  # marks training documents, instead of a validation document's number of bytes


@dataclass(frozen=True)
class _Pass:
    """Work divided into one piece per file; each piece leaves a part in the folder."""

    folder: Path
    files: Sequence[Path]

    def parts(self) -> list[Path]:
        """The parts of all pieces, in order."""
        return [self.folder / f"{piece:05}.part" for piece in range(len(self.files))]


@dataclass(frozen=True)
class ReadPass(_Pass):
    """A piece is one file of a source: it is read, normalized and checked by the rules that need no other document."""

    source: Source
    rules: CleaningRules

    def __call__(self, piece: int) -> None:
        with _atomic(self.parts()[piece]) as handle:
            for raw in self.source.read(self.files[piece]):
                handle.write(_dump(check(raw, self.rules)).encode("ascii") + b"\n")


@dataclass(frozen=True)
class EncodePass(_Pass):
    """A piece is one file of stored documents: writes their ids, and whether each is for validation."""

    tokenizer: Path
    validates: bool
    fim: float
    seed: int

    def __call__(self, piece: int) -> None:
        documents = document_store.read_documents(self.files[piece])
        found = list(encode_sides(documents, Tokenizer(self.tokenizer), self.validates, self.fim, self.seed))
        ids, counted = [ids for ids, _ in found], [n for _, n in found]
        with _atomic(self.parts()[piece]) as handle:
            np.savez(handle, ids=np.concatenate(ids), sizes=[len(i) for i in ids], counted=counted)


def encode_sides(
    documents: Iterable[Document], tokenizer: Tokenizer, validates: bool, fim: float, seed: int
) -> Iterator[tuple[np.ndarray, int]]:
    """Ids of documents, each with the number of bytes of its text if it is for validation, otherwise TRAIN."""
    for document, ids in encode_documents(documents, tokenizer, fim, seed):
        plain = document.plain if validates else ""
        valid = validates and pack.is_validation(plain)
        yield ids, len(plain.encode("utf-8", "surrogatepass")) if valid else TRAIN


def read_encoded(path: Path) -> Iterator[tuple[np.ndarray, int]]:
    """Reads a part written by `EncodePass`."""
    with np.load(path) as found:
        ids, ends, counted = found["ids"], np.cumsum(found["sizes"]).tolist(), found["counted"].tolist()
    for start, end, n in zip([0, *ends], ends, counted, strict=False):
        yield ids[start:end], n


def read_checked(path: Path) -> Iterator[CheckedDocument]:
    """Reads a part written by `ReadPass`."""
    with path.open(encoding="ascii") as handle:
        yield from map(_load, handle)


def _dump(checked: CheckedDocument) -> str:
    signature = None if checked.signature is None else checked.signature.tobytes().hex()
    document, key = document_store.dump_document(checked.document), checked.key.hex()
    return json.dumps([document, checked.fault, checked.redacted, key, signature, checked.task])


def _load(line: str) -> CheckedDocument:
    document, fault, redacted, key, signature, task = json.loads(line)
    signed = None if signature is None else np.frombuffer(bytes.fromhex(signature), dtype="<u4")
    return CheckedDocument(document_store.load_document(document), fault, redacted, bytes.fromhex(key), signed, task)


@contextmanager
def _atomic(path: Path) -> Iterator[BinaryIO]:
    """A file that gets its name once it is complete; another process may be writing the same one."""
    temporary = path.with_name(f"{path.name}.{os.getpid()}")
    try:
        with temporary.open("wb") as handle:
            yield handle
        temporary.replace(path)
    finally:
        temporary.unlink(missing_ok=True)
