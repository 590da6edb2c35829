"""Folders packed by AWQ, GPTQ, compressed-tensors or bitsandbytes: unpacks the tensors into the matrices they encode.

docs/guides/open-checkpoints.md lists what each tool writes; `quantization_config` names the tool. A matrix without
packed parts is read as it is, whatever exceptions the config lists.
"""

import json
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from finback.checkpoint.shards import SCALE, Shards, Spec, Weights
from finback.checkpoint.stored_names import parts_of
from finback.config import UserError
from finback.kernels import packings
from finback.kernels.formats import (
    INT4,
    INT8,
    MXFP4,
    MXFP4_BLOCK,
    NF4,
    NF4_BLOCK,
    NF4_LEVELS,
    Format,
    e2m1,
    powers_of_two,
)
from finback.kernels.packings import Grouped
from finback.model.config import ModelConfig

METHODS = ("awq", "gptq", "compressed-tensors", "bitsandbytes")
# the tensors of a packed matrix, by their names after the layer's
_PARTS = {
    "awq": ("qweight", "qzeros", "scales"),
    "gptq": ("qweight", "qzeros", "scales", "g_idx"),
    "compressed-tensors": (
        *("weight_packed", "weight", "weight_scale", "weight_zero_point", "weight_shape", "weight_g_idx"),
        *("weight_global_scale", "input_scale", "input_zero_point", "input_global_scale", "output_scale"),
    ),
    "bitsandbytes": (
        *("weight", "weight.absmax", "weight.quant_map", "weight.nested_absmax", "weight.nested_quant_map"),
        *("weight.quant_state.bitsandbytes__nf4", "weight.quant_state.bitsandbytes__fp4", "SCB", "weight_format"),
    ),
    "fp8": ("weight", "scale"),  # V4's experts, which are FP4
}
_MARKS = {  # a layer with one of these tensors is packed
    "awq": ("qweight",),
    "gptq": ("qweight",),
    "compressed-tensors": ("weight_scale",),
    "bitsandbytes": ("weight.absmax", "SCB"),
    "fp8": ("scale",),
}
Parts = dict[str, Tensor]


@dataclass(frozen=True)
class _Layer:
    """A packed matrix: its shape and the specs of its parts; `rows` selects one of several fused matrices."""

    shape: tuple[int, int]
    parts: dict[str, Spec]
    rows: slice


@dataclass(frozen=True)
class Mxfp4:
    """A matrix in MXFP4, packed as by formats.mxfp4."""

    values: Tensor
    scale: Tensor


