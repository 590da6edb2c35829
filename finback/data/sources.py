"""Sources of training text: each has a licence and yields documents in a fixed order."""

import hashlib
import importlib.util
import json
from abc import ABC, abstractmethod
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, ClassVar, Literal

from finback import readers
from finback.config import UserError, check_characters, check_fields
from finback.data import file_globs, formatted
from finback.data.dialogues import FIELDS, read_dialogue
from finback.data.messages import parse_response
from finback.data.turn import Message
from finback.extras import how_to_install
from finback.hub import HubRows
from finback.readers import BytesRead

# fields that make a record or message more than consecutive texts
_BESIDE = ("system", "system_prompt", "reasoning", "thinking", "choices", "options", "tools", "functions", "history")
_IN_MESSAGE = ("reasoning", "thinking", "tool_calls", "function_call")


@dataclass(frozen=True)
class Document:
    """A dialogue, or plain text if `messages` is empty."""

    messages: tuple[Message, ...] = ()
    text: str = ""

    @property
    def plain(self) -> str:
        """All words of the document, for counting bytes, deduplicating and training the tokenizer."""
        if not self.messages:
            return self.text
        return "\n".join(f"{m.reasoning}\n{m.content}" if m.reasoning else m.content for m in self.messages)


class Source(ABC):
    """A source of real text, as the prepare stage needs it."""

    name: str
    licence: str
    # whether line breaks and indentation are meaningful
    has_layout: ClassVar[bool] = True

    @abstractmethod
    def files(self) -> list[Path]:
        """The files it is read from, in order; [] for a source that only a library can read."""

    def skipped(self) -> dict[str, str]:
        """Further paths to its files and broken links, with the reason for skipping each."""
        return {}

    @abstractmethod
    def read(self, path: Path, bytes_read: BytesRead | None = None) -> Iterator[Document]:
        """The documents of one of its files; the source is the concatenation of its files."""

    def documents(self) -> Iterator[Document]:
        """All documents, always in the same order."""
        for path in self.files():
            yield from self.read(path)


@dataclass(frozen=True)
class Chitchat(Source):
    """The BYU Chit Chat corpus: 7,168 typed English dialogues, shipped by the chitchat-dataset package (MIT)."""

    # name of the source in `mixture` and in tables
    name: str = "chitchat"
    # SPDX identifier, for the documents of a published model
    licence: str = "MIT"
    has_layout: ClassVar[bool] = False

    def files(self) -> list[Path]:
        spec = importlib.util.find_spec("chitchat_dataset")
        if spec is None or spec.origin is None:
            raise UserError("source", self.name, "the package is not installed", how_to_install("chitchat-dataset"))
        return [Path(spec.origin).parent / "dataset.json"]

    def read(self, path: Path, bytes_read: BytesRead | None = None) -> Iterator[Document]:
        for dialogue in json.loads(path.read_text(encoding="utf-8")).values():
            turns = [" ".join(line["text"] for line in turn) for turn in dialogue["messages"]]
            roles = ("user", "assistant")
            yield Document(tuple(Message(roles[i % 2], text) for i, text in enumerate(turns)))


@dataclass(frozen=True)
class Files(Source):
    """A user's own text: .jsonl, .parquet, or anything else as plain text; optionally with .gz or .zst.

    A record has "text", or "messages" (role, content, reasoning_content), or "question" and "answer". Plain text is
    split into documents at blank lines, or kept whole.
    """

    # files, or patterns such as notes/*.md
    paths: tuple[str, ...] = field(default_factory=tuple)
    # unit that becomes a document in a plain-text file
    split: Literal["paragraphs", "files"] = "paragraphs"
    # name of the source in `mixture` and in tables
    name: str = "files"
    # SPDX identifier, for the documents of a published model
    licence: str = "unstated"

    def __post_init__(self) -> None:
        check_fields(self, self.name)
        if not self.paths:
            raise UserError(f"{self.name}.paths", self.paths, "no files given", "Give files or globs.")

    def files(self) -> list[Path]:
        return file_globs.find(self.paths, f"{self.name}.paths")[0]

    def skipped(self) -> dict[str, str]:
        return file_globs.find(self.paths, f"{self.name}.paths")[1]

    def content_files(self) -> dict[str, list[Path]]:
        """The user's files, by the field that names them."""
        return {"paths": self.files()}

    def read(self, path: Path, bytes_read: BytesRead | None = None) -> Iterator[Document]:
        where, ending = f"{self.name}.paths", readers.kind(path)
        formatted.check_name(path, where)
        if ending in readers.RECORDS:
            for at, record in readers.records(path, where, bytes_read, FIELDS):
                if isinstance(record, UserError):
                    raise UserError(at, record.value, record.problem, record.remedy)
                document = _from_record(record, at)
                try:
                    document.plain.encode()
                except UnicodeEncodeError:  # a lone surrogate: find the field
                    check_characters(record, json.dumps(record), at)
                yield document
        elif ending in formatted.FORMATTED:
            yield Document(text=formatted.read(path, where, bytes_read))
        else:
            lines = formatted.check_text(readers.lines(path, where, bytes_read), path, where)
            whole = self.split == "files"
            texts = (
                [readers.trim("\n".join(line.removesuffix("\r") for line in lines))]
                if whole
                else readers.paragraphs(lines)
            )
            yield from (Document(text=text) for text in texts if text)


