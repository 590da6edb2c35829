"""Files to lines, paragraphs and records, one at a time: text, JSON lines and parquet, plain or compressed."""

import gzip
import io
import zlib
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any, BinaryIO

from finback.config import UserError

COMPRESSED = (".gz", ".zst")
FIELDS = ("messages", "question", "answer", "reasoning_content", "text")  # what a record is read for


@dataclass
class BytesRead:
    """How many bytes of a source's files have been read, for showing progress."""

    count: float = 0


def kind(path: Path) -> str:
    """The ending that says what a file holds: .jsonl for all of a.jsonl, a.jsonl.gz and a.jsonl.zst."""
    return Path(path.stem).suffix if path.suffix in COMPRESSED else path.suffix


def lines(path: Path, where: str, bytes_read: BytesRead | None = None) -> Iterator[str]:
    """Lines of a UTF-8 file without their newlines; UserError for what is empty, not text or damaged."""
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


def paragraphs(given: Iterable[str]) -> Iterator[str]:
    """Texts between blank lines."""
    part: list[str] = []
    for line in given:
        line = line.removesuffix("\r")  # of a file from Windows
        if line:
            part.append(line)
        elif part:
            yield "\n".join(part).strip()
            part = []
    yield "\n".join(part).strip()


def parquet(path: Path, where: str, bytes_read: BytesRead | None = None) -> Iterator[dict[str, Any]]:
    """Rows of a parquet file as records, a thousand in memory; columns that nothing is learnt from are not read."""
    bytes_read = bytes_read or BytesRead()
    before, size, done = bytes_read.count, path.stat().st_size, 0
    arrow = _pyarrow(path, where)
    try:
        table = arrow.parquet.ParquetFile(path)
        columns = [name for name in table.schema_arrow.names if name in FIELDS]
        for batch in table.iter_batches(1000, columns=columns or None):
            for row in batch.to_pylist():  # what a row has not, its columns hold as None
                yield {name: value for name, value in row.items() if value is not None}
            done += batch.num_rows
            bytes_read.count = before + size * done / table.metadata.num_rows
    except (arrow.ArrowInvalid, OSError) as error:
        raise _damaged(path, where, error) from None


def _pyarrow(path: Path, where: str) -> Any:
    try:
        import pyarrow
        import pyarrow.parquet
    except ImportError:
        problem = "the package `pyarrow` is not installed"
        raise UserError(where, str(path), problem, "pip install 'finback[data]'") from None
    return pyarrow


@contextmanager
def _opened(path: Path, where: str) -> Iterator[tuple[BinaryIO, BinaryIO]]:
    """The bytes of a file, and the file on the disk that they come from."""
    with path.open("rb") as raw:
        if path.suffix == ".gz":
            with gzip.open(raw) as handle:
                yield handle, raw  # type: ignore[misc]
        elif path.suffix == ".zst":
            with _pyarrow(path, where).CompressedInputStream(raw, "zstd") as stream:
                yield io.BufferedReader(stream, 1 << 20), raw  # type: ignore[misc]
        else:
            yield raw, raw


def _next(handle: BinaryIO, path: Path, where: str) -> bytes:
    try:
        return handle.readline()
    except (EOFError, zlib.error, OSError) as error:
        if path.suffix not in COMPRESSED:
            raise
        raise _damaged(path, where, error) from None


def _damaged(path: Path, where: str, error: Exception) -> UserError:
    reason = str(error).splitlines()[0][:200]
    return UserError(where, str(path), f"damaged ({reason})", "Download it again or leave it out.")


def _text(line: bytes, position: int, path: Path, where: str) -> str:
    try:
        text = line.decode("utf-8")
    except UnicodeDecodeError as error:
        problem = f"not UTF-8 text (byte {position + error.start})"
        raise UserError(where, str(path), problem, "Convert it to UTF-8 or leave it out.") from None
    if "\0" in text:
        raise UserError(where, str(path), "holds NUL bytes, so it looks binary", "Give text or JSONL files.")
    return text if position else text.removeprefix("\ufeff")
