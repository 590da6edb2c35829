"""Models in folders: a finished stage's (model.json, model.safetensors), a Hugging Face folder, or a GGUF file."""

from pathlib import Path
from typing import Literal

import torch
from torch import Tensor

from finback.checkpoint import load as foreign
from finback.checkpoint import store
from finback.checkpoint.load import Kept
from finback.config import UserError
from finback.kernels import packed
from finback.model.config import from_json, to_json
from finback.model.pack import pack
from finback.model.transformer import Transformer
from finback.runs.files import is_checkpoint, read_json, write_json
from finback.runs.folder import finished_stages


def save(folder: Path, model: Transformer) -> None:
    """Write a model with its config into a stage's folder; the tokenizer is the stage's to add."""
    write_json(folder / "model.json", to_json(model.config))
    store.save(folder / "model.safetensors", dict(model.state_dict()), {})


def tensors_of(model: Transformer) -> dict[str, Tensor]:
    """A model's part of a step checkpoint, apart from the optimisers' by prefix; `restore` takes it back."""
    return {f"model.{name}": tensor for name, tensor in model.state_dict().items()}


def restore(model: Transformer, tensors: dict[str, Tensor]) -> None:
    """Load what `tensors_of` put into a step checkpoint; other tensors in it are ignored."""
    mine = {n.removeprefix("model."): t for n, t in tensors.items() if n.startswith("model.")}
    model.load_state_dict(mine)


Answering = Literal["auto", "fp32", "bf16", "int8"]
LARGE = 50_000_000  # bytes of weights below which fp32 costs little, and is exact


def load_to_answer(path: Path, dtype: Answering = "auto") -> Transformer:
    """Read the model at a path for answering alone, laid out as this machine reads it fastest.

    bf16 and int8 (weights only, for CPUs) are packed: such a model cannot be trained or saved. "auto" is bf16 where the
    machine computes in it, and fp32 elsewhere and for small models.
    """
    cuda = torch.cuda.is_available()
    if dtype == "auto":
        fast = cuda or packed.available("bf16")
        dtype = "bf16" if fast and _size(path) >= LARGE else "fp32"
    if dtype == "fp32":
        model = load(path)
        return (model.to("cuda") if cuda else model).eval()
    if not cuda and not packed.available(dtype):
        raise UserError("--dtype", dtype, "this processor has no fast products for it", "Use fp32.")
    if cuda and dtype == "int8":
        raise UserError("--dtype", dtype, "for CPUs only", "Use bf16.")
    model = load(path, torch.bfloat16, "bf16").eval()
    return model.to("cuda") if cuda else pack(model, dtype)


def _size(path: Path) -> int:
    files = path.glob("*.safetensors") if path.is_dir() else [path]
    return sum(file.stat().st_size for file in files if file.is_file())


def load(path: Path, compute: torch.dtype = torch.float32, kept: Kept = "fp32") -> Transformer:
    """Read the model at a path, whatever wrote it; UserError when there is none.

    `compute` is the dtype of activations, `kept` that of parameters; training wants fp32 for both.
    """
    if (path / "model.json").is_file():
        dtype = torch.float32 if kept == "fp32" else torch.bfloat16
        model = Transformer(from_json(read_json(path / "model.json")), compute, dtype)
        tensors, _ = store.load(path / "model.safetensors")
        model.load_state_dict(tensors)
        return model
    if is_checkpoint(path):
        return foreign.load(path, compute, kept)[0]
    problem = "holds no model" if path.exists() else "no such file or folder"
    raise UserError(
        "model", str(path), problem, "Name a stage that trains one, a Hugging Face folder, or a .gguf file."
    )


def find_model(path: Path) -> Path:
    """The model that a path means: `path` itself, or the newest finished stage in it that made a model."""
    if (path / "model.json").is_file() or (path.exists() and is_checkpoint(path)):
        return path
    found = [folder for folder in finished_stages(path) if (folder / "model.json").is_file()]
    if not found:
        problem = "holds no finished model" if path.exists() else "no such file or folder"
        raise UserError(
            "MODEL", str(path), problem, "Name a run such as runs/tiny, a Hugging Face folder, or a .gguf file."
        )
    return found[-1]
