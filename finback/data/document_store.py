"""Stores documents on disk between passes, so that no stage holds a corpus in memory."""

import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any, TextIO

from finback.data.sources import Document
from finback.data.tools import ToolCall
from finback.data.turn import Message

SEGMENT = 20_000  # documents per file; one worker encodes a file


class DocumentWriter:
    """JSON-lines files of `segment` documents each, written and read in order."""

    def __init__(self, folder: Path, name: str, segment: int = SEGMENT) -> None:
        self.folder, self.name, self.segment = folder, name, segment
        self.documents = 0
        self._handle: TextIO | None = None

    def add(self, document: Document) -> None:
        """Appends a document."""
        if self.documents % self.segment == 0:
            self.close()
            self._handle = self._path(self.documents // self.segment).open("w", encoding="ascii")
        assert self._handle is not None, "the writer is closed"
        self._handle.write(dump_document(document) + "\n")
        self.documents += 1

    def close(self) -> None:
        """Completes the current file."""
        if self._handle is not None:
            self._handle.close()

    def __enter__(self) -> "DocumentWriter":
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def paths(self, documents: int) -> list[Path]:
        """The files that contain the first `documents` documents."""
        return [self._path(i) for i in range(-(-documents // self.segment))]

    def _path(self, number: int) -> Path:
        return self.folder / f"{self.name}.{number:05}.jsonl"


def read_documents(path: Path) -> Iterator[Document]:
    """The documents of one file."""
    with path.open(encoding="ascii") as handle:
        yield from map(load_document, handle)


def dump_document(document: Document) -> str:
    """A document as one line; lone surrogates are preserved as JSON escapes."""
    return json.dumps([document.text, *map(_dump_message, document.messages)])


def load_document(line: str) -> Document:
    """The document of a line."""
    text, *messages = json.loads(line)
    return Document(tuple(map(_load_message, messages)), text)


def _dump_message(message: Message) -> list[Any]:
    """The common fields of a message, followed by those of tool messages."""
    plain = [message.role, message.content, message.reasoning]
    calls = [[call.name, call.arguments, call.id] for call in message.tool_calls]
    rest = [calls, message.tool_call_id, message.name, message.prefix]
    return [*plain, *rest, message.learnt] if any(rest) or not message.learnt else plain


def _load_message(fields: list[Any]) -> Message:
    if len(fields) == 3:
        return Message(*fields)
    role, content, reasoning, calls, *rest = fields
    return Message(role, content, reasoning, tuple(ToolCall(*call) for call in calls), *rest)
