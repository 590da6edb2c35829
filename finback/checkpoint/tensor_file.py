"""Writes a safetensors file tensor by tensor, in any order; its size and header are known before the values."""

import errno
import json
import math
import os
from pathlib import Path

import torch
from torch import Tensor

from finback.runs.provenance import sha256

Contents = dict[str, tuple[torch.dtype, tuple[int, ...]]]  # name -> dtype and shape
WORDS = {torch.float32: "F32", torch.bfloat16: "BF16", torch.float8_e4m3fn: "F8_E4M3", torch.int64: "I64"}
WORDS |= {torch.int8: "I8", torch.float8_e8m0fnu: "F8_E8M0"}


class TensorFile:
    """Creates a file and reserves disk space for all its tensors, so that a full disk fails here. `close` syncs it."""

    def __init__(self, path: Path, tensors: Contents) -> None:
        # widest dtype first, as safetensors sorts them, so that every tensor is aligned to its width
        order = sorted(tensors, key=lambda name: (-tensors[name][0].itemsize, name))
        header: dict[str, object] = {"__metadata__": {"format": "pt"}}
        self.places: dict[str, tuple[int, int]] = {}
        end = 0
        for name in order:
            dtype, shape = tensors[name]
            start, end = end, end + math.prod(shape) * dtype.itemsize
            header[name] = {"dtype": WORDS[dtype], "shape": list(shape), "data_offsets": [start, end]}
            self.places[name] = start, end
        text = json.dumps(header, separators=(",", ":")).encode()
        text += b" " * (-len(text) % 8)
        self.path, self.base, self.left = path, 8 + len(text), set(order)
        self.handle = path.open("wb")
        try:
            self.handle.write(len(text).to_bytes(8, "little") + text)
            self.handle.flush()
            _reserve(self.handle.fileno(), self.base + end)
        except OSError:
            self.handle.close()
            raise

    def write(self, name: str, tensor: Tensor) -> None:
        """Writes one tensor, which has the dtype and shape announced for it."""
        start, end = self.places[name]
        values = tensor.detach().cpu().contiguous().reshape(-1).view(torch.uint8)
        assert len(values) == end - start, f"{name} does not have the announced size"
        self.handle.seek(self.base + start)
        self.handle.write(values.numpy().data)
        self.left.remove(name)

    def close(self) -> str:
        """Syncs the file to disk; returns the SHA-256 of the whole file."""
        assert not self.left, f"{self.path} lacks {sorted(self.left)}"
        self.handle.flush()
        os.fsync(self.handle.fileno())
        self.handle.close()
        return sha256(self.path)


def _reserve(descriptor: int, size: int) -> None:
    """Reserves disk space where the file system supports it; otherwise only sets the file's size."""
    try:
        os.posix_fallocate(descriptor, 0, size)
    except (AttributeError, OSError) as error:
        if isinstance(error, OSError) and error.errno not in (
            errno.EINVAL,
            errno.EOPNOTSUPP,
        ):  # any other error is real; these mean that the file system cannot reserve
            raise
        os.ftruncate(descriptor, size)