@dataclass(frozen=True)
class Hub(Source):
    """A data set of the Hugging Face hub, or a folder that `datasets` reads; records as in the JSONL of Files."""

    # owner/name, or owner/name@revision
    path: str
    # split of the data set
    split: str = "train"
    # configuration of the data set, such as main; None: the only one
    subset: str | None = None
    # name of the source in `mixture` and in tables
    name: str = "hub"
    # SPDX identifier, for the documents of a published model
    licence: str = "unstated"

    def __post_init__(self) -> None:
        check_fields(self, self.name)

    def files(self) -> list[Path]:
        return []  # files are in the hub's cache

    def read(self, path: Path, bytes_read: BytesRead | None = None) -> Iterator[Document]:
        return iter(())

    def documents(self) -> Iterator[Document]:
        for number, row in enumerate(self.rows()):
            yield _from_record(dict(row), f"{self.path}[{number}]")

    def rows(self) -> Any:
        """The records, in order."""
        return self.hub.load(f"{self.name}.path")

    def content_versions(self) -> dict[str, str]:
        """The data set's version, by the field that names the data set."""
        return {"path": self.hub.version()}

    @property
    def hub(self) -> HubRows:
        """The rows, through the package `datasets`."""
        return HubRows(self.path, self.subset or "", self.split)


def digest(files: list[Path]) -> str:
    """SHA-256 over the contents of files in order."""
    total = hashlib.sha256()
    for path in files:
        with path.open("rb") as handle:
            while block := handle.read(1 << 20):
                total.update(block)
    return total.hexdigest()


def _from_record(record: Any, where: str) -> Document:
    shown = json.dumps(record, ensure_ascii=False, default=str)[:60]
    if isinstance(record, dict):
        has_more = any(record.get(name) for name in _BESIDE)
        messages = record.get("messages")  # the richest form first: many data sets also have it as text
        if isinstance(messages, list) and messages and all(_is_message(m) for m in messages) and not has_more:
            return Document(tuple(_message(m) for m in messages))
        if isinstance(record.get("question"), str) and isinstance(record.get("answer"), str) and not has_more:
            answer = record | {"role": "assistant", "content": record["answer"]}
            return Document((Message("user", record["question"]), _message(answer)))
        if isinstance(record.get("text"), str) and not isinstance(messages, list):
            return Document(text=record["text"])
        try:
            found = read_dialogue(record)
        except UserError as error:
            if has_more:
                raise UserError(where, shown, f"{error.field}: {error.problem}", error.remedy) from None
        else:
            if found.tools:
                problem = "its tools are in a separate field"
                raise UserError(where, shown, problem, "Write them into the system message, or leave them out.")
            return Document(found.messages)
        if isinstance(record.get("text"), str):
            return Document(text=record["text"])
    remedy = 'Give "text", "question" and "answer", or "messages".'
    raise UserError(where, shown, "no usable field", remedy)


def _is_message(value: Any) -> bool:
    return (
        isinstance(value, dict)
        and value.get("role") in ("system", "user", "assistant")
        and isinstance(value.get("content"), str)
        and not any(value.get(name) for name in _IN_MESSAGE)
    )


def _message(value: dict[str, Any]) -> Message:
    """A message in OpenAI's format; reasoning has its own field, as in DeepSeek's API."""
    if value["role"] != "assistant":
        return Message(value["role"], value["content"])
    reasoning = value.get("reasoning_content")
    if isinstance(reasoning, str) and reasoning:
        return Message("assistant", value["content"], reasoning)
    response = parse_response(value["content"])  # some data sets have it in the answer
    if response.thinks and response.closed:
        return Message("assistant", response.answer, response.reasoning)
    return Message("assistant", value["content"])
