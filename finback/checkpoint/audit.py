"""Audits a Hugging Face checkpoint: decides from names and shapes what to do with each tensor; reads no values."""

import dataclasses
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch

from finback.checkpoint import names, packed_folders, v4_names
from finback.checkpoint.gguf import GGUF
from finback.checkpoint.hf_config import model_config, read_config
from finback.checkpoint.packed_folders import PackedShards
from finback.checkpoint.shards import E8M0, SCALE, Shards, Weights, element_type
from finback.checkpoint.stacked_experts import StackedExperts
from finback.checkpoint.stored_names import as_named
from finback.config import UserError
from finback.kernels import fp8
from finback.model.config import ModelConfig
from finback.model.transformer import Transformer
from finback.runs.files import is_gguf


@dataclass
class Audit:
    """Every stored tensor is in exactly one of loaded, skipped and unexpected; `missing` lists absent tensors."""

    # as the weights are: without MTP where the files lack the declared layers
    config: ModelConfig
    loaded: list[str] = field(default_factory=list)
    # name -> reason
    skipped: dict[str, str] = field(default_factory=dict)
    unexpected: list[str] = field(default_factory=list)
    missing: list[str] = field(default_factory=list)
    # name of a loaded tensor -> what is wrong with its shape, dtype or factors
    wrong: dict[str, str] = field(default_factory=dict)
    notes: list[str] = field(default_factory=list)

    @property
    def holds(self) -> bool:
        """Whether the weights are exactly those of the config."""
        return not (self.missing or self.unexpected or self.wrong)

    def demand(self, where: str) -> None:
        """Raises UserError for the first tensor that is wrong, missing or unexpected."""
        for name, problem in self.wrong.items():
            raise UserError(name, where, problem, "config.json and weights belong to different models.")
        for kind, found in (("missing", self.missing), ("unexpected", self.unexpected)):
            if found:
                problem = f"{kind}, with {len(found) - 1} more: the weights are not those of config.json"
                raise UserError(found[0], where, problem, "`finback verify` lists every tensor.")


