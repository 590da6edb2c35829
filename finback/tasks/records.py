"""The records of a user's data: JSON objects from a file or from the Hugging Face hub, read once. No torch here."""

import json
from collections.abc import Iterator
from functools import lru_cache
from pathlib import Path
from typing import Any, NamedTuple

from finback.config import UserError, did_you_mean

_HUB = "hub:"
_INSTALL = "pip install finback[hub]"


class Record(NamedTuple):
    """One JSON object and where it stands, such as "my.jsonl:12"."""

    where: str
    fields: dict[str, Any]

    def text(self, name: str) -> str:
        """The text (or number) of a field that must be there and not be empty."""
        value = self.fields.get(name)
        if isinstance(value, (str, int, float)) and not isinstance(value, bool) and str(value).strip():
            return str(value)
        if name in self.fields:
            raise UserError(f"{self.where} {name}", value, "expected text", "Correct or remove the record.")
        known = did_you_mean(name, self.fields)
        raise UserError(
            self.where, name, f"the record has no such field. {known}", "Name the field in the recipe."
        )


def read(source: str, subset: str, split: str) -> tuple[Record, ...]:
    """Every record of a .jsonl, .json or .parquet file or of `hub:owner/name`; UserError if there is none."""
    if source.startswith(_HUB):
        return _from_hub(source, subset, split)
    path = Path(source)
    if not path.is_file():
        names = [p.name for p in path.parent.glob("*.json*")] if path.parent.is_dir() else []
        raise UserError(
            "source", source, f"no such file. {did_you_mean(path.name, names)}", "Correct the path."
        )
    stat = path.stat()
    return _from_file(source, stat.st_mtime_ns, stat.st_size)


@lru_cache(maxsize=16)
def _from_file(source: str, changed: int, size: int) -> tuple[Record, ...]:
    path = Path(source)
    readers = {".jsonl": _lines, ".json": _list, ".parquet": _parquet}
    if path.suffix not in readers:
        remedy = "Use .jsonl (one JSON object per line), .json (a list of them) or .parquet."
        raise UserError("source", source, "not a kind of file that can be read", remedy)
    records = tuple(readers[path.suffix](path))
    if not records:
        raise UserError("source", source, "the file has no records", "Fill it or name another.")
    return records


def _lines(path: Path) -> Iterator[Record]:
    for number, line in enumerate(_text(path).split("\n"), start=1):
        if line.strip():
            yield _record(
                _json(line, f"{path}:{number}", "Write one JSON object per line."), f"{path}:{number}"
            )


def _list(path: Path) -> Iterator[Record]:
    values = _json(_text(path), str(path), "Write a list of JSON objects.")
    if not isinstance(values, list):
        raise UserError("source", str(path), "not a list", "Write a list of JSON objects, or use .jsonl.")
    for number, value in enumerate(values, start=1):
        yield _record(value, f"{path}: record {number}")


def _parquet(path: Path) -> Iterator[Record]:
    try:
        import pyarrow
        from pyarrow import parquet
    except ImportError:
        raise UserError("source", str(path), "reading parquet takes the package pyarrow", _INSTALL) from None
    try:
        rows = parquet.read_table(path).to_pylist()
    except (pyarrow.ArrowException, OSError) as error:
        raise UserError("source", str(path), f"not parquet ({error})", "Name another file.") from None
    for number, row in enumerate(rows, start=1):
        yield _record(row, f"{path}: record {number}")


@lru_cache(maxsize=16)
def _from_hub(source: str, subset: str, split: str) -> tuple[Record, ...]:
    try:
        import datasets
    except ImportError:
        raise UserError("source", source, "the package datasets is not installed", _INSTALL) from None
    try:
        rows = datasets.load_dataset(source.removeprefix(_HUB), subset or None, split=split)
    except Exception as error:  # the package raises its own, those of the hub, of HTTP and of the file system
        reason = " ".join(str(error).split())[:300]
        raise UserError(
            "source", source, f"the hub did not give subset {subset!r}, split {split!r}: {reason}",
            "Check the name, the subset and the split, or the connection; or name a file that you have.",
        ) from None  # fmt: skip
    return tuple(_record(dict(row), f"{source} {split}: record {n}") for n, row in enumerate(rows, start=1))


def _record(value: Any, where: str) -> Record:
    if not isinstance(value, dict):
        raise UserError(
            where, value, "not a JSON object", 'Write for example {"question": "…", "answer": "…"}.'
        )
    return Record(where, value)


def _json(text: str, where: str, remedy: str) -> Any:
    try:
        return json.loads(text)
    except (ValueError, RecursionError) as error:  # also too deep, or a number of too many digits
        problem = f"not JSON ({getattr(error, 'msg', error)})"
        raise UserError(where, text[:60], problem, remedy) from None


def _text(path: Path) -> str:
    try:
        return path.read_text(encoding="utf-8-sig")
    except UnicodeDecodeError as error:
        problem = f"not UTF-8 text (byte {error.start})"
        raise UserError("source", str(path), problem, "Convert it to UTF-8.") from None
    except OSError as error:
        raise UserError("source", str(path), str(error.strerror), "Make the file readable.") from None
