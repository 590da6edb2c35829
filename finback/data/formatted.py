"""Converts formatted files (HTML, PDF, Word) to plain text; refuses other non-text files by name."""

import io
import logging
import re
import unicodedata
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from finback import readers
from finback.config import UserError
from finback.data import html_text
from finback.extras import how_to_get
from finback.readers import BytesRead

PAGES = (".html", ".htm", ".xhtml")
FORMATTED = (*PAGES, ".pdf", ".docx")
# read as text, these would be markup or bytes
_REFUSED = frozenset(
    """
    doc docm dot dotx rtf odt ods odp epub mobi azw3 djvu ps pages xls xlsx xlsm ppt pptx xml xsl xslt svg rss atom mht mhtml
    eml mbox msg ipynb geojson jsonld har zip tar tgz tbz bz2 xz lzma 7z rar lz4 br z arrow feather orc avro db sqlite sqlite3
    pkl pickle npy npz h5 hdf5 pt pth ckpt bin safetensors gguf onnx mat rds rdata sav dta msgpack pb tfrecord warc png jpg jpeg
    gif webp bmp tif tiff ico heic psd mp3 wav flac ogg opus m4a mp4 mkv avi mov webm exe dll so o a dylib class pyc jar whl wasm
    deb rpm dmg iso ttf otf woff woff2
    """.split()  # noqa: SIM905 - as a list of 90 texts it fills a page
)
_REMEDY = "Convert it to text, JSONL, HTML, PDF or docx, or leave it out."
# beginnings of files that are not plain text, and what they are
_SIGNS = (
    (re.compile(r"%PDF-"), "a PDF", "Name it .pdf."),
    (re.compile(r"\{\\rtf"), "rich text", _REMEDY),
    (
        re.compile(r"(?:<!--.*?-->\s*)*<(?:!doctype html|html\b|head\b|body\b)", re.I | re.S),
        "an HTML page",
        "Name it .html.",
    ),
    (re.compile(r"<\?xml|<svg\b|<!doctype (?!html)", re.I), "XML", _REMEDY),
    (
        re.compile(r"(?:\[\s*)?\{\s*\"(?:text|messages|conversations|question|prompt|instruction)\"\s*:"),
        "JSON",
        "Name it .jsonl or .json.",
    ),
    (
        re.compile(r"<(?:div|p|table|span|h[1-6]|article|section|meta|script|style)\b[^<>]*>.*</", re.I | re.S),
        "HTML",
        "Name it .html.",
    ),
)
_MARKDOWN = (".md", ".markdown", ".mdx", ".rst", ".org")  # may start with an HTML element
_BEGIN = 4096  # characters that identify a file's type
_LIGATURES = {c: unicodedata.normalize("NFKC", chr(c)) for c in range(0xFB00, 0xFB07)}
_WORD = "{http://schemas.openxmlformats.org/wordprocessingml/2006/main}"
_WORD_SIGNS = {"tab": "\t", "br": "\n", "cr": "\n", "noBreakHyphen": "-"}
# moved or duplicated text, and settings
_WORD_SKIPPED = (
    *(_WORD + name for name in ("moveFrom", "del", "pPr", "rPr", "sectPr")),
    "{http://schemas.openxmlformats.org/markup-compatibility/2006}Fallback",
)


def check_name(path: Path, where: str) -> None:
    """Raises UserError for a file whose suffix says that it is not text."""
    ending = readers.kind(path)
    if ending.removeprefix(".") in _REFUSED:
        raise UserError(where, str(path), f"{ending} files are not read", _REMEDY)


def check_text(lines: Iterator[str], path: Path, where: str) -> Iterator[str]:
    """The lines of a plain text; UserError if it starts like another type of file."""
    first: list[str] = []
    size = 0
    for line in lines:
        first.append(line)
        size += len(line) + 1
        if size >= _BEGIN:
            break
    begin = "\n".join(first)[:_BEGIN].lstrip()
    signs = _SIGNS[:-1] if readers.kind(path) in _MARKDOWN else _SIGNS
    for sign, what, remedy in signs:
        if sign.match(begin):
            raise UserError(where, str(path), f"holds {what}, not plain text", remedy)
    yield from first
    yield from lines