def shapes(config: ModelConfig, biases: bool = False) -> dict[str, tuple[int, ...]]:
    """Returns the shapes of a model's Hugging Face tensors (see names.table) without allocating weights."""
    with torch.device("meta"):
        model = Transformer(config)
    found = {}
    state = model.state_dict()
    for ours, theirs in names.table(config, biases).items():
        shape = state[ours].shape
        if len(theirs) == 1:
            found[theirs[0]] = tuple(shape)
        else:
            rows = shape[:-1].numel() if len(shape) > 1 else shape[0]
            found |= dict.fromkeys(theirs, (rows // len(theirs), *(shape[-1:] if len(shape) > 1 else ())))
    return found


def examine(path: Path) -> tuple[Weights, Audit]:
    """Opens the weights at a path and audits them; reads no values."""
    if is_gguf(path):
        file = GGUF(path)
        result = audit(model_config(file.raw), file, quantized=False)
        result.notes.append(f"GGUF, dequantized from {', '.join(file.kinds)}")
        return file, result
    raw = read_config(path)
    if (named := raw.get("transformers_weights")) is not None:
        remedy = f"Rename {named} to model.safetensors, remove other weights from the folder, and remove this field."
        raise UserError("config.json transformers_weights", named, "finback reads the default files only", remedy)
    config, files = model_config(raw), Shards(path)
    if config.swiglu_alpha is not None:
        return _stacked(config, files, raw)
    quantized = is_fp8(raw)
    if quantized and config.attention == "compressed":
        files.specs = packed_folders.factored(files.specs)
    has_fp4 = quantized and packed_folders.has_fp4(files.specs)
    shards = PackedShards(files, raw["quantization_config"], config) if is_packed(raw) or has_fp4 else files
    shards.specs = as_named(shards.specs, config)
    result = audit(config, shards, quantized)
    result.notes += [shards.note()] if isinstance(shards, PackedShards) else []
    return shards, result


def _stacked(config: ModelConfig, files: Shards, raw: dict[str, Any]) -> tuple[Weights, Audit]:
    """As `examine`, for the family whose experts are stored in transposed stacks."""
    files.specs = as_named(files.specs, config)
    shards = StackedExperts(files, raw.get("quantization_config"))
    return shards, audit(config, shards, quantized=False)


def audit(config: ModelConfig, shards: Weights, quantized: bool) -> Audit:
    """Compares stored tensors with those that the config requires."""
    wanted = shapes(config)
    mtp = [n for n in wanted if _layer(n) >= config.num_hidden_layers or n.startswith(v4_names.MTP)]
    result = Audit(config)
    if mtp and not any(n in shards.specs for n in mtp):
        result.notes.append(
            f"config.json declares {config.num_nextn_predict_layers} MTP layer(s) that the files lack; "
            "the model runs without them (transformers drops them on saving)"
        )
        result.config = config = dataclasses.replace(config, num_nextn_predict_layers=0)
        wanted = shapes(config)
    copies = names.copies(config)
    for name in shards.specs:
        if name in wanted:
            problem = _problem(name, wanted[name], shards, quantized)
            result.loaded.append(name)
            if problem:
                result.wrong[name] = problem
        elif name.endswith(SCALE) and name.removesuffix(SCALE) in shards.specs:
            result.skipped[name] = "factors of an FP8 tensor, read with it"
        elif name in copies:
            result.skipped[name] = f"a copy of {copies[name]}"
        elif name.endswith("rotary_emb.inv_freq"):
            result.skipped[name] = "computed from the config"
        else:
            result.unexpected.append(name)
    result.missing = [name for name in wanted if name not in shards.specs]
    return result


def _layer(name: str) -> int:
    """Returns the layer number in a Hugging Face name; -1 if the tensor belongs to no layer."""
    return int(name.split(".")[2]) if name.startswith("model.layers.") else -1


def _problem(name: str, shape: tuple[int, ...], shards: Weights, quantized: bool) -> str:
    """Returns what is wrong with a tensor's shape, dtype or factors; an empty string if nothing is."""
    spec = shards.specs[name]
    if spec.shape != shape:
        return f"shape {list(spec.shape)}, but config.json requires {list(shape)}"
    dtype = element_type(spec.dtype)
    if dtype is None or spec.dtype == E8M0 or dtype.is_floating_point == name.endswith(v4_names.TABLE):
        return f"dtype {spec.dtype}, which no weight of these families has"
    factors: Any = shards.specs.get(name + SCALE)
    if spec.dtype != "F8_E4M3":
        return "" if factors is None else f"has FP8 factors but is {spec.dtype}"
    if factors is None or not quantized:
        return "FP8 without factors, or without quantization_config in config.json"
    if element_type(factors.dtype) is None:
        return f"FP8 factors of dtype {factors.dtype}; finback reads F32, BF16 and F8_E8M0"
    expected = tuple(fp8.blocks(n) for n in shape)
    return "" if factors.shape == expected else f"FP8 factors {list(factors.shape)}, not {list(expected)}"


def differing_copies(weights: Weights, result: Audit) -> Iterator[tuple[str, str]]:
    """Yields tensors that were skipped as copies but differ from their originals, with the originals' names."""
    originals = names.copies(result.config)
    for name, original in originals.items():
        if name not in result.skipped or original not in weights.specs or original in result.wrong:
            continue
        if differs(weights, name, original):
            yield name, original


def differs(weights: Weights, name: str, original: str) -> bool:
    """Whether a copy's values differ from its original's."""
    one, other = weights.read(name), weights.read(original)
    return one.shape != other.shape or not torch.equal(one, other.to(one.dtype))


def is_fp8(raw: dict[str, Any]) -> bool:
    """Whether the weights are in DeepSeek's FP8 format; UserError for an unsupported quantization."""
    q = raw.get("quantization_config")
    if q is None:
        return False
    if isinstance(q, dict) and q.get("quant_method") == "fp8" and q.get("weight_block_size") == [128, 128]:
        return True
    packed_folders.check(q if isinstance(q, dict) else {})
    return False


def is_packed(raw: dict[str, Any]) -> bool:
    """Whether another tool packed the weights; UserError as for `is_fp8`."""
    return raw.get("quantization_config") is not None and not is_fp8(raw)
