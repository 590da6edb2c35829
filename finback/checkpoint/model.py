"""A finished model in a stage's folder: model.safetensors, model.json, tokenizer.json."""

import shutil
from pathlib import Path

import torch
from torch import Tensor

from finback.checkpoint import store
from finback.config import UserError
from finback.model.config import from_json, to_json
from finback.model.transformer import Transformer
from finback.run import read_json, write_json


def save(folder: Path, model: Transformer, tokenizer: Path) -> None:
    """Write a model with its config and tokenizer into a folder."""
    write_json(folder / "model.json", to_json(model.config))
    if tokenizer.resolve() != (folder / "tokenizer.json").resolve():
        shutil.copyfile(tokenizer, folder / "tokenizer.json")
    store.save(folder / "model.safetensors", dict(model.state_dict()), {})


def tensors_of(model: Transformer) -> dict[str, Tensor]:
    """A model's part of a step checkpoint, apart from the optimisers' by prefix; `restore` takes it back."""
    return {f"model.{name}": tensor for name, tensor in model.state_dict().items()}


def restore(model: Transformer, tensors: dict[str, Tensor]) -> None:
    """Load what `tensors_of` put into a step checkpoint; other tensors in it are ignored."""
    mine = {n.removeprefix("model."): t for n, t in tensors.items() if n.startswith("model.")}
    model.load_state_dict(mine)


def load(folder: Path, compute: torch.dtype = torch.float32) -> Transformer:
    """Read a model that `save` wrote; UserError when the folder holds none."""
    if not (folder / "model.json").is_file():
        raise UserError("model", str(folder), "holds no model", "Name the folder of a stage that trains one.")
    model = Transformer(from_json(read_json(folder / "model.json")), compute)
    tensors, _ = store.load(folder / "model.safetensors")
    model.load_state_dict(tensors)
    return model
