"""Where training text comes from: each source names its licence and yields documents in a fixed order."""

import glob
import hashlib
import importlib.util
import json
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from finback.config import UserError, check_fields
from finback.data.chat import Message, parse


@dataclass(frozen=True)
class Document:
    """A dialogue, or plain text when `messages` is empty."""

    messages: tuple[Message, ...] = ()
    text: str = ""

    @property
    def plain(self) -> str:
        """All words of the document, for counting bytes, deduplicating and training the tokenizer."""
        if not self.messages:
            return self.text
        return "\n".join(f"{m.thinking}\n{m.content}" if m.thinking else m.content for m in self.messages)


@dataclass(frozen=True)
class Chitchat:
    """The BYU Chit Chat corpus: 7,168 typed English dialogues, shipped by the chitchat-dataset package (MIT)."""

    name: str = "chitchat"
    licence: str = "MIT"

    def files(self) -> list[Path]:
        spec = importlib.util.find_spec("chitchat_dataset")
        if spec is None or spec.origin is None:
            raise UserError(
                "source", self.name, "the package is not installed", "pip install chitchat-dataset"
            )
        return [Path(spec.origin).parent / "dataset.json"]

    def documents(self) -> Iterator[Document]:
        for dialogue in json.loads(self.files()[0].read_text(encoding="utf-8")).values():
            turns = [" ".join(line["text"] for line in turn) for turn in dialogue["messages"]]
            roles = ("user", "assistant")
            yield Document(tuple(Message(roles[i % 2], text) for i, text in enumerate(turns)))  # type: ignore[arg-type]


@dataclass(frozen=True)
class Files:
    """A user's own text: .txt or any text file (one document each, split at blank lines), or .jsonl.

    A JSONL line has "text", or "messages" (role, content, reasoning_content), or "question" and "answer".
    """

    paths: tuple[str, ...] = field(default_factory=tuple)
    name: str = "files"
    licence: str = "unstated"

    def __post_init__(self) -> None:
        check_fields(self, self.name)
        if not self.paths:
            raise UserError(f"{self.name}.paths", self.paths, "no files named", "Name files or globs.")

    def files(self) -> list[Path]:
        found: list[Path] = []
        for pattern in self.paths:
            here = Path(pattern).is_file()  # a name may look like a glob
            names = [pattern] if here else glob.glob(pattern, recursive=True)  # noqa: PTH207 - never raises
            matches = sorted(path for path in map(Path, names) if path.is_file())
            if not matches:
                raise UserError(f"{self.name}.paths", pattern, "no such file", "Correct the path or glob.")
            found += matches
        return found

    def documents(self) -> Iterator[Document]:
        for path in self.files():
            text = _read_text(path, f"{self.name}.paths")
            if path.suffix == ".jsonl":
                for number, line in enumerate(text.split("\n"), start=1):
                    if line.strip():
                        yield _from_json(line, f"{path}:{number}")
            else:
                yield from (
                    Document(text=part.strip())
                    for part in text.replace("\r\n", "\n").split("\n\n")
                    if part.strip()
                )


@dataclass(frozen=True)
class Hub:
    """A data set of the Hugging Face hub, or of a folder that `datasets` reads; records as in Files' JSONL."""

    path: str  # owner/name
    split: str = "train"
    subset: str | None = None
    name: str = "hub"
    licence: str = "unstated"

    def __post_init__(self) -> None:
        check_fields(self, self.name)

    def files(self) -> list[Path]:
        return []  # the hub's own cache, known by fingerprint only

    def documents(self) -> Iterator[Document]:
        for number, row in enumerate(self._load()):
            yield _from_record(dict(row), f"{self.path}[{number}]", str(row))

    def _load(self) -> Any:
        try:
            import datasets
        except ImportError:
            raise UserError(
                f"{self.name}.path", self.path, "the package `datasets` is not installed", "pip install 'finback[hub]'"
            ) from None  # fmt: skip
        try:
            return datasets.load_dataset(self.path, self.subset, split=self.split)
        except Exception as error:  # the library and the network raise many kinds
            raise UserError(
                f"{self.name}.path", self.path, f"cannot be loaded ({str(error).splitlines()[0][:200]})",
                "Check the name, the split and the network; a gated set wants `hf auth login`.",
            ) from None  # fmt: skip


def digest(files: list[Path]) -> str:
    """SHA-256 over the contents of files in order."""
    total = hashlib.sha256()
    for path in files:
        with path.open("rb") as handle:
            while block := handle.read(1 << 20):
                total.update(block)
    return total.hexdigest()


def _read_text(path: Path, where: str) -> str:
    raw = path.read_bytes()
    if not raw.strip():
        raise UserError(where, str(path), "the file is empty", "Remove it from the list or fill it.")
    try:
        text = raw.decode("utf-8-sig")
    except UnicodeDecodeError as error:
        raise UserError(
            where, str(path), f"not UTF-8 text (byte {error.start})", "Convert it to UTF-8 or leave it out."
        ) from None
    if "\0" in text:
        raise UserError(where, str(path), "holds NUL bytes, so it looks binary", "Give text or JSONL files.")
    return text


def _from_json(line: str, where: str) -> Document:
    try:
        record: Any = json.loads(line)
    except (ValueError, RecursionError) as error:  # also too deep, or a number of too many digits
        problem = f"not JSON ({getattr(error, 'msg', error)})"
        raise UserError(where, line[:60], problem, "Write one JSON object per line.") from None
    return _from_record(record, where, line)


def _from_record(record: Any, where: str, shown: str) -> Document:
    if isinstance(record, dict):
        messages = record.get("messages")  # the richest form first: many sets carry the same as text too
        if isinstance(messages, list) and messages and all(_is_message(m) for m in messages):
            return Document(tuple(_message(m) for m in messages))
        if isinstance(record.get("question"), str) and isinstance(record.get("answer"), str):
            answer = record | {"role": "assistant", "content": record["answer"]}
            return Document((Message("user", record["question"]), _message(answer)))
        if isinstance(record.get("text"), str):
            return Document(text=record["text"])
    raise UserError(
        where,
        shown[:60],
        "no field that can be learnt from",
        'Give "text", "question" and "answer", or "messages".',
    )


def _is_message(value: Any) -> bool:
    return (
        isinstance(value, dict)
        and value.get("role") in ("system", "user", "assistant")
        and isinstance(value.get("content"), str)
    )


def _message(value: dict[str, Any]) -> Message:
    """A message in OpenAI's form; a chain stands beside the answer, as DeepSeek's API gives it."""
    if value["role"] != "assistant":
        return Message(value["role"], value["content"])
    chain = value.get("reasoning_content")
    if isinstance(chain, str) and chain:
        return Message("assistant", value["content"], chain)
    said = parse(value["content"].lstrip())  # others write it into the answer
    if said.thinks and said.closed:
        return Message("assistant", said.answer, said.thinking)
    return Message("assistant", value["content"])
