"""Loads a Transformer from a finished stage's folder, a Hugging Face folder or a GGUF file, and saves it to a stage's.

Hugging Face and GGUF tensors are read one at a time per thread, so that memory holds little more than the model.
"""

import os
from collections import deque
from collections.abc import Collection
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Literal

import torch
from torch import Tensor

from finback.checkpoint import names, peft, peft_export, store
from finback.checkpoint.audit import Audit, differs, examine, shapes
from finback.checkpoint.kept import keep
from finback.checkpoint.places import demand_checkpoint
from finback.checkpoint.quantized_base import load_quantized
from finback.checkpoint.shards import INDEX, SINGLE, Shards, Weights
from finback.checkpoint.shares import SLICE, Stored
from finback.config import UserError
from finback.kernels import fp8
from finback.kernels.formats import FORMATS
from finback.model.config import ModelConfig, from_json, to_json
from finback.model.frozen import freeze
from finback.model.layers import Linear
from finback.model.lora import AdaptedTransformer, LoRA, adapter_parameters, merge
from finback.model.moe import MoE
from finback.model.quantized import make_room_for_fp8, matrix_names
from finback.model.transformer import Transformer
from finback.runs import adapters
from finback.runs.files import is_checkpoint, read_json, write_json
from finback.runs.provenance import sha256
from finback.runs.reader import finished_stages

NAME_A_MODEL = "Name a stage that trains one, a Hugging Face folder, or a .gguf file."
READERS = min(4, os.cpu_count() or 1)
# fp8 leaves FP8 matrices as stored; kept does so for packed folders and GGUF files too; all other weights are bf16
WeightDtype = Literal["fp32", "bf16", "fp8", "kept"]


def save(folder: Path, model: Transformer) -> None:
    """Writes a model, or its adapter, and its config into a stage's folder; the stage adds the tokenizer."""
    if isinstance(model, AdaptedTransformer):
        peft_export.save(folder, model)
    else:
        store.save(folder / SINGLE, dict(model.state_dict()), {})
    write_json(folder / "model.json", to_json(model.config))
    (folder / INDEX).unlink(missing_ok=True)  # left if many ranks wrote here before


def tensors_of(model: Transformer) -> dict[str, Tensor]:
    """Returns a model's part of a step checkpoint, under the prefix "model."; `restore` loads it.

    For a model with an adapter this is the adapter alone: its base does not change.
    """
    learnt = dict(adapter_parameters(model)) if isinstance(model, AdaptedTransformer) else model.state_dict()
    return {f"model.{name}": tensor for name, tensor in learnt.items()}


@torch.no_grad()
def restore(model: Transformer, tensors: dict[str, Tensor]) -> None:
    """Loads the tensors that `tensors_of` returned for a step checkpoint; ignores others."""
    mine = {n.removeprefix("model."): t for n, t in tensors.items() if n.startswith("model.")}
    if not isinstance(model, AdaptedTransformer):
        model.load_state_dict(mine)
        return
    for name, parameter in adapter_parameters(model):
        parameter.copy_(mine[name])


def load(path: Path, compute: torch.dtype = torch.float32, weights: WeightDtype = "fp32") -> Transformer:
    """Reads the model at a path, in any supported format; UserError when there is none.

    `compute` is the dtype of activations, `weights` that of parameters; full training needs fp32 weights. An adapter is
    merged into its base, which is first quantized as it was when the adapter was trained.
    """
    base, adapter = adapters.places(path)
    if adapter is not None:
        stored, exact = peft.read(adapter), weights == "fp32"
        model = load(base, compute, "fp32" if exact and stored.lora.base == "fp32" else "bf16")
        stored.check_base(base, peft.digest(model))
        found = peft.attach(freeze(model, stored.lora.base), stored)
        return merge(found, torch.float32 if exact else torch.bfloat16)
    if (base / "model.json").is_file():
        dtype = torch.float32 if weights == "fp32" else torch.bfloat16
        model = Transformer(from_json(read_json(base / "model.json")), compute, dtype)
        if (base / INDEX).is_file():
            fill(model, _own_shards(base, model.config), biases=True)
            return model
        tensors, _ = store.load(base / SINGLE)
        model.load_state_dict(tensors)
        return model
    demand_checkpoint(base, "model", NAME_A_MODEL)
    return load_audited(base, compute, weights)[0]


