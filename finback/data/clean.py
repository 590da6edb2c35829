"""Cleaning: what is taken out of raw documents, and how much of it, counted for the record."""

import hashlib
import re
import unicodedata
from collections.abc import Iterable, Iterator
from dataclasses import dataclass, replace

from finback.data.chat import Message
from finback.data.sources import Document

_EMAIL = re.compile(r"(?<![\w.+-])[\w.+-]+@[\w-]+\.\w[\w.]*")
_PHONE = re.compile(r"(?<!\d)(?:\+?\d{1,2}[ .-])?\(?\d{3}\)?[ .-]\d{3}[ .-]\d{4}(?!\d)")


@dataclass
class Counts:
    """How many documents came in, and why the missing ones were dropped."""

    read: int = 0
    empty: int = 0
    one_turn: int = 0  # dialogues nobody answered
    duplicate: int = 0
    redacted: int = 0
    kept: int = 0


def clean(documents: Iterable[Document], counts: Counts) -> Iterator[Document]:
    """Normalise, redact addresses, drop empty documents and exact repeats (case and spacing ignored)."""
    seen: set[bytes] = set()
    for raw in documents:
        counts.read += 1
        document = _normalise(raw, counts)
        key = " ".join(document.plain.casefold().split())
        if not key:
            counts.one_turn += len(raw.messages) == 1
            counts.empty += len(raw.messages) != 1
            continue
        digest = hashlib.blake2b(key.encode("utf-8", "surrogatepass"), digest_size=16).digest()
        if digest in seen:
            counts.duplicate += 1
            continue
        seen.add(digest)
        counts.kept += 1
        yield document


def _normalise(document: Document, counts: Counts) -> Document:
    messages: list[Message] = []
    for m in document.messages:
        text = _text(m.content, counts, one_line=True)
        if not text:
            break  # what follows would answer nothing
        messages.append(replace(m, content=text))
    if document.messages and len(messages) < 2:
        return Document()  # a dialogue needs someone to answer
    return Document(tuple(messages), _text(document.text, counts, one_line=False))


def _plain(c: str) -> str:
    if c in "\n\t" or unicodedata.category(c) not in ("Cc", "Cs"):
        return c
    return " " if c.isspace() else ""  # a form feed separates words


def _text(text: str, counts: Counts, one_line: bool) -> str:
    text = "".join(_plain(c) for c in text.replace("\r\n", "\n"))
    text = unicodedata.normalize("NFC", text)
    clean, n = _EMAIL.subn("[email]", text)
    clean, m = _PHONE.subn("[phone]", clean)
    counts.redacted += n + m
    return " ".join(clean.split()) if one_line else clean.strip()
