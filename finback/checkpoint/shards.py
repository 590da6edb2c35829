"""The tensors of a Hugging Face folder: found through its index or in its one file, read one at a time.

A shard is mapped only while it is read, so memory holds the model and at most a shard beside it.
"""

import json
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Protocol

import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor

from finback.config import UserError

INDEX, SINGLE = "model.safetensors.index.json", "model.safetensors"
BESIDE = "model-mtp.safetensors"  # MTP layers of exports whose layer number transformers does not ignore
SCALE = "_scale_inv"  # an FP8 tensor's factors carry its name and this ending


@dataclass(frozen=True)
class Spec:
    """What a file says of a tensor: safetensors' word for its dtype, its shape, its file."""

    dtype: str
    shape: tuple[int, ...]
    file: Path

    @property
    def bytes(self) -> int:
        size = _BYTES.get(self.dtype, 1)
        for n in self.shape:
            size *= n
        return size


_BYTES = {"F64": 8, "I64": 8, "F32": 4, "I32": 4, "BF16": 2, "F16": 2, "I16": 2}


class Weights(Protocol):
    """Tensors under Hugging Face's names, wherever they come from: Shards, or a GGUF file."""

    @property
    def specs(self) -> dict[str, Spec]: ...

    def read(self, name: str) -> Tensor: ...

    def scale(self, name: str) -> Tensor | None: ...

    def by_file(self) -> Iterator[str]: ...

    def close(self) -> None: ...


class Shards:
    """All tensors of a folder by name. Opening it reads every header, so a torn file is found before anything loads."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self.specs: dict[str, Spec] = {}
        indexed: dict[str, str] | None = None
        if (folder / INDEX).is_file():
            indexed = _read_index(folder / INDEX)
            files = [folder / name for name in sorted(set(indexed.values()))]
        else:
            files = [folder / SINGLE] if (folder / SINGLE).is_file() else sorted(folder.glob("*.safetensors"))
        if not files:
            raise _nothing(folder)
        if (folder / BESIDE).is_file() and folder / BESIDE not in files:
            files.append(folder / BESIDE)
        self.files = files
        for file in files:
            self._read_header(file)
        lost = sorted(set(indexed or ()) - set(self.specs))
        if lost:
            raise UserError(
                INDEX, str(folder), f"names {len(lost)} tensors that its files lack, {lost[0]} first",
                "Download the folder again.",
            )  # fmt: skip
        self._open: tuple[Path, Any] | None = None

    def _read_header(self, file: Path) -> None:
        with _opened(file) as handle:
            for name in handle.keys():  # noqa: SIM118 - not a dict
                if name in self.specs:
                    raise UserError(
                        "weights", str(file), f"{name} is in {self.specs[name].file.name} too", "Keep one of them."
                    )  # fmt: skip
                part = handle.get_slice(name)
                self.specs[name] = Spec(part.get_dtype(), tuple(part.get_shape()), file)

    def read(self, name: str) -> Tensor:
        """One tensor, mapped from its file."""
        file = self.specs[name].file
        if self._open is None or self._open[0] != file:
            self.close()
            self._open = file, _opened(file).__enter__()
        return self._open[1].get_tensor(name)

    def by_file(self) -> Iterator[str]:
        """All names, file after file, so that each file is opened once."""
        for file in self.files:
            yield from (name for name, spec in self.specs.items() if spec.file == file)

    def scale(self, name: str) -> Tensor | None:
        """The factors of an FP8 tensor, which may lie in another file; None for a plain tensor."""
        if name + SCALE not in self.specs:
            return None
        spec = self.specs[name + SCALE]
        if self._open is not None and self._open[0] == spec.file:
            return self.read(name + SCALE).float()
        with _opened(spec.file) as handle:
            return handle.get_tensor(name + SCALE).float()

    def close(self) -> None:
        """Let go of the file that is mapped."""
        if self._open is not None:
            self._open[1].__exit__(None, None, None)
            self._open = None


def _opened(file: Path) -> Any:
    try:
        return safe_open(file, framework="pt")
    except FileNotFoundError:
        raise UserError("weights", str(file), "the file is missing", "Download it again.") from None
    except (SafetensorError, OSError) as error:
        raise UserError(
            "weights", str(file), f"not a whole safetensors file ({error})", "Download it again."
        ) from None


def _read_index(path: Path) -> dict[str, str]:
    try:
        found = json.loads(path.read_text(encoding="utf-8"))["weight_map"]
        assert all(isinstance(v, str) and Path(v).name == v for v in found.values())
    except (ValueError, KeyError, TypeError, AttributeError, AssertionError):
        raise UserError(
            INDEX, str(path), "not an index: it must map tensor names to file names in this folder",
            "Download it again.",
        ) from None  # fmt: skip
    return dict(found)


def _nothing(folder: Path) -> UserError:
    """Why a folder has no weights that finback reads."""
    if pickles := sorted(
        p.name for p in (*folder.glob("*.bin"), *folder.glob("*.pt"), *folder.glob("*.pth"))
    ):
        return UserError(
            "weights", str(folder / pickles[0]), "a pickle, which can run any program when it is opened",
            "Use the .safetensors files of the same model, or convert it where you trust it.",
        )  # fmt: skip
    return UserError(
        "weights", str(folder), "no .safetensors file there", "Download the weights into the folder."
    )


def element_type(dtype: str) -> torch.dtype | None:
    """torch's dtype for safetensors' word, None for what no weight is kept in."""
    return {
        "F32": torch.float32, "BF16": torch.bfloat16, "F16": torch.float16, "F8_E4M3": torch.float8_e4m3fn,
        "F64": torch.float64,
    }.get(dtype)  # fmt: skip
