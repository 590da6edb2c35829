"""A policy's weights as files for servers: one folder per version, in Hugging Face format; the newest two are kept."""

import copy
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Literal

import torch

from finback.checkpoint.export import export
from finback.config import UserError
from finback.model.lora import AdaptedTransformer, merge
from finback.model.moe import MoE
from finback.model.transformer import Transformer

KEEP = 2  # a server may still be reading the second newest


class WeightFiles:
    """Version folders within one folder; `field` is the knob that errors name."""

    def __init__(self, folder: Path, field: str, extras: Callable[[Path], None] | None = None) -> None:
        """extras: adds the files that programs need to start on such a folder."""
        self.folder, self.field, self.extras = folder, field, extras
        self.written: list[Path] = []

    def write(self, model: Transformer, name: str, fmt: Literal["fp32", "bf16"]) -> tuple[Path, int]:
        """The new folder, which appears once it is complete, and its bytes; it may exist already. An adapter is merged into a copy of its base."""
        path = self.folder / name
        if path in self.written:
            return path, sum(file.stat().st_size for file in path.iterdir())
        model = merged(model, fmt)
        try:
            self.folder.mkdir(parents=True, exist_ok=True)
            files = export(model, path, fmt, self.extras)
        except OSError as error:
            problem = f"weights cannot be written to it ({error.strerror or error})"
            raise UserError(
                f"{self.field}.folder", str(self.folder), problem, "Use another folder, or free space."
            ) from None
        for file in files:
            file.chmod(0o644)  # a server may run as another user
        self.written.append(path)
        while len(self.written) > KEEP:
            shutil.rmtree(self.written.pop(0), ignore_errors=True)
        return path, sum(file.stat().st_size for file in files)

    def clear(self) -> None:
        """Removes what was written."""
        while self.written:
            shutil.rmtree(self.written.pop(), ignore_errors=True)


def merged(model: Transformer, fmt: Literal["fp32", "bf16"]) -> Transformer:
    """The model itself, or a copy with its adapter merged."""
    if not isinstance(model, AdaptedTransformer):
        return model
    # losses of the last pass belong to its graph and cannot be copied
    losses = [m.balance for m in model.modules() if isinstance(m, MoE)]
    left = {id(loss): loss.detach() for loss in losses if loss is not None}
    return merge(copy.deepcopy(model, left), torch.float32 if fmt == "fp32" else torch.bfloat16)
