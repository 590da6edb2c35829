"""JSON and JSONL files of a run folder: written whole (temporary file, fsync, rename), read with damage reported."""

import errno
import json
import math
import os
from collections.abc import Iterable
from pathlib import Path
from typing import Any

from finback.config import UserError

# of a run folder; folder.py says what each holds
RECIPE, SUMMARY = "recipe.json", "summary.json"
HUB = "hub"  # in recipe.json: the commits of models of the hub, by their names
CONFIG, LEDGER, MANIFEST = "config.json", "ledger.jsonl", "manifest.json"
LOCK, OWNER = ".lock", ".owner.json"  # locked while a recipe runs; who runs it
METRICS, SAMPLES, ROUTER, WATCHED = "metrics.jsonl", "samples.jsonl", "router.jsonl", "watched.jsonl"

_MENDABLE = (errno.ENOSPC, errno.EDQUOT, errno.EFBIG, errno.EACCES, errno.EROFS)


def write_json(path: Path, value: Any) -> None:
    """Replace a file by `value` as JSON, atomically: readers see the old or the new text, also after a crash."""
    _replace(path, [json.dumps(value, indent=1, ensure_ascii=False), "\n"])


def write_lines(path: Path, records: Iterable[Any]) -> None:
    """Replace a file by records as JSONL, one to a line, as atomically as `write_json`."""
    _replace(path, (json.dumps(record, ensure_ascii=False) + "\n" for record in records))


def _replace(path: Path, texts: Iterable[str]) -> None:
    temporary = path.with_name(path.name + ".part")
    # half a surrogate pair, which a model's or a stranger's JSON may hold, becomes JSON's escape for it
    with temporary.open("w", encoding="utf-8", errors="backslashreplace") as handle:
        handle.writelines(texts)
        handle.flush()
        os.fsync(handle.fileno())
    temporary.replace(path)


def disk_trouble(error: BaseException) -> str:
    """What a user can mend of an error in writing: a full disk, a quota, a folder that is read only; else empty."""
    if not isinstance(error, OSError) or error.errno not in _MENDABLE:
        return ""
    remedy = "Nothing is half-written; mend it and run the same command to continue."
    return f"{error.filename or 'disk'}: {error.strerror}. {remedy}"


def read_json(path: Path) -> Any:
    """Read a JSON file that finback wrote; UserError when it is damaged."""
    try:
        return json.loads(path.read_text(encoding="utf-8"))
    except (json.JSONDecodeError, UnicodeDecodeError) as error:
        raise UserError("run folder", str(path), f"damaged ({error})", "Delete it and run the recipe again.") from None


def read_object(path: Path) -> dict[str, Any]:
    """The same of a file that holds an object; UserError too when it holds anything else."""
    found = read_json(path)
    if not isinstance(found, dict):
        raise UserError("run folder", str(path), "damaged (not an object)", "Delete it and run the recipe again.")
    return found


def read_lines(path: Path) -> list[dict[str, Any]]:
    """The objects in a JSONL file; a torn last line, left by a kill, is ignored."""
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
    """Whether a value out of a file is a finite number."""
    return isinstance(value, int | float) and not isinstance(value, bool) and math.isfinite(value)


def is_gguf(path: Path) -> bool:
    """Whether a path is a GGUF file: by its ending, or where it has none, as in a cache of downloads, by how it begins."""
    if path.suffix or not path.is_file():
        return path.suffix.lower() == ".gguf"
    with path.open("rb") as handle:
        return handle.read(4) == b"GGUF"


def is_checkpoint(path: Path) -> bool:
    """Whether a path is a model from elsewhere: a GGUF file, or a folder whose config.json is not a stage's.

    A config.json that is damaged or cannot be read counts too, so that a user learns what is wrong with it.
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
