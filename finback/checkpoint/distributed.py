"""Distributed checkpoints: many ranks write one together through torch's DCP, and any number of ranks can read it.

Each rank writes one safetensors file with its shares and their offsets in the whole tensors; nothing is pickled. A
checkpoint is a folder step-<n>. While it is written it is called step-<n>.part; `manifest.json`, with the digests of
all files and of itself, is written last, and then the folder is renamed. All ranks must share a file system.
"""

import hashlib
import json
import os
import shutil
import warnings
from collections.abc import Callable
from concurrent.futures import Future
from pathlib import Path
from typing import Any, TypeVar

import torch
import torch.distributed as dist
from torch import Tensor
from torch.distributed.checkpoint import state_dict_loader, state_dict_saver
from torch.distributed.checkpoint.api import CheckpointException
from torch.distributed.checkpoint.hf_storage import HuggingFaceStorageReader, HuggingFaceStorageWriter
from torch.distributed.checkpoint.metadata import TensorStorageMetadata
from torch.distributed.tensor import DTensor

from finback.checkpoint.store import KEEP, as_os_error
from finback.config import UserError
from finback.model.config import ModelConfig
from finback.runs.files import read_json, read_object, write_json
from finback.runs.provenance import sha256

MANIFEST = "manifest.json"
Result = TypeVar("Result")


