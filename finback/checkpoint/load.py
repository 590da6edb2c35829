"""A Hugging Face folder or a GGUF file into a Transformer, tensor by tensor: the model plus one shard in memory."""

import os
from collections import deque
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any, Literal

import torch
from torch import Tensor

from finback.checkpoint import hf, names
from finback.checkpoint.audit import Audit, audit
from finback.checkpoint.gguf import GGUF
from finback.checkpoint.shards import Shards, Weights
from finback.config import UserError
from finback.kernels import fp8
from finback.model.layers import Linear
from finback.model.moe import MoE
from finback.model.quantized import make_room_for_fp8
from finback.model.transformer import Transformer

READERS = min(4, os.cpu_count() or 1)
SLICE = 8 * fp8.BLOCK  # rows of an FP8 matrix that are spread out at once
Kept = Literal["fp32", "bf16", "fp8"]  # fp8: FP8 matrices stay as they are, the rest is bf16


def load(path: Path, compute: torch.dtype = torch.float32, kept: Kept = "fp32") -> tuple[Transformer, Audit]:
    """Read a folder or a .gguf file; UserError unless its weights are exactly those of its config."""
    shards, result = examine(path)
    result.demand(str(path))
    if "lm_head.weight" in result.skipped and differs(shards, "lm_head.weight", "model.embed_tokens.weight"):
        raise UserError(
            "lm_head.weight",
            str(path),
            "config.json ties it to model.embed_tokens.weight, but its values differ",
            "Set tie_word_embeddings to false if the head is its own; otherwise download the file again.",
        )
    model = Transformer(result.config, compute, torch.float32 if kept == "fp32" else torch.bfloat16)
    if kept == "fp8":
        _make_room_for_fp8(model, shards)
    fill(model, shards)
    return model, result


def examine(path: Path) -> tuple[Weights, Audit]:
    """The weights at a path and what would become of each of their tensors; reads no values."""
    if path.suffix == ".gguf":
        file = GGUF(path)
        result = audit(hf.model_config(file.raw), file, quantized=False)
        result.notes.append(f"GGUF, spread out from {', '.join(file.kinds)}")
        return file, result
    raw = hf.read_config(path)
    config, quantized = hf.model_config(raw), is_fp8(raw)
    shards = Shards(path)
    return shards, audit(config, shards, quantized)


def differing_copies(weights: Weights, result: Audit) -> Iterator[tuple[str, str]]:
    """Tensors that were skipped as copies and are not, with what they should repeat."""
    originals = names.copies(result.config)
    for name, original in originals.items():
        if name not in result.skipped or original not in weights.specs or original in result.wrong:
            continue
        if differs(weights, name, original):
            yield name, original


def differs(weights: Weights, name: str, original: str) -> bool:
    """Whether a copy's values are not those of its original."""
    one, other = weights.read(name), weights.read(original)
    return one.shape != other.shape or not torch.equal(one, other.to(one.dtype))


def is_fp8(raw: dict[str, Any]) -> bool:
    """Whether the weights are in DeepSeek's FP8 format; UserError for any other quantization."""
    q = raw.get("quantization_config")
    if q is None:
        return False
    if not isinstance(q, dict) or q.get("quant_method") != "fp8" or q.get("weight_block_size") != [128, 128]:
        raise UserError(
            "config.json quantization_config",
            q,
            "finback reads fp8 with weight_block_size [128, 128]",
            "Use the bf16 or DeepSeek-FP8 weights of this model.",
        )
    return True


def fill(model: Transformer, shards: Weights) -> None:
    """Copy every tensor of the name table into the model, in the order in which the files hold them."""
    targets: dict[str, tuple[str, int, int]] = {}
    for ours, theirs in names.table(model.config).items():
        for index, name in enumerate(theirs):
            targets[name] = ours, index, len(theirs)
    state = model.state_dict(keep_vars=True)
    # Half the time goes into first touches of the model's pages: several threads make them, each computing alone.
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        with ThreadPoolExecutor(READERS) as pool:
            jobs = (n for n in shards.by_file() if n in targets)
            deque(pool.map(lambda name: _copy(state, targets[name], name, shards), jobs), maxlen=0)
    finally:
        torch.set_num_threads(threads)


@torch.no_grad()
def _copy(state: dict[str, Tensor], target: tuple[str, int, int], name: str, weights: Weights) -> None:
    """Put a stored tensor into its part of ours; FP8 is spread out a few rows at a time unless ours is FP8 too."""
    ours, index, parts = target
    into, scale = part(state[ours], index, parts), weights.scale(name)
    if scale is None:
        weights.read_into(name, into)
    elif into.dtype == torch.float8_e4m3fn:
        weights.read_into(name, into)
        part(state[scale_name(ours)], index, parts).copy_(scale)
    else:
        source = weights.read(name)
        for start in range(0, len(source), SLICE):
            rows = slice(start, start + SLICE)
            factors = scale[start // fp8.BLOCK : (start + SLICE) // fp8.BLOCK]
            fp8.dequantize(source[rows], factors, into.dtype, out=into[rows])


def part(whole: Tensor, index: int, parts: int) -> Tensor:
    """The view of equal part `index` of a tensor's rows; experts' matrices count as stacked rows."""
    flat = whole.flatten(0, -2) if whole.ndim > 2 else whole
    height = len(flat) // parts
    return flat[index * height : (index + 1) * height]


def scale_name(ours: str) -> str:
    """Our name of the factors of an FP8 tensor."""
    return ours + "_scale"  # see model/quantized.py


def _make_room_for_fp8(model: Transformer, shards: Weights) -> None:
    """Turn matrices whose parts are FP8 in the files into FP8 parameters with a buffer for their factors."""
    stored = {
        ours: [shards.specs[n] for n in theirs]
        for ours, theirs in names.table(model.config).items()
        if all(shards.specs[n].dtype == "F8_E4M3" for n in theirs)
    }
    for prefix, module in model.named_modules():
        if not isinstance(module, Linear | MoE):
            continue
        kinds = ("gate_up", "down") if isinstance(module, MoE) else ("weight",)
        found = [k for k in kinds if f"{prefix}.{k}" in stored]
        # blocks of parts that share a matrix line up only when each part is a whole number of blocks high
        matrices = len(module.gate_up) if isinstance(module, MoE) else 1
        aligned = all(
            len(stored[f"{prefix}.{k}"]) == matrices or stored[f"{prefix}.{k}"][0].shape[0] % fp8.BLOCK == 0
            for k in found
        )
        if not found or len(found) != len(kinds) or not aligned:
            continue
        make_room_for_fp8(module, found)