def read(path: Path, where: str, bytes_read: BytesRead | None = None) -> str:
    """The text of a formatted file, as one document; UserError if it has none."""
    content = readers.content(path, where)
    if not content.strip():
        raise UserError(where, str(path), "the file is empty", "Remove it from the list or fill it.")
    match readers.kind(path):
        case ".pdf":
            text = _pdf(content, path, where)
        case ".docx":
            text = _docx(content, path, where)
        case _:
            text = _html(content, path, where)
    if not text.strip():
        remedy = "Leave it out, or run OCR first." if readers.kind(path) == ".pdf" else "Leave it out."
        raise UserError(where, str(path), "contains no text", remedy)
    if bytes_read:
        bytes_read.count += path.stat().st_size
    return text


def _html(content: bytes, path: Path, where: str) -> str:
    try:
        text = html_text.decode(content)
    except (UnicodeDecodeError, LookupError) as error:
        problem = f"unknown character encoding ({error})"
        raise UserError(where, str(path), problem, "Convert it to UTF-8, or leave it out.") from None
    if "\0" in text or text.startswith("%PDF-"):
        raise UserError(where, str(path), "contains no HTML", "Correct its suffix, or leave it out.")
    return html_text.plain(text)


def _pdf(content: bytes, path: Path, where: str) -> str:
    """The text of all pages."""
    try:
        import pypdf
    except ImportError:
        raise _missing("pypdf", path, where) from None
    logging.getLogger("pypdf").setLevel(logging.CRITICAL)  # it logs every fault that it repairs
    try:
        reader = pypdf.PdfReader(io.BytesIO(content))
        if reader.is_encrypted and not reader.decrypt(""):
            raise UserError(where, str(path), "needs a password", "Save it without one, or leave it out.")
        text = "\n".join(page.extract_text() for page in reader.pages)
    except UserError:
        raise
    except Exception as error:  # the library raises many kinds
        raise readers.damaged(path, where, error) from None
    odd = sum(unicodedata.category(c) in ("Co", "Cn") or c == "\ufffd" for c in text)
    if odd > len(text) / 10 or len(re.findall(r"/[A-Za-z]+\d+|\(cid:\d+\)", text)) > len(text) / 20:
        remedy = "Run OCR first, or leave it out."
        raise UserError(where, str(path), "has no mapping from glyphs to characters", remedy)
    return text.translate(_LIGATURES)


def _docx(content: bytes, path: Path, where: str) -> str:
    """Paragraphs and tables in order; cells of a row are separated by tabs."""
    try:
        import docx
    except ImportError:
        raise _missing("python-docx", path, where) from None
    try:
        return "\n".join(_word_lines(docx.Document(io.BytesIO(content)).element.body))
    except Exception as error:  # errors of zipfile, lxml and python-docx
        raise readers.damaged(path, where, error) from None


def _word_lines(body: Any) -> Iterator[str]:
    for child in body:
        match str(child.tag).removeprefix(_WORD):
            case "p":
                yield _word_text(child)
            case "tbl":
                for row in _parts(child, "tr"):
                    yield "\t".join(" ".join("\n".join(_word_lines(cell)).split()) for cell in _parts(row, "tc"))
            case "sdt" | "sdtContent" | "ins" | "customXml" | "smartTag":
                yield from _word_lines(child)


def _parts(element: Any, name: str) -> list[Any]:
    """The rows of a table or cells of a row, without those of nested tables."""
    kind = element.tag
    return [part for part in element.iter(_WORD + name) if next(part.iterancestors(kind)) is element]


def _word_text(element: Any) -> str:
    """The text of a paragraph, with tracked insertions and without tracked deletions."""
    if element.tag in _WORD_SKIPPED:
        return ""
    name = str(element.tag).removeprefix(_WORD)
    own = (element.text or "") if name == "t" else _WORD_SIGNS.get(name, "")
    return own + "".join(("\n" if part.tag == f"{_WORD}p" else "") + _word_text(part) for part in element)


def _missing(package: str, path: Path, where: str) -> UserError:
    problem = f"the package `{package}` is not installed"
    return UserError(where, str(path), problem, how_to_get("documents"))