class Steps:
    """A stage's checkpoints. Every method is collective: all ranks call it, each with its own tensors.

    Tensors are DTensors, or plain tensors that are equal on all ranks that pass them.
    """

    def __init__(self, folder: Path, keep: int = KEEP, say: Callable[[str], None] = lambda _: None) -> None:
        """say: receives a message when a damaged checkpoint is passed over."""
        self.folder, self.keep, self.say = folder, keep, say
        # a separate group, because ranks exchange other tensors while a checkpoint is written
        self.group = dist.new_group(backend="gloo")
        self.pending: tuple[int, dict[str, Any], Future[Any]] | None = None

    def save(self, step: int, tensors: dict[str, Tensor], meta: dict[str, Any]) -> None:
        """Writes a checkpoint, which is complete on disk when this returns."""
        self.begin(step, tensors, meta)
        self.finish()

    def begin(self, step: int, tensors: dict[str, Tensor], meta: dict[str, Any]) -> None:
        """Starts writing a checkpoint and returns once the tensors are copied; `finish` completes it."""
        self.finish()
        part = _part(self.folder, step)

        def clear() -> None:
            for old in self.folder.glob("step-*.part"):  # left by a run that was killed
                shutil.rmtree(old, ignore_errors=True)
            part.mkdir(parents=True)

        on_first(clear, self.group)
        writer = HuggingFaceStorageWriter(str(part), save_distributed=True)
        apart = {name: _apart(t.detach()) for name, t in tensors.items()}
        written = state_dict_saver.async_save(apart, storage_writer=writer, process_group=self.group)
        assert isinstance(written, Future), "DCP returns a Future unless staging is asynchronous too"
        self.pending = step, meta, written

    def finish(self) -> None:
        """Completes the checkpoint that `begin` started, if any, and deletes all but the newest `keep`."""
        if self.pending is None:
            return
        step, meta, written = self.pending
        self.pending = None
        part = _part(self.folder, step)
        try:
            written.result()
            self._complete(part, meta)
        except (CheckpointException, OSError) as error:
            if dist.get_rank() == 0:
                shutil.rmtree(part, ignore_errors=True)
            raise _disk_error(error, part) from None

    def _complete(self, part: Path, meta: dict[str, Any]) -> None:
        """Writes the manifest of a checkpoint whose tensors are on disk, and renames its folder."""
        digests = self._digests(part, sorted(path.name for path in part.glob("*.safetensors")))

        def name() -> None:
            write_json(part / MANIFEST, {"meta": meta, "sha256": digests, "digest": _own_digest(meta, digests)})
            whole = part.with_suffix("")
            shutil.rmtree(whole, ignore_errors=True)
            part.replace(whole)
            _sync(self.folder)
            for old in _found(self.folder)[self.keep :]:
                shutil.rmtree(old)

        on_first(name, self.group)

    def load_newest(self, *tensors: dict[str, Tensor]) -> tuple[int, dict[str, Any]] | None:
        """Reads the newest intact checkpoint into tensors, in place; returns its step and meta, None if there is none.

        The sets of tensors may overlap in names. A damaged checkpoint is reported and passed over; UserError when all
        are damaged, or when shapes differ from the model's.
        """
        there = on_first(lambda: _found(self.folder), self.group)
        first = ""
        for path in there:
            trouble = self._trouble(path)
            if not trouble:
                metas = [self.load(path, each) for each in tensors]
                return int(path.name.removeprefix("step-")), metas[0]
            first = first or trouble
            if path != there[-1]:
                self.say(f"{path}: {trouble}; falling back to the previous checkpoint")
        if there:
            raise UserError("checkpoint", str(there[0]), first, "Delete it to start the stage again.")
        return None

    def load(self, path: Path, tensors: dict[str, Tensor]) -> dict[str, Any]:
        """Reads some or all tensors of a checkpoint, in place, whatever layout wrote it; returns its meta."""
        reader = HuggingFaceStorageReader(str(path))
        known = _tensors(reader)
        for name, tensor in tensors.items():
            size = known[name].size if name in known else None
            if size != tensor.shape:
                problem = f"{name} is {'missing' if size is None else tuple(size)}, not {tuple(tensor.shape)}"
                raise UserError("checkpoint", str(path), problem, "Continue with the model that wrote it.")
        state_dict_loader.load(dict(tensors), storage_reader=reader, process_group=self.group)
        return dict(read_json(path / MANIFEST)["meta"])

    def _trouble(self, path: Path) -> str:
        """Returns what is wrong with a checkpoint, the same on every rank; an empty string if nothing is."""
        declared = on_first(lambda: _declared(path), self.group)
        if declared is None:
            return f"its {MANIFEST} is missing or damaged"
        there = sorted(file.name for file in path.glob("*.safetensors"))
        if there == sorted(declared) and self._digests(path, there) == declared:
            return ""
        return "its files do not match their digests"

    def _digests(self, folder: Path, names: list[str]) -> dict[str, str]:
        """Returns the SHA-256 of each file; ranks share the work."""
        rank, size = dist.get_rank(), dist.get_world_size()
        mine = {name: sha256(folder / name) for name in names[rank::size]}
        all_of_them: list[dict[str, str]] = [{} for _ in range(size)]
        dist.all_gather_object(all_of_them, mine, group=self.group)
        return {name: digest for some in all_of_them for name, digest in some.items()}


def on_first(work: Callable[[], Result], group: dist.ProcessGroup) -> Result:
    """Runs work on rank 0 while the others wait; all ranks return its result or raise its UserError or OSError."""
    box: list[Any] = [None, None]
    if dist.get_rank() == 0:
        try:
            box[0] = work()
        except (UserError, OSError) as error:
            box[1] = error
    dist.broadcast_object_list(box, src=0, group=group)
    if box[1] is not None:
        raise box[1]
    result: Result = box[0]
    return result


def newest(folder: Path, say: Callable[[str], None]) -> tuple[Path, dict[str, Any]]:
    """Returns the newest intact checkpoint and its meta, verified by this process; UserError if all are damaged."""
    found = _found(folder)
    for path in found:
        declared = _declared(path)
        if declared is not None and all(_is_intact(path / name, digest) for name, digest in declared.items()):
            return path, dict(read_json(path / MANIFEST)["meta"])
        if path != found[-1]:
            say(f"{path}: its files do not match their digests; falling back to the previous checkpoint")
    problem = "its files do not match their digests"
    raise UserError("checkpoint", str(found[0]), problem, "Delete it to start the stage again.")


