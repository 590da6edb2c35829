"""Documents on the disk between two passes, so that no stage holds a corpus in memory."""

import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any, TextIO

from finback.data.sources import Document
from finback.data.tools import ToolCall
from finback.data.turn import Message

SEGMENT = 20_000  # documents of one file, which one worker encodes


class DocumentWriter:
    """Files of JSON lines, `segment` documents each, written in order and read in order."""

    def __init__(self, folder: Path, name: str, segment: int = SEGMENT) -> None:
        self.folder, self.name, self.segment = folder, name, segment
        self.documents = 0
        self._handle: TextIO | None = None

    def add(self, document: Document) -> None:
        """Append a document."""
        if self.documents % self.segment == 0:
            self.close()
            self._handle = self._path(self.documents // self.segment).open("w", encoding="ascii")
        assert self._handle is not None, "it is closed"
        self._handle.write(dump_document(document) + "\n")
        self.documents += 1

    def close(self) -> None:
        """Finish the file at hand."""
        if self._handle is not None:
            self._handle.close()

    def __enter__(self) -> "DocumentWriter":
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def paths(self, documents: int) -> list[Path]:
        """The files that so many documents fill."""
        return [self._path(i) for i in range(-(-documents // self.segment))]

    def _path(self, number: int) -> Path:
        return self.folder / f"{self.name}.{number:05}.jsonl"


def read_documents(path: Path) -> Iterator[Document]:
    """Documents of one file."""
    with path.open(encoding="ascii") as handle:
        yield from map(load_document, handle)


def dump_document(document: Document) -> str:
    """One line that holds a document; lone surrogates survive as JSON's escapes."""
    return json.dumps([document.text, *map(_dump_message, document.messages)])


def load_document(line: str) -> Document:
    """The document of a line."""
    text, *messages = json.loads(line)
    return Document(tuple(map(_load_message, messages)), text)


def _dump_message(message: Message) -> list[Any]:
    """What most messages have, then what those of tools have besides."""
    plain = [message.role, message.content, message.reasoning]
    calls = [[call.name, call.arguments, call.id] for call in message.tool_calls]
    rest = [calls, message.tool_call_id, message.name, message.prefix]
    return [*plain, *rest, message.learnt] if any(rest) or not message.learnt else plain


def _load_message(fields: list[Any]) -> Message:
    if len(fields) == 3:
        return Message(*fields)
    role, content, reasoning, calls, *rest = fields
    return Message(role, content, reasoning, tuple(ToolCall(*call) for call in calls), *rest)
