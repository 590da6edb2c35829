"""Exports a Transformer as a Hugging Face folder for transformers, vLLM and SGLang, in fp32, bf16 or DeepSeek's FP8."""

import json
import math
import shutil
import tempfile
from collections import Counter
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any, Literal

import torch
from safetensors import SafetensorError
from safetensors.torch import save_file
from torch import Tensor

from finback.checkpoint import names, v4_names
from finback.checkpoint.audit import shapes
from finback.checkpoint.hf_config import raw_config
from finback.checkpoint.hf_export_as import family_of
from finback.checkpoint.models import part, scale_name
from finback.checkpoint.shards import BESIDE, INDEX, SCALE, SINGLE
from finback.checkpoint.store import as_os_error
from finback.checkpoint.stored_names import fuse, fused, fused_shapes
from finback.config import UserError
from finback.kernels import formats, fp8
from finback.model.config import ModelConfig
from finback.model.transformer import Transformer

Format = Literal["bf16", "fp32", "fp8"]
_DTYPES = {"fp32": torch.float32, "bf16": torch.bfloat16, "fp8": torch.bfloat16}
# transformers ignores the MTP layers of released models, by layer number, and calls all others unexpected
RELEASED_MTP_LAYERS = {
    "deepseek_v3": (61,),
    "deepseek_v32": (61,),
    "glm4_moe": (46, 92),
    "glm4_moe_lite": (47,),
    "glm_moe_dsa": (78,),
}
V4_SCALE = "scale"  # the ending of factors' names in V4's files, in place of "weight"
SHARD_BYTES = 5_000_000_000  # the largest size of a file


def export(
    model: Transformer,
    folder: Path,
    fmt: Format = "bf16",
    extras: Callable[[Path], None] | None = None,
    settings: dict[str, Any] | None = None,
    shard_bytes: int = SHARD_BYTES,
) -> list[Path]:
    """Writes weights and config.json and returns the paths of all files. The folder appears when it is complete.

    `extras` adds files such as tokenizer and model card; `settings` are added to config.json. UserError when the folder
    exists and is not empty, or the disk is too small.
    """
    folder = check_target(folder)
    unfinished = begin(folder, model.config, fmt)
    try:
        _write_weights(model, unfinished, fmt, shard_bytes)
        complete(unfinished, folder, config_json(model.config, fmt, settings), extras)
    except BaseException as error:
        shutil.rmtree(unfinished, ignore_errors=True)
        if isinstance(error, SafetensorError):
            raise as_os_error(error, folder) from None
        raise
    return sorted(folder.iterdir())


def config_json(config: ModelConfig, fmt: Format, settings: dict[str, Any] | None) -> dict[str, Any]:
    """Returns the contents of config.json."""
    raw = raw_config(config, "float32" if fmt == "fp32" else "bfloat16") | (settings or {})
    if fmt == "fp8":
        raw["quantization_config"] = {
            "quant_method": "fp8",
            "fmt": "e4m3",
            "activation_scheme": "dynamic",
            "weight_block_size": [128, 128],
        } | raw.get("quantization_config", {})
        if config.attention == "compressed":
            raw["quantization_config"]["scale_fmt"], raw["expert_dtype"] = "ue8m0", "fp4"
    return raw


def begin(folder: Path, config: ModelConfig, fmt: Format) -> Path:
    """Creates a temporary folder next to the target; UserError if the disk is too small or fp8 is impossible."""
    if fmt == "fp8" and fused(config):
        raise UserError("format", fmt, "this family fuses matrices whose FP8 factors are separate", "Use bf16.")
    if fmt == "fp8" and config.attention == "compressed":
        for name in ("hidden_size", "moe_intermediate_size"):
            if (width := getattr(config, name)) % formats.MXFP4_BLOCK:
                problem = (
                    f"V4's experts are FP4 in blocks of {formats.MXFP4_BLOCK}, which do not divide {name} = {width}"
                )
                raise UserError("format", fmt, problem, "Use bf16.")
    needed = sum(size for _, size in _sizes(config, fmt))
    free = shutil.disk_usage(folder.parent).free
    if free < 1.05 * needed:
        problem = f"needs {needed / 1e9:.1f} GB, {free / 1e9:.1f} GB are free"
        raise UserError("folder", str(folder), problem, "Use another disk.")
    return Path(tempfile.mkdtemp(dir=folder.parent, prefix=f".{folder.name}."))