class PackedShards(Weights):
    """A folder's tensors; `read` dequantizes packed ones to fp32, `packed` returns them as stored."""

    def __init__(self, shards: Shards, quantization: dict[str, Any], config: ModelConfig) -> None:
        self.shards, self.settings = shards, quantization
        self.method = str(quantization["quant_method"])
        self.layers: dict[str, _Layer] = {}
        self.specs: dict[str, Spec] = dict(shards.specs)
        for stem in sorted(self._stems()):
            endings = [part for part in _PARTS[self.method] if f"{stem}.{part}" in shards.specs]
            parts = {part: shards.specs[f"{stem}.{part}"] for part in endings}
            for part in parts:
                del self.specs[f"{stem}.{part}"]
            shape = self._shape(stem, parts)
            main = min(parts.values(), key=lambda spec: (spec.file, spec.start))
            start = 0
            for name, spec in parts_of(f"{stem}.weight", Spec("F32", shape, main.file, main.start), config):
                rows = slice(start, start := start + spec.shape[0])
                self.layers[name], self.specs[name] = _Layer(shape, parts, rows), spec
        if not self.layers:
            problem = f"no tensor in the files is packed by {self.method}"
            raise UserError(
                "config.json quantization_config", self.method, problem, "Remove it if the weights are not quantized."
            )

    def _stems(self) -> set[str]:
        marks = tuple(f".{mark}" for mark in _MARKS[self.method])
        return {name.removesuffix(mark) for name in self.shards.specs for mark in marks if name.endswith(mark)}

    def note(self) -> str:
        """Returns the audit's note on the packed matrices."""
        method = MXFP4.name if self.method == "fp8" else self.method
        return f"{method}: {len(self.layers):,} matrices are packed; activations are not quantized here"

    def by_file(self) -> Iterator[str]:
        order = {file: number for number, file in enumerate(self.shards.files)}
        yield from sorted(self.specs, key=lambda n: (order[self.specs[n].file], self.specs[n].start))

    def read(self, name: str) -> Tensor:
        layer = self.layers.get(name)
        return self.shards.read(name) if layer is None else self._dequantized(layer)[layer.rows]

    def read_into(self, name: str, into: Tensor) -> None:
        if name in self.layers:
            into.copy_(self.read(name))
        else:
            self.shards.read_into(name, into)

    def read_range(self, name: str, start: int, into: Tensor) -> None:
        if name in self.layers:
            super().read_range(name, start, into)
        else:
            self.shards.read_range(name, start, into)

    def packed(self, name: str) -> tuple[Format, Tensor, Tensor] | None:
        layer = self.layers.get(name)
        kept = None if layer is None else _kept(layer.shape, self._contents(layer))
        return None if layer is None or kept is None else (kept[0], kept[1][layer.rows], kept[2][layer.rows])

    def _shape(self, stem: str, parts: dict[str, Spec]) -> tuple[int, int]:
        shape: tuple[int, ...] = ()
        if "qweight" in parts:
            words, columns = parts["qweight"].shape
            shape = (8 * columns, words) if self.method == "awq" else (columns, words * 32 // self._bits())
        elif "weight_packed" in parts:
            rows, words = parts["weight_packed"].shape
            shape = (rows, 2 * words) if parts["weight_packed"].dtype == "U8" else (rows, words * 32 // self._bits())
            if "weight_shape" in parts:
                shape = tuple(self.shards.read_spec(parts["weight_shape"]).tolist())
        elif state := next((parts[p] for p in parts if "quant_state" in p), None):
            shape = tuple(json.loads(self.shards.read_spec(state).numpy().tobytes())["shape"])
        elif "weight" in parts:
            shape = parts["weight"].shape
            if self.method == "fp8":
                shape = (shape[0], 2 * shape[1])
        if len(shape) != 2:
            raise UserError(stem, str(next(iter(parts.values())).file), "packed in an unknown layout", _REMEDY)
        return shape[0], shape[1]

    def _bits(self) -> int:
        """Returns the bits of each number; UserError unless the config names a single, supported width."""
        found = {self.settings.get("bits")}
        if self.method == "compressed-tensors":
            groups = (self.settings.get("config_groups") or {}).values()
            found = {((group or {}).get("weights") or {}).get("num_bits") for group in groups}
        bits = found.pop() if len(found) == 1 else None
        if bits not in (2, 3, 4, 5, 6, 7, 8) or (self.method == "awq" and bits != 4):
            raise _wrong(self.settings, f"{bits!r} bits")
        return int(bits)

    def _contents(self, layer: _Layer) -> Grouped | Mxfp4 | tuple[Tensor, Tensor] | Parts:
        """Decodes a matrix's parts: integers in groups, MXFP4, values and their factors, or bitsandbytes' own parts."""
        parts = {part: self.shards.read_spec(spec) for part, spec in layer.parts.items()}
        if self.method == "awq":
            return packings.awq(parts["qweight"], parts["qzeros"], parts["scales"])
        if self.method == "gptq":
            return packings.gptq(parts, self._bits(), _form(self.settings) == "gptq_v2")
        if self.method == "bitsandbytes":
            return (parts["weight"], parts["SCB"].float()[:, None] / 127) if "SCB" in parts else parts
        if self.method == "fp8":
            return Mxfp4(parts["weight"].view(torch.uint8), parts["scale"].view(torch.uint8))
        scale = parts["weight_scale"]
        if "weight_packed" not in parts:
            zero = parts.get("weight_zero_point")
            values = parts["weight"]
            if zero is not None:
                values = values.float() - packings.spread(zero.float(), layer.shape)
            return values, scale.float()
        if parts["weight_packed"].dtype == torch.uint8:
            if "weight_global_scale" in parts:  # NVFP4
                return e2m1(parts["weight_packed"]), scale.float() / parts["weight_global_scale"].float()
            return Mxfp4(parts["weight_packed"], scale.view(torch.uint8))
        return _integers(parts, layer.shape, self._bits())

    def _dequantized(self, layer: _Layer) -> Tensor:
        found = self._contents(layer)
        if isinstance(found, Grouped):
            return found.matrix()
        if isinstance(found, Mxfp4):
            return e2m1(found.values) * packings.spread(powers_of_two(found.scale), layer.shape)
        if isinstance(found, dict):
            return _bitsandbytes(found, layer.shape)
        values, scale = found
        return values.float() * packings.spread(scale, layer.shape)


def _integers(parts: Parts, shape: tuple[int, int], bits: int) -> Grouped:
    """compressed-tensors' pack-quantized: numbers and zeros are offset by 2^(bits - 1); zeros are packed along rows."""
    scale = parts["weight_scale"].float().view(shape[0], -1)
    zero = torch.full_like(scale, 1 << bits - 1)
    if (words := parts.get("weight_zero_point")) is not None:
        found = packings.unpack(words.T.contiguous(), bits).T if words.dtype == torch.int32 else words + (1 << bits - 1)
        zero = found[: shape[0]].float()
    q = packings.unpack(parts["weight_packed"], bits)[:, : shape[1]].contiguous()
    return Grouped(q, scale, zero, parts.get("weight_g_idx"))


def _bitsandbytes(parts: Parts, shape: tuple[int, int]) -> Tensor:
    """bitsandbytes' 4 bits: indices into `quant_map`, high half of a byte first, in blocks with one absmax each."""
    levels, (scale, block) = parts["weight.quant_map"].float(), _largest(parts)
    packed = parts["weight"].flatten()
    codes = torch.stack([packed >> 4, packed & 15], dim=-1).flatten()
    numbers = levels[codes.int()][: shape[0] * shape[1]]
    return (numbers * scale.repeat_interleave(block)[: len(numbers)]).view(shape)


def _largest(parts: Parts) -> tuple[Tensor, int]:
    """Returns each block's absmax, which may itself be quantized, and the block size."""
    state = next(parts[part] for part in parts if "quant_state" in part)
    says = json.loads(state.numpy().tobytes())
    absmax = parts["weight.absmax"]
    if "weight.nested_absmax" not in parts:
        return absmax.float(), int(says["blocksize"])
    nested = parts["weight.nested_quant_map"].float()[absmax.int()]
    outer = parts["weight.nested_absmax"].float().repeat_interleave(int(says["nested_blocksize"]))[: len(nested)]
    return nested * outer + float(says["nested_offset"]), int(says["blocksize"])


def _kept(
    shape: tuple[int, int], found: Grouped | Mxfp4 | tuple[Tensor, Tensor] | Parts
) -> tuple[Format, Tensor, Tensor] | None:
    rows, columns = shape
    if isinstance(found, Mxfp4):
        return None if columns % MXFP4_BLOCK else (MXFP4, found.values, found.scale)
    if isinstance(found, Grouped):
        if found.group is not None or columns % 2 or int(found.q.max()) > 15 or columns % found.scale.size(1):
            return None
        q = found.q.to(torch.uint8)
        return INT4, q[:, ::2] << 4 | q[:, 1::2], torch.stack([found.scale, found.zero], dim=-1)
    if isinstance(found, dict):
        scale, block = _largest(found)
        is_ours = torch.allclose(found["weight.quant_map"].float(), torch.tensor(NF4_LEVELS))
        if not is_ours or block != NF4_BLOCK or columns % NF4_BLOCK:
            return None
        return NF4, found["weight"].view(rows, columns // 2), scale.view(rows, -1)
    values, factors = found
    fits = values.dtype == torch.int8 and factors.numel() == rows
    return (INT8, values, factors.view(rows, 1)) if fits else None


_REMEDY = "Use its bf16 weights, DeepSeek's FP8, or one of the packings that finback reads."


def _wrong(settings: dict[str, Any], problem: str) -> UserError:
    return UserError("config.json quantization_config", settings.get("quant_method"), problem, _REMEDY)


def check(settings: dict[str, Any]) -> None:
    """Raises UserError for an unsupported packing."""
    method = settings.get("quant_method")
    if method not in METHODS:
        problem = f"finback reads fp8 with weight_block_size [128, 128], {', '.join(METHODS)}"
        raise UserError(
            "config.json quantization_config", settings, problem, "Use the bf16 or DeepSeek-FP8 weights of this model."
        )
    known = {"awq": ("gemm",), "gptq": ("gptq", "gptq_v2")}.get(method, ())
    if known and (form := _form(settings)) not in known:
        raise _wrong(settings, f"packed as {form!r}: finback reads {' and '.join(known)}")


def _form(settings: dict[str, Any]) -> str:
    """Returns the packing's layout: `version` in AWQ configs, `checkpoint_format` in GPTQ's, `format` in newer ones."""
    name, usual = {"awq": ("version", "gemm"), "gptq": ("checkpoint_format", "gptq")}[settings["quant_method"]]
    return str(settings.get(name) or settings.get("format") or usual).lower()


def factored(specs: dict[str, Spec]) -> dict[str, Spec]:
    """Renames FP8 factors in the specs of V4's release to the other families' names; FP4's factors stay `scale`."""
    return {
        f"{stem}.weight{SCALE}" if name.endswith(".scale") and _is_fp8(specs.get(f"{stem}.weight")) else name: spec
        for name, spec in specs.items()
        for stem in (name.removesuffix(".scale"),)
    }


def has_fp4(specs: dict[str, Spec]) -> bool:
    """Whether experts are stored in FP4, two numbers a byte."""
    named = (name.removesuffix(".scale") for name in specs if name.endswith(".scale"))
    return any(spec.dtype in ("I8", "U8") for name in named if (spec := specs.get(f"{name}.weight")) is not None)


def _is_fp8(spec: Spec | None) -> bool:
    return spec is not None and spec.dtype == "F8_E4M3"