def _is_intact(file: Path, digest: str) -> bool:
    return file.is_file() and sha256(file) == digest


def whole_model(path: Path, config: ModelConfig) -> dict[str, Tensor]:
    """Returns a checkpoint's model as a whole state dict for Transformer.load_state_dict; needs no process group.

    Reads only the tensors whose names begin with "model.".
    """
    model = {name.removeprefix("model."): tensor for name, tensor in read_whole(path, "model.").items()}
    return model | {"head.weight": model["embed"]} if config.tie_word_embeddings else model


def read_whole(path: Path, prefix: str = "") -> dict[str, Tensor]:
    """Returns the whole tensors of a checkpoint whose names begin with `prefix`; needs no process group."""
    reader = HuggingFaceStorageReader(str(path))
    tensors = {
        name: torch.empty(about.size, dtype=about.properties.dtype)
        for name, about in _tensors(reader).items()
        if name.startswith(prefix)
    }
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", "torch.distributed is disabled")  # intended
        state_dict_loader.load(tensors, storage_reader=reader, no_dist=True)
    # DCP's safetensors files store scalars with shape (1,)
    return {n: t.view(()) if n.startswith("adam.") and n.endswith(".step") else t for n, t in tensors.items()}


def _apart(tensor: Tensor) -> Tensor:
    """Copies a tensor unless it is contiguous from the start of its storage, because DCP cannot copy others."""
    mine = tensor.to_local() if isinstance(tensor, DTensor) else tensor
    if mine.storage_offset() == 0 and mine.is_contiguous():
        return tensor
    mine = mine.contiguous().clone()
    if not isinstance(tensor, DTensor):
        return mine
    where, shape, stride = (tensor.device_mesh, tensor.placements), tensor.shape, tensor.stride()
    return DTensor.from_local(mine, *where, run_check=False, shape=shape, stride=stride)


def _tensors(reader: HuggingFaceStorageReader) -> dict[str, TensorStorageMetadata]:
    """Returns the metadata of a checkpoint's tensors, by name."""
    about = reader.read_metadata().state_dict_metadata.items()
    return {name: entry for name, entry in about if isinstance(entry, TensorStorageMetadata)}


def _part(folder: Path, step: int) -> Path:
    return folder / f"step-{step:08}.part"


def _found(folder: Path) -> list[Path]:
    """Returns the completed checkpoints of a folder, newest first."""
    return sorted((p for p in folder.glob("step-*") if p.is_dir() and not p.suffix), reverse=True)


def _declared(path: Path) -> dict[str, str] | None:
    """Returns the digests of a checkpoint's files from its manifest; None if the manifest is missing or damaged."""
    try:
        found = read_object(path / MANIFEST)
    except (UserError, OSError):
        return None
    meta, digests = found.get("meta"), found.get("sha256")
    older = set(found) == {"meta", "sha256"}  # early manifests do not contain their own digest
    if not isinstance(meta, dict) or not isinstance(digests, dict):
        return None
    return digests if older or found.get("digest") == _own_digest(meta, digests) else None


def _own_digest(meta: dict[str, Any], digests: dict[str, str]) -> str:
    return hashlib.sha256(json.dumps([meta, digests]).encode()).hexdigest()


def _disk_error(error: BaseException, path: Path) -> BaseException:
    """Returns the OSError behind a DCP failure, with the path, on every rank; any other error unchanged."""
    if not isinstance(error, CheckpointException):
        return error
    for rank, (cause, _) in sorted(error.failures.items()):
        cause = as_os_error(cause, path) if isinstance(cause, Exception) else cause
        if isinstance(cause, OSError) and cause.errno is not None:
            return OSError(cause.errno, cause.strerror, f"{cause.filename or path} (rank {rank})")
    return error


def _sync(folder: Path) -> None:
    """Syncs renames in a folder to disk."""
    handle = os.open(folder, os.O_RDONLY)
    os.fsync(handle)
    os.close(handle)
