"""Reads GGUF files: metadata as a config.json, tensors under Hugging Face's names.

The gguf library dequantizes tensors, one at a time. Beyond names two things differ: Llama's query and key
rows are stored for interleaved rotation, and Llama 3's frequency scaling is a tensor instead of a setting.
"""

import re
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from finback.checkpoint.gguf_config import ROTATIONS, raw_config
from finback.checkpoint.gguf_keys import field
from finback.checkpoint.gguf_names import PAIRED, StoredPart, pieces
from finback.checkpoint.places import is_pointer
from finback.checkpoint.shards import Spec, Weights
from finback.config import UserError
from finback.extras import how_to_install
from finback.kernels import quants
from finback.kernels.formats import Format
from finback.kernels.quants import KINDS


def open_gguf(path: Path) -> Any:
    """Returns a gguf.GGUFReader; UserError when the library is missing or the file is not GGUF."""
    try:
        import gguf
    except ImportError:
        raise UserError(
            "model", str(path), "reading GGUF needs the gguf package", how_to_install("gguf>=0.17")
        ) from None
    if not path.is_file():
        raise UserError("model", str(path), "no such file", "Name a .gguf file.")
    try:
        if is_pointer(path):
            problem = "a Git LFS pointer, not the file itself"
            raise UserError("model", str(path), problem, "Run `git lfs pull` in its folder.")
        return gguf.GGUFReader(path)
    except UserError:
        raise
    except PermissionError as error:
        problem = f"cannot be read ({error.strerror})"
        raise UserError("model", str(path), problem, "Check the file's permissions.") from None
    except Exception as error:  # the library raises whatever numpy raises on a short file
        raise UserError("model", str(path), f"not a whole GGUF file ({error})", "Download it again.") from None


def open_parts(path: Path) -> list[Any]:
    """Returns readers of all parts of a model; UserError unless the path is a split model's first part."""
    first = open_gguf(path)
    count = int(field(first, "split.count", 1))
    if count <= 1:
        return [first]
    stem = re.fullmatch(r"(.*)-\d{5}-of-\d{5}", path.stem)
    parts = [
        path.with_name(f"{stem[1] if stem else path.stem}-{n:05}-of-{count:05}{path.suffix}")
        for n in range(1, count + 1)
    ]
    if path != parts[0]:
        problem = f"part {int(field(first, 'split.no', 0)) + 1} of {count}"
        raise UserError(
            "model", str(path), problem, f"Name the first one, as it was called when it was split: {parts[0].name}"
        )
    readers = [first, *map(open_gguf, parts[1:])]
    found, wanted = sum(len(reader.tensors) for reader in readers), field(first, "split.tensors.count", None)
    if wanted is not None and found != wanted:
        problem = f"{count} parts with {found} tensors, where the first says {wanted}"
        raise UserError("model", str(path), problem, "Download all parts again.")
    return readers


class GGUF(Weights):
    """A GGUF file, whose tensors are dequantized when read; `raw` is the equivalent config.json."""

    def __init__(self, path: Path) -> None:
        self.path = path
        readers = open_parts(path)
        self.stored = {t.name: t for reader in readers for t in reader.tensors}
        self.raw = raw_config(readers[0], self.stored, path)
        shapes = {name: tuple(int(n) for n in reversed(t.shape)) for name, t in self.stored.items()}
        shapes = {name: shape for name, shape in shapes.items() if name not in ROTATIONS}
        self.pieces = dict(pieces(shapes, self.raw))
        self.specs = {name: Spec("F32", piece.shape, path) for name, piece in self.pieces.items()}
        self.kinds = sorted({t.tensor_type.name for t in self.stored.values()})

    def read(self, name: str) -> Tensor:
        """Returns one tensor, dequantized to fp32."""
        piece = self.pieces[name]
        if self.raw["model_type"] == "gemma3_text" and name.endswith("norm.weight"):
            return self._dequantized(piece.stored) - 1  # GGUF stores gains, this family gains minus 1
        if piece.values:  # keys' part (heads, rank, n) and values' part (heads, v, rank)
            keys, values = self._dequantized(piece.stored), self._dequantized(piece.values)
            return torch.cat([keys.transpose(1, 2), values], dim=1).flatten(0, 1)
        return self._in_order(name, self._dequantized(piece.stored, piece))

    def packed(self, name: str) -> tuple[Format, Tensor, Tensor] | None:
        """Returns a matrix's stored bytes and format; None if it is not quantized, or its rows are rearranged."""
        piece = self.pieces[name]
        tensor = self.stored[piece.stored]
        kind = KINDS.get(tensor.tensor_type.name)
        if kind is None or piece.values or len(piece.shape) != 2:
            return None
        rows = self._in_order(name, torch.from_numpy(piece.of(tensor.data).copy()))
        return quants.blocks(piece.shape[1], ((kind, len(rows)),)), rows.flatten(), rows.new_empty(0)

    def _in_order(self, name: str, rows: Tensor) -> Tensor:
        """Returns rows, or their bytes, in Hugging Face's order."""
        if self.raw["model_type"] in PAIRED and ("q_proj." in name or "k_proj." in name):
            heads = self.raw["num_attention_heads" if "q_proj" in name else "num_key_value_heads"]
            # the file has neighbouring pairs; restore [first halves | second halves]
            return rows.unflatten(0, (heads, -1, 2)).transpose(1, 2).reshape(rows.shape)
        return rows

    def _dequantized(self, name: str, piece: StoredPart | None = None) -> Tensor:
        """Dequantizes a stored tensor, or a part of it."""
        tensor = self.stored[name]
        data = tensor.data if piece is None else piece.of(tensor.data)
        try:
            return quants.numbers(tensor.tensor_type, data)
        except NotImplementedError:
            kind = tensor.tensor_type.name
            raise UserError(
                name, str(self.path), f"{kind}, which the gguf library does not dequantize", "Use another quantization."
            ) from None
