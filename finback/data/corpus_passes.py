"""The two passes over a corpus cut into pieces for other processes: reading a file, encoding a segment of what is stored."""

import json
import os
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from finback.data import document_store, pack
from finback.data.clean import CheckedDocument, CleaningRules, check
from finback.data.encoding import encode_documents
from finback.data.sources import Document, Source
from finback.data.tokenizer import Tokenizer

TRAIN = -1  # in place of the bytes of a document on the validation side


@dataclass(frozen=True)
class ReadPass:
    """A piece is a file of a source: read, normalised and checked by the rules that need no other document."""

    source: Source
    files: tuple[Path, ...]
    rules: CleaningRules
    folder: Path

    def __call__(self, piece: int) -> None:
        with _AtomicPath(self.part(piece)) as part, part.open("w", encoding="ascii") as handle:
            for raw in self.source.read(self.files[piece]):
                handle.write(_dump(check(raw, self.rules)) + "\n")

    def part(self, piece: int) -> Path:
        """What the piece leaves."""
        return self.folder / f"{piece:05}.part"


@dataclass(frozen=True)
class EncodePass:
    """A piece is a file of stored documents: its ids, and the side each document is on."""

    files: tuple[Path, ...]
    tokenizer: Path
    validates: bool
    fim: float
    seed: int
    folder: Path

    def __call__(self, piece: int) -> None:
        documents = document_store.read_documents(self.files[piece])
        found = list(encode_sides(documents, Tokenizer(self.tokenizer), self.validates, self.fim, self.seed))
        ids, counted = [ids for ids, _ in found], [n for _, n in found]
        with _AtomicPath(self.part(piece)) as part, part.open("wb") as handle:
            np.savez(handle, ids=np.concatenate(ids), sizes=[len(i) for i in ids], counted=counted)

    def part(self, piece: int) -> Path:
        """What the piece leaves."""
        return self.folder / f"{piece:05}.part"


def encode_sides(
    documents: Iterable[Document], tokenizer: Tokenizer, validates: bool, fim: float, seed: int
) -> Iterator[tuple[np.ndarray, int]]:
    """Ids of documents, each with the bytes of its text if it is for validation, otherwise TRAIN."""
    for document, ids in encode_documents(documents, tokenizer, fim, seed):
        plain = document.plain if validates else ""
        valid = validates and pack.is_validation(plain)
        yield ids, len(plain.encode("utf-8", "surrogatepass")) if valid else TRAIN


def read_encoded(path: Path) -> Iterator[tuple[np.ndarray, int]]:
    """What `EncodePass` left of a piece."""
    with np.load(path) as found:
        ids, ends, counted = found["ids"], np.cumsum(found["sizes"]).tolist(), found["counted"].tolist()
    for start, end, n in zip([0, *ends], ends, counted, strict=False):
        yield ids[start:end], n


def read_checked(path: Path) -> Iterator[CheckedDocument]:
    """What `ReadPass` left of a piece."""
    with path.open(encoding="ascii") as handle:
        yield from map(_load, handle)


def _dump(checked: CheckedDocument) -> str:
    signature = None if checked.signature is None else checked.signature.tobytes().hex()
    return json.dumps(
        [
            document_store.dump_document(checked.document),
            checked.fault,
            checked.redacted,
            checked.key.hex(),
            signature,
            checked.task,
        ]
    )


def _load(line: str) -> CheckedDocument:
    document, fault, redacted, key, signature, task = json.loads(line)
    signed = None if signature is None else np.frombuffer(bytes.fromhex(signature), dtype="<u4")
    return CheckedDocument(document_store.load_document(document), fault, redacted, bytes.fromhex(key), signed, task)


class _AtomicPath:
    """A path to write to that takes its true name when all is written; another process may be at the same piece."""

    def __init__(self, path: Path) -> None:
        self.path, self.temporary = path, path.with_name(f"{path.name}.{os.getpid()}")

    def __enter__(self) -> Path:
        return self.temporary

    def __exit__(self, kind: type[BaseException] | None, *_: object) -> None:
        if kind is None:
            self.temporary.replace(self.path)
        else:
            self.temporary.unlink(missing_ok=True)
