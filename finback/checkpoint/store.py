"""Atomic checkpoints of one rank: one safetensors file that contains its digest; the last two are kept."""

import hashlib
import json
import os
import re
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Any, BinaryIO, TypeVar

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor

from finback.config import UserError

Content = TypeVar("Content")
KEEP = 2


def save(path: Path, tensors: dict[str, Tensor], meta: dict[str, Any]) -> None:
    """Writes tensors and JSON-serialisable meta to one file, atomically: a kill leaves the old file or the new."""
    tensors, text = _apart(tensors), json.dumps(meta)
    write(path, tensors, {"meta": text, "digest": _digest(sorted(tensors.items()), text)})


def write(path: Path, tensors: dict[str, Tensor], header: dict[str, str]) -> None:
    """Writes a safetensors file with these metadata, atomically; equal contents give equal bytes."""
    temporary = path.with_name(path.name + ".part")
    try:
        save_file(tensors, temporary, metadata=header)
        with temporary.open("rb+") as handle:
            _sort_metadata(handle)
            handle.flush()
            os.fsync(handle.fileno())
        temporary.replace(path)
    except (OSError, SafetensorError) as error:
        temporary.unlink(missing_ok=True)
        raise as_os_error(error, path) from None


def _sort_metadata(handle: BinaryIO) -> None:
    """Sorts the header's metadata: safetensors writes them in random order, and equal runs would differ in bytes."""
    size = int.from_bytes(handle.read(8), "little")
    header = json.loads(handle.read(size))
    header["__metadata__"] = dict(sorted(header["__metadata__"].items()))
    text = json.dumps(header, separators=(",", ":"), ensure_ascii=False).encode()
    assert len(text) <= size, "the same header in another order"
    handle.seek(8)
    handle.write(text.ljust(size))


def as_os_error(error: Exception, path: Path) -> Exception:
    """Returns the OSError that safetensors reports only as text, such as a full disk; any other error unchanged."""
    reason = re.search(r"os error (\d+)", str(error))
    return OSError(int(reason[1]), os.strerror(int(reason[1])), str(path)) if reason else error


def load(path: Path) -> tuple[dict[str, Tensor], dict[str, Any]]:
    """Reads a checkpoint and verifies its digest; UserError when it is truncated or changed."""
    try:
        with safe_open(path, framework="pt") as handle:
            header = handle.metadata() or {}
            tensors = {name: handle.get_tensor(name) for name in handle.keys()}  # noqa: SIM118 - not a dict
    except (SafetensorError, OSError) as error:
        raise UserError("checkpoint", str(path), f"cannot be read ({error})", REMEDY) from None
    return tensors, _meta(path, header, sorted(tensors.items()))


def verify(path: Path, names: Iterable[str], read: Callable[[str], Tensor]) -> dict[str, Any]:
    """Returns a file's meta; UserError unless its tensors, which `read` returns one by one, are what `save` wrote."""
    try:
        with safe_open(path, framework="pt") as handle:
            header = handle.metadata() or {}
    except (SafetensorError, OSError) as error:
        raise UserError("checkpoint", str(path), f"cannot be read ({error})", REMEDY) from None
    return _meta(path, header, ((name, read(name)) for name in sorted(names)))


def _meta(path: Path, header: dict[str, str], tensors: Iterable[tuple[str, Tensor]]) -> dict[str, Any]:
    """Returns the header's meta; UserError unless its digest is that of these tensors, given in name order."""
    text = header.get("meta", "")
    if header.get("digest") != _digest(tensors, text):
        raise UserError("checkpoint", str(path), "its content does not match its digest", REMEDY)
    return dict(json.loads(text))


REMEDY = "Delete it: the run continues from the previous checkpoint, or from the start of the stage."


def save_step(folder: Path, step: int, tensors: dict[str, Tensor], meta: dict[str, Any], keep: int = KEEP) -> None:
    """Saves step-<step>.safetensors and deletes all but the newest `keep`.

    The folder has one writer: temporary files of a killed one are deleted first, to make room.
    """
    for torn in folder.glob(".tmp*"):
        torn.unlink()
    save(folder / f"step-{step:08}.safetensors", tensors, meta)
    for old in sorted(folder.glob("step-*.safetensors"))[:-keep]:
        old.unlink()


def load_newest(
    folder: Path, say: Callable[[str], None] = lambda _: None
) -> tuple[int, dict[str, Tensor], dict[str, Any]] | None:
    """Returns step, tensors and meta of a stage's newest intact checkpoint; None where the stage has no checkpoints.

    Damaged files are reported through `say` and passed over; if all are damaged, raises the newest one's error.
    """
    return newest(folder, say, load)


def newest(
    folder: Path, say: Callable[[str], None], load: Callable[[Path], tuple[Content, dict[str, Any]]]
) -> tuple[int, Content, dict[str, Any]] | None:
    """As `load_newest`, with the contents that `load` returns; its UserError means that the file is damaged."""
    trouble: UserError | None = None
    for path in sorted(folder.glob("step-*.safetensors"), reverse=True):
        try:
            content, meta = load(path)
        except UserError as error:
            trouble = trouble or error
            say(f"{path} {error.problem}: falling back to the previous checkpoint")
            continue
        return int(path.stem.removeprefix("step-")), content, meta
    if trouble is not None:
        raise trouble
    return None


def _apart(tensors: dict[str, Tensor]) -> dict[str, Tensor]:
    """Returns the tensors on the CPU, contiguous, and without shared memory: tied weights are copied."""
    apart, taken = {}, set[int]()
    for name, t in tensors.items():
        t = t.detach().cpu().contiguous()
        place = t.untyped_storage().data_ptr()
        apart[name] = t.clone() if place in taken else t
        taken.add(place)
    return apart


def _digest(tensors: Iterable[tuple[str, Tensor]], meta: str) -> str:
    total = hashlib.sha256(meta.encode())
    for name, tensor in tensors:
        total.update(f"{name}{tensor.dtype}{tuple(tensor.shape)}".encode())
        total.update(tensor.reshape(-1).view(torch.uint8).numpy().data if tensor.numel() else b"")
    return total.hexdigest()
