"""Models in folders: a finished stage's (model.json, model.safetensors), a Hugging Face folder, or a GGUF file."""

from pathlib import Path

import torch
from torch import Tensor

from finback.checkpoint import load as foreign
from finback.checkpoint import store
from finback.checkpoint.load import Kept
from finback.config import UserError
from finback.model.config import from_json, to_json
from finback.model.transformer import Transformer
from finback.run import is_checkpoint, read_json, write_json


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