def complete(unfinished: Path, folder: Path, raw: dict[str, Any], extras: Callable[[Path], None] | None) -> None:
    """Adds config.json and the extras, and renames the folder to its target."""
    (unfinished / "config.json").write_text(json.dumps(raw, indent=2) + "\n", encoding="utf-8")
    if extras:
        extras(unfinished)
    unfinished.chmod(0o755)  # mkdtemp creates a folder that only its owner can read
    if folder.exists():
        folder.rmdir()
    unfinished.rename(folder)


def check_target(folder: Path) -> Path:
    """Returns the absolute path of an export's target; UserError unless it is a new or empty folder."""
    folder = folder.resolve()
    if folder.exists() and (not folder.is_dir() or any(folder.iterdir())):
        raise UserError("folder", str(folder), "exists and is not empty", "Name a new folder.")
    try:
        folder.parent.mkdir(parents=True, exist_ok=True)
    except (FileExistsError, NotADirectoryError):
        raise UserError("folder", str(folder), "a parent of this path is a file", "Name another folder.") from None
    return folder


def tensors(model: Transformer, fmt: Format) -> Iterator[tuple[str, Tensor]]:
    """Yields Hugging Face names and tensors one at a time: FP8 factors before their tensors, MTP's copies last."""
    yield from fuse(_apart(model, fmt), model.config)


def _apart(model: Transformer, fmt: Format) -> Iterator[tuple[str, Tensor]]:
    """As `tensors`, before fusing: under the name table's names."""
    config, state = model.config, model.state_dict()
    for ours, theirs in names.table(config).items():
        factors = state.get(scale_name(ours))
        for index, name in enumerate(theirs):
            piece = part(state[ours], index, len(theirs))
            if factors is None:
                yield from cast(name, piece, fmt)
                continue
            scale = part(factors, index, len(theirs))
            if fmt == "fp8":  # the model holds FP8: the stored values are written unchanged
                yield factors_name(name), scale.to(_factors_dtype(name)).contiguous()
                yield name, piece.contiguous()
            else:
                yield name, fp8.dequantize(piece, scale, _DTYPES[fmt])
    for copy, original in copies(config).items():
        tensor = state["embed" if original == "model.embed_tokens.weight" else "head.weight"]
        yield from cast(copy, tensor.clone(), fmt)  # safetensors refuses tensors that share memory


def copies(config: ModelConfig) -> dict[str, str]:
    """Returns the duplicate tensors to write: MTP's, which other engines read, but not a tied head."""
    return {copy: original for copy, original in names.copies(config).items() if copy != "lm_head.weight"}


def cast(name: str, tensor: Tensor, fmt: Format) -> Iterator[tuple[str, Tensor]]:
    """Yields the stored tensors of one tensor, as `stored_as` announces them: itself, and its factors if quantized."""
    if (kept := _own_dtype(name)) is not None:
        yield name, tensor.to(kept).contiguous()
    elif fmt == "fp8" and v4_names.is_fp4(name):
        values, scale = formats.mxfp4(tensor)
        yield factors_name(name), scale.view(torch.float8_e8m0fnu)
        yield name, values.view(torch.int8)
    elif fmt == "fp8" and is_quantized(name):
        values, scale = fp8.quantize(tensor, v4_names.is_fp8(name))
        yield factors_name(name), scale.to(_factors_dtype(name))
        yield name, values
    else:
        yield name, tensor.to(_DTYPES[fmt]).contiguous()


def _own_dtype(name: str) -> torch.dtype | None:
    """Returns the dtype of a tensor that has the same dtype in every format; None for most tensors."""
    if name.endswith(v4_names.TABLE):
        return torch.int64
    return torch.float32 if name.endswith((*names.BIASES, *v4_names.PRECISE)) else None


def is_quantized(name: str) -> bool:
    """Whether DeepSeek stores this tensor in FP8: projections, but not head, eh_proj or the indexer's weights_proj."""
    if v4_names.is_fp8(name):
        return True
    is_plain = name.endswith(("eh_proj.weight", "weights_proj.weight"))
    ends = "_proj.weight", "kv_a_proj_with_mqa.weight", "indexer.wq_b.weight", "indexer.wk.weight"
    return name.endswith(ends) and not is_plain


def factors_name(name: str) -> str:
    """Returns the name of a quantized tensor's factors; V4's files name them differently."""
    if v4_names.is_fp8(name) or v4_names.is_fp4(name):
        return name.removesuffix("weight") + V4_SCALE
    return name + SCALE


