"""gpt-oss's experts in files: one stack per layer, with gate and up interleaved, transposed or in MXFP4 blocks of rows.

    experts.gate_up_proj (e, d, 2m), .down_proj (e, m, d)       biases: `_bias` (e, 2m) and (e, d)
    experts.gate_up_proj_blocks (e, 2m, d / 32, 16), .down_proj_blocks (e, d, m / 32, 16)  two numbers a byte; `_scales`

e experts, d hidden_size, m moe_intermediate_size. Reading splits stacks into each expert's matrices under the name
table's names; writing joins them.
"""

import re
from collections.abc import Iterator
from typing import Any

import torch
from torch import Tensor

from finback.checkpoint.shards import WIDTHS, Shards, Spec, Weights
from finback.config import UserError
from finback.kernels.formats import MXFP4, MXFP4_BLOCK, Format

_STACK = re.compile(r"(.*\.experts)\.(gate_up_proj|down_proj)(_bias|_blocks|)")
_ONE = re.compile(r"(.*\.experts)\.(\d+)\.(gate|up|down)_proj\.(weight|bias)")


class StackedExperts(Weights):
    """A folder's tensors with each expert's matrices separate. `read` dequantizes MXFP4 to fp32; `packed` does not."""

    def __init__(self, shards: Shards, quantization: dict[str, Any] | None) -> None:
        if (quantization or {}).get("quant_method", "mxfp4") != "mxfp4":
            problem = "finback reads this family in bf16 and mxfp4"
            raise UserError("config.json quantization_config", quantization, problem, "Use weights in one of these.")
        self.shards, self.specs = shards, dict[str, Spec]()
        for name, spec in shards.specs.items():
            stack = _STACK.fullmatch(name)
            if stack is not None and spec.dtype in WIDTHS:
                self.specs |= dict(self._experts(stack, spec))
            elif not name.endswith("_proj_scales"):
                self.specs[name] = spec

    def _experts(self, stack: re.Match[str], spec: Spec) -> Iterator[tuple[str, Spec]]:
        """Yields each expert's parts of a stack; the start of a part is that of its expert's entry."""
        kind = "bias" if stack[3] == "_bias" else "weight"
        parts = ("gate", "up") if stack[2] == "gate_up_proj" else ("down",)
        shape = spec.shape[1:]
        dtype = spec.dtype
        if stack[3] == "_blocks":
            shape, dtype = (shape[0], shape[1] * MXFP4_BLOCK), "F32"
        elif not stack[3]:
            shape = (shape[1], shape[0])
        shape = (shape[0] // len(parts), *shape[1:])
        for expert in range(spec.shape[0]):
            start = self._row(spec, expert).start
            for part in parts:
                yield f"{stack[1]}.{expert}.{part}_proj.{kind}", Spec(dtype, shape, spec.file, start)

    @staticmethod
    def _row(spec: Spec, index: int) -> Spec:
        """Returns the spec of one entry along the first dimension of a stored tensor."""
        shape = spec.shape[1:]
        size = WIDTHS[spec.dtype] * torch.Size(shape).numel()
        return Spec(spec.dtype, shape, spec.file, spec.start + index * size)

    def by_file(self) -> Iterator[str]:
        order = {file: number for number, file in enumerate(self.shards.files)}
        yield from sorted(self.specs, key=lambda n: (order[self.specs[n].file], self.specs[n].start))

    def read(self, name: str) -> Tensor:
        one = _ONE.fullmatch(name)
        if one is None:
            return self.shards.read(name)
        if (packed := self.packed(name)) is not None:
            return MXFP4.dequantize(packed[1], packed[2], torch.float32)
        if one[4] == "bias":
            return self._part(one, self._stored("_bias", one)).contiguous()
        return self._part(one, self._stored("", one).T).contiguous()

    def packed(self, name: str) -> tuple[Format, Tensor, Tensor] | None:
        one = _ONE.fullmatch(name)
        if one is None or one[4] == "bias":
            return None
        if f"{_stack_of(one)}_blocks" not in self.shards.specs:
            return None
        values, scales = (self._part(one, self._stored(ending, one)) for ending in ("_blocks", "_scales"))
        return MXFP4, values.flatten(1), scales.contiguous()

    def _stored(self, ending: str, one: re.Match[str]) -> Tensor:
        """Reads an expert's entry of the stack with this ending."""
        return self.shards.read_spec(self._row(self.shards.specs[_stack_of(one) + ending], int(one[2])))

    @staticmethod
    def _part(one: re.Match[str], rows: Tensor) -> Tensor:
        """Picks the requested one of interleaved gate and up rows; down is returned whole."""
        return rows if one[3] == "down" else rows[int(one[3] == "up") :: 2]


def _stack_of(one: re.Match[str]) -> str:
    """Returns the name of the stack that holds an expert's matrix or bias, without its ending."""
    return f"{one[1]}.{'down' if one[3] == 'down' else 'gate_up'}_proj"


def interleaved(rows: Tensor, dim: int = 0) -> Tensor:
    """Interleaves [gate | up] rows along a dimension: gate, up, gate, up, ..."""
    return torch.stack(rows.chunk(2, dim=dim), dim=dim + 1).flatten(dim, dim + 1)


def parted(rows: Tensor, dim: int = 0) -> Tensor:
    """Inverts `interleaved`."""
    return rows.unflatten(dim, (-1, 2)).transpose(dim, dim + 1).flatten(dim, dim + 1)


def stack_names(stem: str, experts: int) -> dict[str, tuple[str, ...]]:
    """Maps each stack of a layer's experts to the names of its parts, in the table's order."""
    parts = {"gate_up_proj": ("gate", "up"), "down_proj": ("down",)}
    return {
        f"{stem}.{stack}{ending}": tuple(
            f"{stem}.{e}.{part}_proj.{kind}" for e in range(experts) for part in parts[stack]
        )
        for ending, kind in (("_bias", "bias"), ("", "weight"))
        for stack in parts
    }


def stacked(name: str, parts: list[Tensor], experts: int) -> Tensor:
    """Joins parts into the stack of this name."""
    rows = torch.stack(parts).unflatten(0, (experts, -1)).flatten(1, 2)
    if "gate_up_proj" in name:
        rows = interleaved(rows, 1)
    return rows if name.endswith("_bias") else rows.transpose(1, 2).contiguous()
