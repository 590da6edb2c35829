"""JSON and JSONL files of a run folder: written atomically (temporary file, fsync, rename), read with damage reported."""

import errno
import json
import math
import os
from collections.abc import Iterable
from pathlib import Path
from typing import Any

from finback.config import UserError

# file names in a run folder; folder.py explains their contents
RECIPE, SUMMARY = "recipe.json", "summary.json"
HUB = "hub"  # key in recipe.json: commits of hub models by name
CONFIG, LEDGER, MANIFEST = "config.json", "ledger.jsonl", "manifest.json"
LOCK, OWNER = ".lock", ".owner.json"  # locked while a recipe runs; and its owner
METRICS, SAMPLES, ROUTER, WATCHED = "metrics.jsonl", "samples.jsonl", "router.jsonl", "watched.jsonl"

_MENDABLE = (errno.ENOSPC, errno.EDQUOT, errno.EFBIG, errno.EACCES, errno.EROFS)


def write_json(path: Path, value: Any) -> None:
    """Replaces a file by `value` as JSON, atomically: readers see the old or the new text, even after a crash."""
    _replace(path, [json.dumps(value, indent=1, ensure_ascii=False), "\n"])


def write_lines(path: Path, records: Iterable[Any]) -> None:
    """Replaces a file by records as JSONL, one per line, as atomically as `write_json`."""
    _replace(path, (json.dumps(record, ensure_ascii=False) + "\n" for record in records))


def _replace(path: Path, texts: Iterable[str]) -> None:
    temporary = path.with_name(path.name + ".part")
    # lone surrogates, which a model's or a third party's JSON may contain, are written as JSON escapes
    with temporary.open("w", encoding="utf-8", errors="backslashreplace") as handle:
        handle.writelines(texts)
        handle.flush()
        os.fsync(handle.fileno())
    temporary.replace(path)


def disk_trouble(error: BaseException) -> str:
    """What a user can do about a write error: full disk, quota, read-only folder; "" for other errors."""
    if not isinstance(error, OSError) or error.errno not in _MENDABLE:
        return ""
    remedy = "No file is incomplete; fix this and run the same command to continue."
    return f"{error.filename or 'disk'}: {error.strerror}. {remedy}"


def read_json(path: Path) -> Any:
    """Reads a JSON file that finback wrote; UserError if it is damaged."""
    try:
        return json.loads(path.read_text(encoding="utf-8"))
    except (json.JSONDecodeError, UnicodeDecodeError) as error:
        raise UserError("run folder", str(path), f"damaged ({error})", "Delete it and run the recipe again.") from None


def read_object(path: Path) -> dict[str, Any]:
    """The same for a file with an object; UserError also for anything else."""
    found = read_json(path)
    if not isinstance(found, dict):
        raise UserError("run folder", str(path), "damaged (not an object)", "Delete it and run the recipe again.")
    return found


def read_lines(path: Path) -> list[dict[str, Any]]:
    """The objects in a JSONL file; an incomplete last line, left by a kill, is ignored."""
    if not path.is_file():
        return []
    records = []
    for line in path.read_text(encoding="utf-8", errors="replace").split("\n"):
        try:
            record = json.loads(line)
        except json.JSONDecodeError:
            continue
        if isinstance(record, dict):
            records.append(record)
    return records


def is_number(value: Any) -> bool:
    """Whether a value from a file is a finite number."""
    return isinstance(value, int | float) and not isinstance(value, bool) and math.isfinite(value)


def is_gguf(path: Path) -> bool:
    """Whether a path is a GGUF file: by its suffix, or without one, as in a download cache, by its first bytes."""
    if path.suffix or not path.is_file():
        return path.suffix.lower() == ".gguf"
    with path.open("rb") as handle:
        return handle.read(4) == b"GGUF"


def is_checkpoint(path: Path) -> bool:
    """Whether a path is an external model: a GGUF file, or a folder whose config.json is not a stage's.

    A config.json that is damaged or unreadable counts too, so that the user gets the right error.
    """
    if is_gguf(path):
        return True
    try:
        raw = json.loads((path / CONFIG).read_text(encoding="utf-8"))
    except (FileNotFoundError, NotADirectoryError):
        return False
    except (OSError, ValueError):
        return True
    return not isinstance(raw, dict) or any(k in raw for k in ("model_type", "architectures", "auto_map"))