def _factors_dtype(name: str) -> torch.dtype:
    return torch.float8_e8m0fnu if v4_names.is_fp8(name) else torch.float32


def _owner(name: str) -> str:
    """Returns the weight that a stored tensor belongs to: itself, or the weight whose factors it holds."""
    if name.endswith(f".{V4_SCALE}"):
        return name.removesuffix(V4_SCALE) + "weight"
    return name.removesuffix(SCALE)


def stored_as(name: str, shape: tuple[int, ...], fmt: Format) -> dict[str, tuple[torch.dtype, tuple[int, ...]]]:
    """Returns dtype and shape of a tensor in a file, and of its factors if it is quantized."""
    if (kept := _own_dtype(name)) is not None:
        return {name: (kept, shape)}
    if fmt == "fp8" and v4_names.is_fp4(name):
        factors = shape[0], shape[1] // formats.MXFP4_BLOCK
        return {factors_name(name): (torch.float8_e8m0fnu, factors), name: (torch.int8, (shape[0], shape[1] // 2))}
    if fmt != "fp8" or not is_quantized(name):
        return {name: (_DTYPES[fmt], shape)}
    factors = fp8.blocks(shape[0]), fp8.blocks(shape[1])
    return {factors_name(name): (_factors_dtype(name), factors), name: (torch.float8_e4m3fn, shape)}


def _sizes(config: ModelConfig, fmt: Format) -> Iterator[tuple[str, int]]:
    """Yields the bytes of each tensor of an export, in the order of `tensors`."""
    found = fused_shapes(shapes(config), config)
    found |= {copy: found[original] for copy, original in copies(config).items()}
    for name, shape in found.items():
        yield name, size(name, shape, fmt)


def size(name: str, shape: tuple[int, ...], fmt: Format) -> int:
    """Returns the bytes of a tensor in a file, factors included."""
    return sum(math.prod(s) * dtype.itemsize for dtype, s in stored_as(name, shape, fmt).values())


def lies_beside(config: ModelConfig) -> tuple[str, ...]:
    """Returns the name prefixes of MTP layers that transformers calls unexpected; their files are not in the index."""
    layers = range(config.num_hidden_layers, config.num_hidden_layers + config.num_nextn_predict_layers)
    known = RELEASED_MTP_LAYERS.get(family_of(config), ()) if layers else ()
    return tuple(f"model.layers.{layer}." for layer in layers if layer not in known)


def _plan(config: ModelConfig, fmt: Format, shard_bytes: int) -> dict[str, str]:
    """Assigns each tensor to a file: one or numbered shards, and a separate one for the MTP layers of `lies_beside`."""
    apart = lies_beside(config)
    groups: list[list[str]] = [[]]
    beside, filled = [], 0
    for name, count in _sizes(config, fmt):
        if name.startswith(apart):  # never, when there are none
            beside.append(name)
            continue
        if filled and filled + count > shard_bytes:
            groups.append([])
            filled = 0
        groups[-1].append(name)
        filled += count
    n = len(groups)
    files = [SINGLE] if n == 1 else [f"model-{i:05}-of-{n:05}.safetensors" for i in range(1, n + 1)]
    plan = {name: file for file, group in zip(files, groups, strict=True) for name in group}
    return plan | dict.fromkeys(beside, BESIDE)


def _write_weights(model: Transformer, folder: Path, fmt: Format, shard_bytes: int) -> None:
    """Writes each file of the plan as soon as its tensors are complete, and an index if there are several."""
    plan = _plan(model.config, fmt, shard_bytes)
    left = Counter(plan.values())
    pending: dict[str, dict[str, Tensor]] = {file: {} for file in left}
    weight_map: dict[str, str] = {}
    for name, tensor in tensors(model, fmt):
        file = plan[_owner(name)]
        pending[file][name] = tensor
        weight_map[name] = file
        left[file] -= _owner(name) == name
        if left[file] == 0:
            save_file(pending.pop(file), folder / file, metadata={"format": "pt"})
    indexed = {name: file for name, file in weight_map.items() if file != BESIDE}
    if SINGLE not in indexed.values():
        write_index(folder, indexed)


def write_index(folder: Path, weight_map: dict[str, str], **about: Any) -> None:
    """Writes the index, which maps each tensor to its file."""
    total = sum((folder / file).stat().st_size for file in set(weight_map.values()))
    index = {"metadata": {"total_size": total, **about}, "weight_map": weight_map}
    (folder / INDEX).write_text(json.dumps(index, indent=2) + "\n", encoding="utf-8")
