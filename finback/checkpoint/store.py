"""Checkpoints that are whole or absent: one safetensors file, its digest inside, the last two kept."""

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
    """Write tensors and JSON-able meta to one file, atomically; a kill at any moment leaves the old file or the new."""
    tensors, text = _apart(tensors), json.dumps(meta)
    write(path, tensors, {"meta": text, "digest": _digest(sorted(tensors.items()), text)})


def write(path: Path, tensors: dict[str, Tensor], header: dict[str, str]) -> None:
    """Write a safetensors file whose header has these metadata, atomically; equal ones have equal bytes."""
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
    """Put the header's metadata in order: safetensors writes them in a random one, so equal runs would differ in bytes."""
    size = int.from_bytes(handle.read(8), "little")
    header = json.loads(handle.read(size))
    header["__metadata__"] = dict(sorted(header["__metadata__"].items()))
    text = json.dumps(header, separators=(",", ":"), ensure_ascii=False).encode()
    assert len(text) <= size, "the same header in another order"
    handle.seek(8)
    handle.write(text.ljust(size))


def as_os_error(error: Exception, path: Path) -> Exception:
    """The OSError that safetensors reports only as text, a full disk for one; any other error as it is."""
    reason = re.search(r"os error (\d+)", str(error))
    return OSError(int(reason[1]), os.strerror(int(reason[1])), str(path)) if reason else error


def load(path: Path) -> tuple[dict[str, Tensor], dict[str, Any]]:
    """Read a checkpoint and verify its digest; UserError when it is torn or changed."""
    try:
        with safe_open(path, framework="pt") as handle:
            header = handle.metadata() or {}
            tensors = {name: handle.get_tensor(name) for name in handle.keys()}  # noqa: SIM118 - not a dict
    except (SafetensorError, OSError) as error:
        raise UserError("checkpoint", str(path), f"cannot be read ({error})", REMEDY) from None
    return tensors, _meta(path, header, sorted(tensors.items()))


def verify(path: Path, names: Iterable[str], read: Callable[[str], Tensor]) -> dict[str, Any]:
    """The meta of a file; UserError unless its tensors, of which `read` gives one at a time, are what `save` wrote."""
    try:
        with safe_open(path, framework="pt") as handle:
            header = handle.metadata() or {}
    except (SafetensorError, OSError) as error:
        raise UserError("checkpoint", str(path), f"cannot be read ({error})", REMEDY) from None
    return _meta(path, header, ((name, read(name)) for name in sorted(names)))


def _meta(path: Path, header: dict[str, str], tensors: Iterable[tuple[str, Tensor]]) -> dict[str, Any]:
    """What a header holds beside the digest; UserError where that is of other tensors than these, in order."""
    text = header.get("meta", "")
    if header.get("digest") != _digest(tensors, text):
        raise UserError("checkpoint", str(path), "its content does not match its digest", REMEDY)
    return dict(json.loads(text))


REMEDY = "Delete it: the run continues from the checkpoint before, or from the start of the stage."


def save_step(folder: Path, step: int, tensors: dict[str, Tensor], meta: dict[str, Any], keep: int = KEEP) -> None:
    """Save step-<step>.safetensors and drop all but the newest `keep`.

    The folder has one writer: what safetensors had not finished when that was killed is dropped first, to make room.
    """
    for torn in folder.glob(".tmp*"):
        torn.unlink()
    save(folder / f"step-{step:08}.safetensors", tensors, meta)
    for old in sorted(folder.glob("step-*.safetensors"))[:-keep]:
        old.unlink()


def load_newest(
    folder: Path, say: Callable[[str], None] = lambda _: None
) -> tuple[int, dict[str, Tensor], dict[str, Any]] | None:
    """The newest readable step of a stage, or None when there is none.

    A damaged newest file falls back to the one before, which `say` reports; if none is whole, the error of the newest
    is raised.
    """
    return newest(folder, say, load)


def newest(
    folder: Path, say: Callable[[str], None], load: Callable[[Path], tuple[Content, dict[str, Any]]]
) -> tuple[int, Content, dict[str, Any]] | None:
    """The same with whatever `load` makes of a file; UserError from it says that the file is damaged."""
    trouble: UserError | None = None
    for path in sorted(folder.glob("step-*.safetensors"), reverse=True):
        try:
            content, meta = load(path)
        except UserError as error:
            trouble = trouble or error
            say(f"{path} {error.problem}: the checkpoint before it is used")
            continue
        return int(path.stem.removeprefix("step-")), content, meta
    if trouble is not None:
        raise trouble
    return None


def _apart(tensors: dict[str, Tensor]) -> dict[str, Tensor]:
    """The same values on the CPU, contiguous, and none in another's memory as tied weights are."""
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
