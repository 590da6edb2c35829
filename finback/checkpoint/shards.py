"""The tensors of a Hugging Face folder: found through its index or in its one file, read one at a time.

Values are read straight into the model where dtypes agree. Mapped files would be copied through page faults, which
took several times as long (docs/log.md), and would count as memory.
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
BESIDE = "model-mtp.safetensors"  # MTP layers of exports whose layer number transformers does not ignore
ALL_BESIDE = "model-mtp*.safetensors"  # many ranks write several
PIECE = 1 << 20  # numbers that are converted at a time
E8M0 = "F8_E8M0"  # powers of two, of factors alone
SCALE = "_scale_inv"  # an FP8 tensor's factors carry its name and this ending


@dataclass(frozen=True)
class Spec:
    """What a file says of a tensor: safetensors' word for its dtype, its shape, its file and where it starts there."""

    dtype: str
    shape: tuple[int, ...]
    file: Path
    start: int = 0


class Weights(Protocol):
    """Tensors under Hugging Face's names, wherever they come from: Shards, or a GGUF file."""

    specs: dict[str, Spec]

    def read(self, name: str) -> Tensor:
        """One tensor as it is stored."""
        ...

    def read_into(self, name: str, into: Tensor) -> None:
        """One tensor's values into a contiguous tensor of its shape."""
        into.copy_(self.read(name))

    def read_range(self, name: str, start: int, into: Tensor) -> None:
        """The numbers of one tensor from number `start` on, counted row by row, into a flat tensor."""
        into.copy_(self.read(name).flatten()[start : start + len(into)])

    def scale(self, name: str) -> Tensor | None:
        """The factors of an FP8 tensor; None for a plain tensor."""
        return self.read(name + SCALE).float() if name + SCALE in self.specs else None

    def packed(self, name: str) -> tuple[Format, Tensor, Tensor] | None:
        """Values and factors of a matrix in one of our formats, exactly as they are stored; None where it is in none."""
        return None

    def by_file(self) -> Iterator[str]:
        """All names, in the order in which they are read fastest."""
        yield from self.specs


class Shards(Weights):
    """All tensors of a folder, or of one file, by name. Opening it reads every header, so a torn file is found before anything loads."""

    def __init__(self, folder: Path) -> None:
        self.specs: dict[str, Spec] = {}
        # a single file counts before an index, whichever is newer, as in transformers
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
            problem = f"names {len(lost)} tensors that its files lack, {lost[0]} first"
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
        """The tensor that a spec is of, whatever it is called."""
        dtype = element_type(spec.dtype)
        assert dtype is not None, f"the audit lets no {spec.dtype} pass"
        tensor = torch.empty(spec.shape, dtype=dtype)
        self._read_bytes(spec, tensor)
        return tensor

    def read_into(self, name: str, into: Tensor) -> None:
        """Straight from the file where the dtypes agree."""
        spec = self.specs[name]
        if element_type(spec.dtype) == into.dtype:
            self._read_bytes(spec, into)
        else:
            super().read_into(name, into)

    def read_range(self, name: str, start: int, into: Tensor) -> None:
        """Straight from the file where the dtypes agree, else PIECE numbers at a time."""
        spec = self.specs[name]
        dtype = element_type(spec.dtype)
        assert dtype is not None, f"{name}: the audit lets no {spec.dtype} pass"
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
        """Fill a contiguous tensor with the bytes of a stored one from byte `skip` on."""
        view = memoryview(into.detach().reshape(-1).view(torch.uint8).numpy())  # type: ignore[arg-type]
        with io.FileIO(str(spec.file)) as file:  # one of its own, so that several threads may read
            file.seek(spec.start + skip)
            done = 0
            while done < len(view):
                count = file.readinto(view[done:])
                if not count:
                    raise UserError("weights", str(spec.file), "the file ends early", "Download it again.")
                done += count

    def by_file(self) -> Iterator[str]:
        """All names, file after file and from front to back, so that each file is read in one go."""
        order = {file: number for number, file in enumerate(self.files)}
        yield from sorted(self.specs, key=lambda n: (order[self.specs[n].file], self.specs[n].start))


def _check(file: Path) -> None:
    """Let the safetensors library judge a file: its header, its length, and that the tensors cover it exactly."""
    try:
        if is_pointer(file):
            problem = "git's pointer to the file, not the file"
            raise UserError("weights", str(file), problem, "Run `git lfs pull` in the folder.")
        with safe_open(file, framework="pt"):
            pass
    except FileNotFoundError:
        raise UserError("weights", str(file), "the file is missing", "Download it again.") from None
    except PermissionError as error:
        problem = f"cannot be read ({error.strerror or error})"
        raise UserError("weights", str(file), problem, "Give yourself the right to read it.") from None
    except (SafetensorError, OSError) as error:
        raise UserError("weights", str(file), f"not a whole safetensors file ({error})", "Download it again.") from None


def _read_index(path: Path) -> dict[str, str]:
    try:
        found = json.loads(path.read_text(encoding="utf-8"))["weight_map"]
        assert found and all(isinstance(v, str) and Path(v).name == v for v in found.values())
    except (ValueError, KeyError, TypeError, AttributeError, AssertionError):
        problem = "not an index: it must map tensor names to file names in this folder"
        raise UserError(INDEX, str(path), problem, "Download it again.") from None
    return dict(found)


def _refuse(folder: Path) -> NoReturn:
    """The UserError of a folder that has no weights that finback reads."""
    if pickles := sorted(p for kind in ("bin", "pt", "pth") for p in folder.glob(f"*.{kind}")):
        remedy = "Use the .safetensors files of the same model, or convert it where you trust it."
        raise UserError("weights", str(pickles[0]), "a pickle, which can run any program when it is opened", remedy)
    raise UserError("weights", str(folder), "no .safetensors file there", "Download the weights into the folder.")


def element_type(dtype: str) -> torch.dtype | None:
    """torch's dtype for safetensors' word, None for what neither weights, packed or not, nor tables are kept in."""
    plain = {E8M0: torch.float8_e8m0fnu}
    plain |= {"F64": torch.float64, "F32": torch.float32, "F16": torch.float16, "BF16": torch.bfloat16}
    return (
        plain
        | {"F8_E4M3": torch.float8_e4m3fn, "I64": torch.int64, "I32": torch.int32, "I8": torch.int8, "U8": torch.uint8}
    ).get(dtype)
