"""Products with matrices that stay quantized as in a GGUF file, in blocks of low-bit numbers with factors, by quants.cpp.

Activations are quantized to 8 bits with a factor per GROUP numbers, as in llama.cpp. A row's result does not depend on the
other rows of the batch, to the bit: sums within a block are integers, and blocks are summed in a fixed order. So a prompt
gives the same result at once, in chunks or token by token. Twin: reference.quantized_product.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from functools import cache, partial
from typing import Any

import torch
from torch import Tensor, nn

from finback.kernels import native
from finback.kernels.formats import Format

GROUP = 32  # columns of activations that share a factor
PANEL = 16  # rows that are interleaved in memory


@dataclass(frozen=True)
class Kind:
    """A kind of block, by ggml's name and number: it stores `columns` numbers of a row in `bytes` bytes."""

    name: str
    number: int
    columns: int
    bytes: int

    def row_bytes(self, columns: int) -> int:
        """Bytes of a row of `columns` numbers."""
        return columns // self.columns * self.bytes


_KINDS = (
    *(Kind("Q4_0", 2, 32, 18), Kind("Q4_1", 3, 32, 20), Kind("Q5_0", 6, 32, 22), Kind("Q5_1", 7, 32, 24)),
    *(Kind("Q8_0", 8, 32, 34), Kind("Q4_K", 12, 256, 144), Kind("Q5_K", 13, 256, 176), Kind("Q6_K", 14, 256, 210)),
    *(Kind("IQ4_NL", 20, 32, 18), Kind("MXFP4", 39, 32, 17)),
)
KINDS = {kind.name: kind for kind in _KINDS}


@dataclass(frozen=True)
class Blocks(Format):
    """Stacked matrices, each of one kind. Values (..., bytes) are the bytes of all rows and contain the factors."""

    columns: int
    # kind and rows of each matrix
    parts: tuple[tuple[Kind, int], ...]

    @property
    def rows(self) -> int:
        """Rows of all matrices together."""
        return sum(rows for _, rows in self.parts)


def blocks(columns: int, parts: tuple[tuple[Kind, int], ...]) -> Blocks:
    """The format of stacked matrices with these kinds and rows."""
    return Blocks("gguf", _only_read, partial(_dequantize, columns, parts), columns, parts)


def _only_read(weight: Tensor) -> tuple[Tensor, Tensor]:
    raise NotImplementedError("this format is only read; gguf_types.packed builds its blocks")


def _dequantize(
    columns: int, parts: tuple[tuple[Kind, int], ...], values: Tensor, factors: Tensor, dtype: torch.dtype
) -> Tensor:
    sizes = [rows * kind.row_bytes(columns) for kind, rows in parts]
    found = []
    for (kind, rows), part in zip(parts, values.detach().cpu().split(sizes, dim=-1), strict=True):
        found.append(numbers(kind.number, part.unflatten(-1, (rows, -1)).contiguous().numpy()))
    return torch.cat(found, dim=-2).to(values.device, dtype)


def numbers(number: int, stored: Any) -> Tensor:
    """Dequantizes a numpy array of ggml's type `number`: blocks (..., bytes) -> (..., columns) in fp32.

    NotImplementedError for a type that the gguf library does not dequantize.
    """
    from gguf import GGMLQuantizationType, quants

    return torch.from_numpy(quants.dequantize(stored, GGMLQuantizationType(number)).copy())


def available() -> bool:
    """Whether the C++ kernels are available on this machine."""
    return native.library() is not None


@cache
def forms() -> tuple[str, ...]:
    """The instruction sets that the kernels can use on this processor, the fastest last."""
    has = torch.zeros(3, dtype=torch.long)
    native.call("quant_forms", has)
    return tuple(name for name, there in zip(("plain", "avx2", "avx512"), has.tolist(), strict=True) if there)


class BlockLinear(nn.Module):
    """y = W x (+ b) for stacked matrices that stay quantized as in a GGUF file; for inference only, fp32 or bf16."""

    def __init__(
        self, formats: Sequence[Blocks], values: Sequence[Tensor], biases: Sequence[Tensor | None], form: str = ""
    ) -> None:
        super().__init__()
        given = [bias for bias in biases if bias is not None]
        assert len(given) in (0, len(formats)), "either all maps of a stack have a bias or none has"
        self.bias = torch.cat(given).detach() if given else None
        self.columns, self.outputs = formats[0].columns, [form.rows for form in formats]
        self.height = sum(self.outputs)
        self.form = ("plain", "avx2", "avx512").index(form or forms()[-1])
        pieces, self.parts, begin = [], [], 0
        for each, stored in zip(formats, values, strict=True):
            pieces.append(_panels(each, stored))
            for kind, rows in each.parts:
                self.parts.append((kind.number, begin, rows))
                begin += _panel_rows(rows) * kind.row_bytes(self.columns)
        self.weight = nn.Parameter(torch.cat(pieces) if len(pieces) > 1 else pieces[0], requires_grad=False)
        self.table = torch.tensor(self.parts)

    def forward(self, x: Tensor) -> Tensor:
        """x (..., in) -> (..., sum of outputs), in x's dtype."""
        x = x.contiguous()
        y = x.new_empty(*x.shape[:-1], self.height)
        rows = x.numel() // self.columns
        native.call(
            "quant_product",
            *(self.form, x.dtype == torch.bfloat16, x, *self.matrices, y),
            *(rows, self.columns, self.height),
        )
        return y if self.bias is None else y + self.bias.to(y.dtype)

    @property
    def matrices(self) -> tuple[Tensor, Tensor, int]:
        """The arguments by which kernels take the matrices: bytes, table of parts, number of parts."""
        return self._parameters["weight"], self.table, len(self.parts)  # type: ignore[return-value]

    def rows(self, index: Tensor, dtype: torch.dtype) -> Tensor:
        """Dequantized rows of the first matrix: index (...) -> (..., in)."""
        kind, begin, _ = self.parts[0]
        out = torch.empty(*index.shape, self.columns, dtype=dtype)
        index = index.contiguous()
        native.call(
            "quant_rows", dtype == torch.bfloat16, kind, self.weight[begin:], index, out, index.numel(), self.columns
        )
        return out


def feed_forward(x: Tensor, gate_up: BlockLinear, down: BlockLinear) -> Tensor:
    """down(SiLU(gate x) ⊙ up x) for x (..., in) -> (..., out), in one call, with fp32 between the products."""
    x = x.contiguous()
    y = x.new_empty(*x.shape[:-1], down.height)
    native.call(
        "quant_feed_forward",
        *(gate_up.form, x.dtype == torch.bfloat16, x, *gate_up.matrices, *down.matrices, y),
        *(x.numel() // gate_up.columns, gate_up.columns, down.columns, down.height),
    )
    return y


def _panel_rows(rows: int) -> int:
    """Rows rounded up to whole panels."""
    return -(-rows // PANEL) * PANEL


def _panels(form: Blocks, values: Tensor) -> Tensor:
    """The bytes of `values` in the order in which the kernels read them, the last panel padded with zeros."""
    sizes = [rows * kind.row_bytes(form.columns) for kind, rows in form.parts]
    found = []
    for (kind, rows), part in zip(form.parts, values.detach().split(sizes), strict=True):
        laid = torch.empty(_panel_rows(rows) * kind.row_bytes(form.columns), dtype=torch.uint8)
        native.call("quant_pack", kind.number, part.contiguous(), laid, rows, form.columns)
        found.append(laid)
    return torch.cat(found) if len(found) > 1 else found[0]
