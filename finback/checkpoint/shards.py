"""Reads the tensors of a Hugging Face folder, found through its index or in its single file, one at a time.

Values are read directly into the model where dtypes agree. Memory-mapped files took several times as long because of
page faults (docs/log.md), and would count as memory.
"""

import io
import json
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import NoReturn, Protocol

import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor

from finback.checkpoint.places import is_pointer
from finback.config import UserError
from finback.kernels.formats import Format

INDEX, SINGLE = "model.safetensors.index.json", "model.safetensors"
BESIDE = "model-mtp.safetensors"  # exported MTP layers whose layer numbers transformers does not ignore
ALL_BESIDE = "model-mtp*.safetensors"  # many ranks write several
PIECE = 1 << 20  # numbers converted at a time
E8M0 = "F8_E8M0"  # powers of two, used for factors only
SCALE = "_scale_inv"  # the ending that a tensor's name gets for its FP8 factors
# bytes per value, by dtype, for tensors whose rows can be read separately
WIDTHS = {"F64": 8, "F32": 4, "F16": 2, "BF16": 2, "F8_E4M3": 1, "U8": 1}


@dataclass(frozen=True)
class Spec:
    """A tensor's entry in a file: safetensors' name of the dtype, shape, file and start there in bytes."""

    dtype: str
    shape: tuple[int, ...]
    file: Path
    start: int = 0


class Weights(Protocol):
    """Tensors under Hugging Face's names from any source: a folder's files, packed or not, or a GGUF file."""

    specs: dict[str, Spec]

    def read(self, name: str) -> Tensor:
        """Returns one tensor as it is stored; GGUF and packed tensors are dequantized to fp32."""
        ...

    def read_into(self, name: str, into: Tensor) -> None:
        """Reads one tensor into a contiguous tensor of the same shape."""
        into.copy_(self.read(name))

    def read_range(self, name: str, start: int, into: Tensor) -> None:
        """Reads len(into) numbers of one tensor, from flat position `start`, into a flat tensor."""
        into.copy_(self.read(name).flatten()[start : start + len(into)])

    def scale(self, name: str) -> Tensor | None:
        """Returns the factors of an FP8 tensor in fp32; None for any other tensor."""
        return self.read(name + SCALE).float() if name + SCALE in self.specs else None

    def packed(self, name: str) -> tuple[Format, Tensor, Tensor] | None:
        """Returns format, values and factors of a matrix as stored; None unless it is in one of our formats."""
        return None

    def by_file(self) -> Iterator[str]:
        """Yields all names in the order in which they are read fastest."""
        yield from self.specs