def load_for_training(path: Path, lora: LoRA | None, compute: torch.dtype, seed: int) -> Transformer:
    """Reads a model to train: in fp32, or with `lora` frozen, with a new adapter or with its own to continue."""
    if lora is None:
        return load(path, compute)
    base, adapter = adapters.places(path)
    if lora.base in FORMATS:
        model, digest = load_quantized(*stored(base), lora.base, compute)
    else:
        model = load(base, compute, "fp32" if lora.base == "fp32" else "bf16")
        digest = peft.digest(model)
        freeze(model, lora.base)
    return peft.put_adapter(model, lora, (base, adapter), digest, seed)


def find_model(path: Path) -> Path:
    """Resolves a path to a model: itself, the hub model of that name, or the newest finished stage with a model."""
    is_named = bool(adapters.split(str(path))[1])
    base, adapter = adapters.places(path)
    if adapter is not None:
        return Path(f"{find_model(base)}+{adapter}") if is_named else adapter
    path = base
    if (path / "model.json").is_file() or (path.exists() and is_checkpoint(path)):
        return path
    found = [folder for folder in finished_stages(path) if (folder / "model.json").is_file()]
    if not found:
        remedy = "Name a run such as runs/tiny, a Hugging Face folder, or a .gguf file."
        demand_checkpoint(path, "MODEL", remedy, "holds no finished model")
    return found[-1]


def load_audited(
    path: Path, compute: torch.dtype = torch.float32, weights: WeightDtype = "fp32"
) -> tuple[Transformer, Audit]:
    """Reads a folder or a .gguf file; UserError unless its weights are exactly those of its config."""
    shards, result = _audited(path)
    model = Transformer(result.config, compute, torch.float32 if weights == "fp32" else torch.bfloat16)
    if weights in ("fp8", "kept"):
        _make_room_for_fp8(model, shards)
    kept = keep(model, shards) if weights == "kept" else set()
    fill(model, shards, kept=kept)
    return model, result


def _audited(path: Path) -> tuple[Weights, Audit]:
    """Opens the weights at a path; UserError unless they are those of its config. Reads values only of a tied head."""
    shards, result = examine(path)
    result.demand(str(path))
    if "lm_head.weight" in result.skipped and differs(shards, "lm_head.weight", "model.embed_tokens.weight"):
        problem = "config.json ties it to model.embed_tokens.weight, but its values differ"
        remedy = "Set tie_word_embeddings to false if the head is separate; otherwise download the file again."
        raise UserError("lm_head.weight", str(path), problem, remedy)
    return shards, result


def stored(path: Path, rank: int = 0, size: int = 1) -> tuple[ModelConfig, Stored]:
    """Opens the model at a path, in any supported format, to be read share by share; UserError as for `load`.

    Where many ranks wrote the model, rank `rank` of `size` verifies the digests of its part of the files.
    """
    if not (path / "model.json").is_file():
        demand_checkpoint(path, "model", NAME_A_MODEL)
        weights, result = _audited(path)
        return result.config, Stored(weights, names.table(result.config))
    config = from_json(read_json(path / "model.json"))
    if (path / INDEX).is_file():
        return config, Stored(_own_shards(path, config, rank, size), names.table(config, biases=True))
    shards = Shards(path)
    with torch.device("meta"):
        wanted = {name: tuple(tensor.shape) for name, tensor in Transformer(config).state_dict().items()}
    for name, shape in wanted.items():
        found = shards.specs[name].shape if name in shards.specs else "missing"
        if found != shape:
            problem = f"{found}, but model.json requires {shape}"
            raise UserError(name, str(path), problem, "Run the stage that made it again.")
    store.verify(path / SINGLE, shards.specs, shards.read)
    return config, Stored(shards, {name: (name,) for name in wanted})


