"""Reads files as streams of lines, paragraphs and records: text, JSON, tables and parquet, plain or compressed.

Training text, dialogues for SFT and questions with answers are all read here. The callers interpret the records.
Does not import torch.
"""

import csv
import gzip
import io
import itertools
import json
import re
import zlib
from collections.abc import Collection, Iterable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any, BinaryIO

from finback.config import UserError
from finback.extras import how_to_get

# file types that hold records, not plain text
RECORDS = (".jsonl", ".json", ".csv", ".tsv", ".parquet")
COMPRESSED = (".gz", ".zst")
_BLANK_LINES = re.compile(r"\s*\n")


@dataclass
class BytesRead:
    """Counts the bytes read from a source's files, for a progress display."""

    count: float = 0


def kind(path: Path) -> str:
    """The normalized suffix of a file: .jsonl for a.jsonl, a.JSONL, a.ndjson, a.jsonl.gz and a.jsonl.zst."""
    ending = (Path(path.stem).suffix if is_compressed(path) else path.suffix).lower()
    return ".jsonl" if ending == ".ndjson" else ending


def is_compressed(path: Path) -> bool:
    """Whether the file name has a compression suffix."""
    return path.suffix.lower() in COMPRESSED


def lines(path: Path, where: str, bytes_read: BytesRead | None = None) -> Iterator[str]:
    """Lines of a UTF-8 file without newlines. Raises UserError if the file is empty, damaged or not text."""
    bytes_read = bytes_read or BytesRead()
    before, position, blank = bytes_read.count, 0, True
    with _opened(path, where) as (handle, raw):
        while line := _next(handle, path, where):
            text = _text(line, position, path, where)
            blank = blank and not line.strip()
            position += len(line)
            bytes_read.count = before + (raw.tell() if raw is not handle else position)
            yield text.removesuffix("\n")
    if blank:
        raise UserError(where, str(path), "the file is empty", "Remove it from the list or fill it.")


def records(
    path: Path, where: str, bytes_read: BytesRead | None = None, fields: Collection[str] = ()
) -> Iterator[tuple[str, Any]]:
    """Each record of a file with its location, such as a.jsonl:12; a UserError in place of a record that cannot be read.

    `fields` names the fields that the caller reads; empty means all. Other parquet columns are not read. An object in a
    .json file that has one of these fields is one record, even if it also holds a list of objects.
    """
    count = 0
    for each in _records(path, where, bytes_read, fields):
        count += 1
        yield each
    if not count:
        raise UserError(where, str(path), "the file has no records", "Remove it from the list or fill it.")


def _records(
    path: Path, where: str, bytes_read: BytesRead | None, fields: Collection[str]
) -> Iterator[tuple[str, Any]]:
    ending = kind(path)
    assert ending in RECORDS, f"{path} holds no records"
    if ending == ".parquet":
        yield from ((f"{path}[{i}]", record) for i, record in enumerate(_parquet(path, where, bytes_read, fields)))
    elif ending == ".jsonl":
        yield from _json_lines(path, lines(path, where, bytes_read))
    elif ending == ".json":
        yield from _json_list(path, where, "\n".join(lines(path, where, bytes_read)), fields)
    else:
        yield from _table(path, lines(path, where, bytes_read), "\t" if ending == ".tsv" else ",")


def _json_lines(path: Path, given: Iterable[str]) -> Iterator[tuple[str, Any]]:
    for number, line in enumerate(given, start=1):
        if line.strip():
            try:
                yield f"{path}:{number}", json.loads(line)
            except (ValueError, RecursionError) as error:  # nested too deep, a number too long
                yield f"{path}:{number}", _no_json(line, error, "Write one JSON object per line.")


def _json_list(path: Path, where: str, text: str, fields: Collection[str]) -> Iterator[tuple[str, Any]]:
    """The objects of a JSON list, or of the only list in a JSON object. Falls back to JSON lines."""
    begin = text[:1000].lstrip()[:1]
    if begin != "[":
        try:
            whole = json.loads(text)
        except (ValueError, RecursionError):
            yield from _json_lines(path, text.split("\n"))
            return
        if not whole or not isinstance(whole, dict):
            raise UserError(where, str(path), "not a list", "Write a list of JSON objects, or use .jsonl.")
        listed = [value for value in whole.values() if _is_list(value)]
        is_record = len(listed) != 1 or any(name in fields for name in whole)
        yield from [(f"{path}:1", whole)] if is_record else ((f"{path}[{i}]", r) for i, r in enumerate(listed[0]))
        return
    decoder, place, line, counted = json.JSONDecoder(), text.index("[") + 1, 1, 0
    while (place := _skip(text, place)) < len(text) and text[place] != "]":
        line, counted = line + text.count("\n", counted, place), place
        try:
            record, place = decoder.raw_decode(text, place)
            place = _skip(text, place)
            if text[place : place + 1] not in (",", "]"):
                raise ValueError("a comma or the end of the list is missing")
        except (ValueError, RecursionError) as error:
            at = f"{path}:{1 + text.count(chr(10), 0, place)}"
            raise _no_json(text[place:], error, "Write a list of JSON objects.", at) from None
        place += text[place] == ","
        yield f"{path}:{line}", record
    if text[place : place + 1] != "]" or text[place + 1 :].strip():
        problem = "the list of records is not closed, or text follows it"
        raise UserError(where, str(path), problem, "Correct the file, or leave it out.")


def _is_list(value: Any) -> bool:
    return isinstance(value, list) and bool(value) and all(isinstance(each, dict) for each in value)


def _skip(text: str, place: int) -> int:
    """The position of the next character that is not whitespace."""
    while text[place : place + 1].isspace():
        place += 1
    return place