class Shards(Weights):
    """All tensors of a folder or of one file, by name; opening reads every header, so a truncated file fails early."""

    def __init__(self, folder: Path) -> None:
        self.specs: dict[str, Spec] = {}
        # as in transformers, a single file takes precedence over an index, whichever is newer
        is_indexed = (folder / INDEX).is_file() and not (folder / SINGLE).is_file()
        indexed = _read_index(folder / INDEX) if is_indexed else {}
        if folder.is_file():
            self.files = [folder]
        elif indexed:
            self.files = [folder / name for name in sorted(set(indexed.values()))]
        elif (folder / SINGLE).is_file():
            self.files = [folder / SINGLE]
        else:
            self.files = sorted(folder.glob("*.safetensors"))
        if not self.files:
            _refuse(folder)
        self.files += [file for file in sorted(folder.glob(ALL_BESIDE)) if file not in self.files]
        for file in self.files:
            self._read_header(file)
        lost = sorted(set(indexed) - set(self.specs))
        if lost:
            problem = f"names {len(lost)} tensors that its files lack, such as {lost[0]}"
            raise UserError(INDEX, str(folder), problem, "Download the folder again.")

    def _read_header(self, file: Path) -> None:
        _check(file)
        with file.open("rb") as handle:
            length = int.from_bytes(handle.read(8), "little")
            header = json.loads(handle.read(length))
        for name, entry in header.items():
            if name == "__metadata__":
                continue
            if name in self.specs:
                raise UserError(
                    "weights", str(file), f"{name} is in {self.specs[name].file.name} too", "Keep one of them."
                )
            start = 8 + length + entry["data_offsets"][0]
            self.specs[name] = Spec(entry["dtype"], tuple(entry["shape"]), file, start)

    def read(self, name: str) -> Tensor:
        return self.read_spec(self.specs[name])

    def read_spec(self, spec: Spec) -> Tensor:
        """Reads the tensor that a spec describes."""
        dtype = element_type(spec.dtype)
        assert dtype is not None, f"the audit refuses {spec.dtype}"
        tensor = torch.empty(spec.shape, dtype=dtype)
        self._read_bytes(spec, tensor)
        return tensor

    def read_into(self, name: str, into: Tensor) -> None:
        """Reads directly from the file where the dtypes agree."""
        spec = self.specs[name]
        if element_type(spec.dtype) == into.dtype:
            self._read_bytes(spec, into)
        else:
            super().read_into(name, into)

    def read_range(self, name: str, start: int, into: Tensor) -> None:
        """Reads directly from the file where the dtypes agree, otherwise PIECE numbers at a time."""
        spec = self.specs[name]
        dtype = element_type(spec.dtype)
        assert dtype is not None, f"{name}: the audit refuses {spec.dtype}"
        if dtype == into.dtype and into.device.type == "cpu":
            self._read_bytes(spec, into, start * dtype.itemsize)
            return
        for begin in range(0, len(into), PIECE):
            part = into[begin : begin + PIECE]
            scratch = torch.empty(len(part), dtype=dtype)
            self._read_bytes(spec, scratch, (start + begin) * dtype.itemsize)
            part.copy_(scratch)

    @staticmethod
    def _read_bytes(spec: Spec, into: Tensor, skip: int = 0) -> None:
        """Fills a contiguous tensor with the bytes of a stored one, from byte `skip`."""
        view = memoryview(into.detach().reshape(-1).view(torch.uint8).numpy())  # type: ignore[arg-type]
        with io.FileIO(str(spec.file)) as file:  # a separate handle, so that several threads may read
            file.seek(spec.start + skip)
            done = 0
            while done < len(view):
                count = file.readinto(view[done:])
                if not count:
                    raise UserError("weights", str(spec.file), "the file ends early", "Download it again.")
                done += count

    def by_file(self) -> Iterator[str]:
        """Yields all names file by file, front to back, so that each file is read sequentially."""
        order = {file: number for number, file in enumerate(self.files)}
        yield from sorted(self.specs, key=lambda n: (order[self.specs[n].file], self.specs[n].start))


def _check(file: Path) -> None:
    """Has the safetensors library check a file: its header, its length, and that the tensors cover it exactly."""
    try:
        if is_pointer(file):
            problem = "a Git LFS pointer, not the file itself"
            raise UserError("weights", str(file), problem, "Run `git lfs pull` in the folder.")
        with safe_open(file, framework="pt"):
            pass
    except FileNotFoundError:
        raise UserError("weights", str(file), "the file is missing", "Download it again.") from None
    except PermissionError as error:
        problem = f"cannot be read ({error.strerror or error})"
        raise UserError("weights", str(file), problem, "Check the file's permissions.") from None
    except (SafetensorError, OSError) as error:
        raise UserError(
            "weights", str(file), f"not a complete safetensors file ({error})", "Download it again."
        ) from None


def _read_index(path: Path) -> dict[str, str]:
    try:
        found = json.loads(path.read_text(encoding="utf-8"))["weight_map"]
        assert found and all(isinstance(v, str) and Path(v).name == v for v in found.values())
    except (ValueError, KeyError, TypeError, AttributeError, AssertionError):
        problem = "not an index: it must map tensor names to file names in this folder"
        raise UserError(INDEX, str(path), problem, "Download it again.") from None
    return dict(found)


def _refuse(folder: Path) -> NoReturn:
    """Raises the UserError for a folder without weights that finback reads."""
    if pickles := sorted(p for kind in ("bin", "pt", "pth") for p in folder.glob(f"*.{kind}")):
        remedy = "Use the model's .safetensors files, or convert this file if you trust it."
        raise UserError("weights", str(pickles[0]), "a pickle, which can run arbitrary code when opened", remedy)
    raise UserError("weights", str(folder), "no .safetensors file there", "Download the weights into the folder.")


def element_type(dtype: str) -> torch.dtype | None:
    """Returns torch's dtype for safetensors' name of it; None for dtypes in which no weights or tables are stored."""
    plain = {E8M0: torch.float8_e8m0fnu}
    plain |= {"F64": torch.float64, "F32": torch.float32, "F16": torch.float16, "BF16": torch.bfloat16}
    return (
        plain
        | {"F8_E4M3": torch.float8_e4m3fn, "I64": torch.int64, "I32": torch.int32, "I8": torch.int8, "U8": torch.uint8}
    ).get(dtype)
