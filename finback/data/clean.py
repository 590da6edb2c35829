"""Cleans raw documents, and counts what was removed for provenance."""

import hashlib
import re
import unicodedata
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass, field, replace
from typing import Any

import numpy as np

from finback.config import check_fields, check_share
from finback.data import privacy
from finback.data.blocks import blocks, squeeze
from finback.data.decontamination import Decontaminator
from finback.data.near_duplicates import MinHashSigner, SignatureIndex
from finback.data.sources import Document
from finback.data.turn import Message
from finback.readers import trim

# categories Cc (except newline and tab) and Cs; those that are spaces (a form feed) separate words
_CONTROL = re.compile("[\x00-\x08\x0b-\x1f\x7f-\x9f\ud800-\udfff]")


@dataclass
class CleaningCounts:
    """Numbers of documents read, dropped (by the first reason that applies) and kept, and of redactions."""

    read: int = 0
    empty: int = 0
    # dialogues without an answer
    one_turn: int = 0
    short: int = 0
    repetitive: int = 0
    few_letters: int = 0
    contaminated: int = 0
    duplicate: int = 0
    near_duplicate: int = 0
    redacted: int = 0
    kept: int = 0


@dataclass(frozen=True)
class Quality:
    """Rules for web text, after Gopher's (Rae et al. 2021, A.1.1); each can be turned off with the value given."""

    # minimum number of words; 0: off
    min_words: int = 5
    # largest share of lines that repeat an earlier one; 1: off
    max_repeated_lines: float = 0.3
    # minimum share of letters among the non-space characters; 0: off
    min_letters: float = 0.6

    def __post_init__(self) -> None:
        check_fields(self, "quality")
        check_share(self, "quality", "max_repeated_lines", "min_letters")

    def fault(self, text: str) -> str:
        """Why a text is dropped, as the name of a count; "" if it is kept."""
        if sum(len(block.split()) for block in blocks(text)) < self.min_words:
            return "short"
        lines = [line.strip() for line in text.split("\n") if line.strip()]
        if len(lines) - len(set(lines)) > self.max_repeated_lines * len(lines):
            return "repetitive"
        letters = signs = 0
        for block in blocks(text):
            shown = "".join(block.split())
            letters, signs = letters + sum(map(str.isalpha, shown)), signs + len(shown)
        return "few_letters" if letters < self.min_letters * signs else ""


@dataclass(frozen=True)
class CleaningRules:
    """Checks of a document besides emptiness and exact repetition; None: no check."""

    quality: Quality | None = None
    decontaminator: Decontaminator | None = None
    signer: MinHashSigner | None = None
    # join every message into one line, for sources whose line breaks are meaningless
    one_line: bool = False


@dataclass(frozen=True)
class CheckedDocument:
    """A normalized document, and the results of checks that need no other document."""

    document: Document
    # why it is dropped, "" if it is not
    fault: str
    redacted: int
    # equal for exact repeats
    key: bytes = b""
    signature: np.ndarray | None = field(default=None, compare=False)
    # the task whose question it contains
    task: str = ""


def check(raw: Document, rules: CleaningRules) -> CheckedDocument:
    """Normalizes a document, redacts private data, and applies the rules that need no other document."""
    counts = CleaningCounts()
    document = _normalise(raw, counts, rules.one_line)
    plain = document.plain
    key = squeeze(plain.casefold())
    fault, task = "", None
    if not key:
        fault = "one_turn" if len(raw.messages) == 1 else "empty"
    elif rules.quality and (fault := rules.quality.fault(plain)):
        pass
    elif rules.decontaminator and (task := rules.decontaminator.find(document)):
        fault = "contaminated"
    if fault:
        return CheckedDocument(document, fault, counts.redacted, task=task or "")
    digest = hashlib.blake2b(key.encode("utf-8", "surrogatepass"), digest_size=16).digest()
    return CheckedDocument(document, "", counts.redacted, digest, rules.signer.sign(plain) if rules.signer else None)


class DocumentFilter:
    """Finds exact and near repeats, which need all documents, and counts every outcome."""

    def __init__(self, source: str, index: SignatureIndex | None = None) -> None:
        self.source, self.index = source, index
        self.counts = CleaningCounts()
        self.seen: set[bytes] = set()

    def sift(
        self, given: Iterable[CheckedDocument], note: Callable[[dict[str, Any]], None] | None = None
    ) -> Iterator[tuple[int, CheckedDocument]]:
        """Kept documents with their index in the source.

        `note` receives a record of each document dropped for its similarity to another one or to a question.
        """
        for number, checked in enumerate(given):
            fault, like = self._fault(checked)
            self.counts.read += 1
            self.counts.redacted += checked.redacted
            setattr(self.counts, fault or "kept", getattr(self.counts, fault or "kept") + 1)
            if not fault:
                if self.index is not None and checked.signature is not None:
                    self.index.add(f"{self.source}:{number}", checked.signature)
                yield number, checked
            elif note and like:
                note({"id": f"{self.source}:{number}", "reason": fault, "like": like})

    def _fault(self, checked: CheckedDocument) -> tuple[str, str]:
        """Why it is dropped, and what it is similar to."""
        if checked.fault:
            return checked.fault, checked.task
        if checked.key in self.seen:
            return "duplicate", ""
        self.seen.add(checked.key)
        if self.index is None or checked.signature is None:
            return "", ""
        like = self.index.closest(checked.signature)
        return ("near_duplicate", like) if like else ("", "")


def _normalise(document: Document, counts: CleaningCounts, one_line: bool) -> Document:
    def text(given: str) -> str:
        return _text(given, counts, one_line)

    messages: list[Message] = []
    for m in document.messages:
        content, calls = text(m.content), tuple(replace(c, arguments=text(c.arguments)) for c in m.tool_calls)
        if not content and not calls:
            break  # later messages would answer nothing
        name = m.name and text(m.name)
        messages.append(replace(m, content=content, reasoning=text(m.reasoning), tool_calls=calls, name=name))
    if document.messages and len(messages) < 2:
        return Document()  # a dialogue needs an answer
    return Document(tuple(messages), _text(document.text, counts, one_line=False))


def _text(text: str, counts: CleaningCounts, one_line: bool) -> str:
    """A text in NFC without control characters and private data; lines and their indentation are kept."""
    if not text:
        return ""
    if "\r" in text:
        text = text.replace("\r\n", "\n").replace("\r", "\n")
    text = _CONTROL.sub(lambda c: " " if c[0].isspace() else "", text)
    clean, found = privacy.redact(unicodedata.normalize("NFC", text))
    counts.redacted += found
    return squeeze(clean) if one_line else trim(clean)