def _own_shards(path: Path, config: ModelConfig, rank: int = 0, size: int = 1) -> Shards:
    """Opens a stage's model that many ranks wrote.

    UserError if a tensor is missing or has another shape, or a file in this rank's part does not match its digest.
    """
    shards, wanted = Shards(path), shapes(config, biases=True)
    found = {name: spec.shape for name, spec in shards.specs.items()}
    remedy = "Run the stage that made it again."
    if found != wanted:
        name = sorted(n for n in found.keys() | wanted.keys() if found.get(n) != wanted.get(n))[0]
        problem = f"{found.get(name, 'missing')}, but model.json requires {wanted.get(name, 'none')}"
        raise UserError(name, str(path), problem, remedy)
    digests = read_json(path / INDEX)["metadata"]["sha256"]
    for file in shards.files[rank::size]:
        if sha256(file) != digests.get(file.name):
            raise UserError("model", str(file), "its content does not match its digest", remedy)
    return shards


def fill(model: Transformer, shards: Weights, biases: bool = False, kept: Collection[str] = ()) -> None:
    """Copies every tensor of the name table except the `kept` ones into the model, in the order of the files."""
    targets: dict[str, tuple[str, int, int]] = {}
    for ours, theirs in names.table(model.config, biases).items():
        if ours in kept:
            continue
        for index, name in enumerate(theirs):
            targets[name] = ours, index, len(theirs)
    state = model.state_dict(keep_vars=True)
    # Half the time goes into page faults on the model's memory, so several threads read, each with one compute thread.
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        with ThreadPoolExecutor(READERS) as pool:
            wanted = (n for n in shards.by_file() if n in targets)
            deque(pool.map(lambda name: _copy(state, targets[name], name, shards), wanted), maxlen=0)
    finally:
        torch.set_num_threads(threads)


@torch.no_grad()
def _copy(state: dict[str, Tensor], target: tuple[str, int, int], name: str, weights: Weights) -> None:
    """Copies a stored tensor into its part of ours; dequantizes FP8 a few rows at a time unless ours is FP8 too."""
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
    """Returns a view of the rows of part `index` of `parts` equal parts; experts' matrices count as stacked rows."""
    flat = whole.flatten(0, -2) if whole.ndim > 2 else whole
    height = len(flat) // parts
    return flat[index * height : (index + 1) * height]


def scale_name(ours: str) -> str:
    """Returns our name of an FP8 tensor's factors."""
    return ours + "_scale"  # see model/quantized.py


def _make_room_for_fp8(model: Transformer, shards: Weights) -> None:
    """Replaces matrices whose stored parts are all FP8 with FP8 parameters and a buffer for their factors."""
    stored = {
        ours: [shards.specs[n] for n in theirs]
        for ours, theirs in names.table(model.config).items()
        if all(shards.specs[n].dtype == "F8_E4M3" for n in theirs)
    }
    for prefix, module in model.named_modules():
        if not isinstance(module, Linear | MoE):
            continue
        kinds = matrix_names(module)
        found = [k for k in kinds if f"{prefix}.{k}" in stored]
        # the blocks of parts that share a matrix are aligned only if each part's height is a multiple of the block's
        matrices = len(module.gate_up) if isinstance(module, MoE) else 1
        aligned = all(
            len(stored[f"{prefix}.{k}"]) == matrices or stored[f"{prefix}.{k}"][0].shape[0] % fp8.BLOCK == 0
            for k in found
        )
        if not found or len(found) != len(kinds) or not aligned:
            continue
        make_room_for_fp8(module, found)
