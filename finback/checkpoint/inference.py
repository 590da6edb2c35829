"""Loads models for inference, in the format that the machine reads fastest."""

from collections.abc import Mapping
from pathlib import Path
from typing import Literal, get_args

import torch

from finback.checkpoint import peft
from finback.checkpoint.models import WeightDtype, load
from finback.config import UserError, did_you_mean
from finback.kernels import packed, quants
from finback.model.pack import is_kept, pack
from finback.model.transformer import Transformer
from finback.runs import adapters
from finback.runs.files import is_gguf

LARGE = 50_000_000  # bytes of weights; below this, fp32 costs little and is exact
InferenceDtype = Literal["auto", "fp32", "bf16", "int8", "kept"]


def load_for_inference(
    path: Path, dtype: InferenceDtype = "auto", folders: Mapping[str, Path] | None = None
) -> Transformer:
    """Reads the model at a path for inference, in the format that this machine reads fastest.

    "kept" leaves matrices as they are stored and loads the rest in bf16. Where kernels are available, a GGUF file's
    matrices are multiplied as stored; a quantized folder's are dequantized for each product. On a CPU bf16, int8
    (weights only) and a GGUF file's kept matrices are packed: such a model cannot be trained or saved. "auto" is kept
    for a GGUF file, bf16 where the machine computes in it, and fp32 elsewhere and for small models. `folders` maps
    names to adapters, which are attached; UserError where one was made for another model.
    """
    if dtype not in get_args(InferenceDtype):
        raise UserError("dtype", dtype, "not a known format", did_you_mean(str(dtype), get_args(InferenceDtype)))
    cuda = torch.cuda.is_available()
    if dtype == "auto":
        dtype = _best(path, cuda, bool(folders))
    if dtype in ("bf16", "int8") and not cuda and not packed.available(dtype):
        raise UserError("--dtype", dtype, "this processor has no fast matrix multiplication for it", "Use fp32.")
    if cuda and dtype == "int8":
        raise UserError("--dtype", dtype, "is for CPUs only", "Use bf16.")
    if folders and adapters.places(path)[1] is not None:
        problem = "already includes an adapter"
        raise UserError("MODEL", str(path), problem, "Name its base, and pass its adapter's folder with --adapter too.")
    if folders and dtype == "kept" and is_gguf(path):
        raise UserError("--dtype", dtype, "adapters identify a GGUF base by its bf16 weights", "Use bf16.")
    weights: WeightDtype = "kept" if dtype == "kept" else "bf16"
    model = (load(path) if dtype == "fp32" else load(path, torch.bfloat16, weights)).eval()
    digest = peft.digest(model) if folders else ""
    if cuda:
        model = model.to("cuda")
    elif dtype in ("bf16", "int8"):
        pack(model, dtype)
    elif dtype == "kept" and is_gguf(path) and quants.available():
        pack(model, "kept" if any(map(is_kept, model.modules())) or not packed.available("bf16") else "bf16")
    return peft.attach_all(model, path, digest, folders) if folders else model


def _best(path: Path, cuda: bool, has_adapters: bool) -> InferenceDtype:
    """Returns the format that "auto" stands for with this model."""
    if _size(path) < LARGE:
        return "fp32"
    if is_gguf(path) and quants.available() and not (cuda or has_adapters):
        return "kept"
    return "bf16" if cuda or packed.available("bf16") else "fp32"


def _size(path: Path) -> int:
    path = adapters.places(path)[0]
    files = path.glob("*.safetensors") if path.is_dir() else [path]
    return sum(file.stat().st_size for file in files if file.is_file())