def _no_json(text: str, error: Exception, remedy: str, where: str = "record") -> UserError:
    return UserError(where, text[:60], f"not JSON ({getattr(error, 'msg', error)})", remedy)


def _table(path: Path, given: Iterable[str], separator: str) -> Iterator[tuple[str, Any]]:
    """Rows as dicts keyed by column name. The separator may also be a semicolon, which is detected."""
    csv.field_size_limit(1 << 30)  # chains of thought exceed csv's default limit
    numbered = (f"{line}\n" for line in given)
    head = next(numbered, "")
    separator = ";" if separator not in head and ";" in head else separator
    reader = csv.DictReader(itertools.chain([head], numbered), delimiter=separator, strict=True)
    try:
        names = reader.fieldnames or ()
        if len({*names}) < len(names):
            raise UserError(f"{path}:1", head[:60], "two columns have the same name", "Rename one of them.")
        for row in reader:
            at = f"{path}:{reader.line_num}"
            if None in row or None in row.values():
                problem = f"not one value for each of the {len(names)} columns"
                yield at, UserError("record", str(row)[:60], problem, "Correct the line.")
            else:
                yield at, row
    except csv.Error as error:
        raise UserError(f"{path}:{reader.line_num}", str(path), f"not a table ({error})", "Correct the line.") from None


def paragraphs(given: Iterable[str]) -> Iterator[str]:
    """Blocks of text between blank lines."""
    part: list[str] = []
    for line in given:
        line = line.removesuffix("\r")  # files from Windows end lines with \r\n
        if line:
            part.append(line)
        elif part:
            yield trim("\n".join(part))
            part = []
    yield trim("\n".join(part))


def trim(text: str) -> str:
    """Strips blank lines and spaces around a text; the indentation of the first of several lines stays."""
    text = text.rstrip()
    if "\n" not in text:
        return text.strip()
    blank = _BLANK_LINES.match(text)
    return trim(text[blank.end() :]) if blank else text


def _parquet(path: Path, where: str, bytes_read: BytesRead | None, fields: Collection[str]) -> Iterator[dict[str, Any]]:
    """Rows of a parquet file, 1000 in memory at a time. Without `fields`, columns that are None are left out of a row."""
    bytes_read = bytes_read or BytesRead()
    before, size, done = bytes_read.count, path.stat().st_size, 0
    arrow = _pyarrow(path, where)
    try:
        table = arrow.parquet.ParquetFile(arrow.BufferReader(content(path, where)) if is_compressed(path) else path)
        columns = [name for name in table.schema_arrow.names if name in fields]
        for batch in table.iter_batches(1000, columns=columns or None):
            for row in batch.to_pylist():  # a field that a row lacks is None
                yield {name: _whole(value) for name, value in row.items() if not fields or value is not None}
            done += batch.num_rows
            bytes_read.count = before + size * done / table.metadata.num_rows
    except (arrow.ArrowException, OSError) as error:
        raise damaged(path, where, error, "not parquet: ") from None


def _whole(value: Any) -> Any:
    """Converts a float that is whole to int: pandas stores int columns with missing values as floats."""
    return int(value) if isinstance(value, float) and value.is_integer() and abs(value) < 1e15 else value


def _pyarrow(path: Path, where: str) -> Any:
    try:
        import pyarrow
        import pyarrow.parquet
    except ImportError:
        problem = "the package `pyarrow` is not installed"
        raise UserError(where, str(path), problem, how_to_get("data")) from None
    return pyarrow


@contextmanager
def _opened(path: Path, where: str) -> Iterator[tuple[BinaryIO, BinaryIO]]:
    """A reader of a file's decompressed bytes, and the underlying file on disk."""
    with _open(path, where) as raw:
        if path.suffix.lower() == ".gz":
            with gzip.open(raw) as handle:
                yield handle, raw  # type: ignore[misc]
        elif path.suffix.lower() == ".zst":
            with _pyarrow(path, where).CompressedInputStream(raw, "zstd") as stream:
                yield io.BufferedReader(stream, 1 << 20), raw  # type: ignore[misc]
        else:
            yield raw, raw


def _open(path: Path, where: str) -> BinaryIO:
    try:
        return path.open("rb")
    except OSError as error:
        raise UserError(where, str(path), str(error.strerror), "Make the file readable, or leave it out.") from None


def _next(handle: BinaryIO, path: Path, where: str) -> bytes:
    try:
        return handle.readline()
    except (EOFError, zlib.error, OSError) as error:
        raise _not_whole(path, where, error) from None


def content(path: Path, where: str) -> bytes:
    """A file's bytes, decompressed."""
    try:
        with _opened(path, where) as (handle, _):
            return handle.read()
    except (EOFError, zlib.error, OSError) as error:
        raise _not_whole(path, where, error) from None


def _not_whole(path: Path, where: str, error: Exception) -> UserError:
    packed = {".gz": "not a complete gzip file: ", ".zst": "not a complete zstd file: "}
    return damaged(path, where, error, packed.get(path.suffix.lower(), ""))


def damaged(path: Path, where: str, error: Exception, what: str = "") -> UserError:
    """The error for a file whose content does not match its type."""
    reason = (str(error).splitlines() or [type(error).__name__])[0][:200]
    return UserError(where, str(path), f"damaged ({what}{reason})", "Download it again or leave it out.")


def _text(line: bytes, position: int, path: Path, where: str) -> str:
    try:
        text = line.decode("utf-8")
    except UnicodeDecodeError as error:
        problem = f"not UTF-8 text (byte {position + error.start})"
        raise UserError(where, str(path), problem, "Convert it to UTF-8 or leave it out.") from None
    if "\0" in text:
        raise UserError(where, str(path), "holds NUL bytes, so it looks binary", "Give text or JSONL files.")
    return text if position else text.removeprefix("\ufeff")
