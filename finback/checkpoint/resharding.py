"""Resumes a half-finished stage under another layout: many ranks read shares of one rank's checkpoint, or one rank
reads many ranks' checkpoint whole.

Both kinds of checkpoint use the tensor names of one rank. DCP reshards between layouts of many ranks (distributed.py).
"""

import re
from collections.abc import Callable, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

from torch import Tensor

from finback.checkpoint import store
from finback.checkpoint.shards import Shards
from finback.checkpoint.shares import Share, Stored
from finback.config import UserError

SHARDED = "sharded"  # the subfolder of a stage's checkpoints that holds those of many ranks


def newest(folder: Path) -> tuple[int, int]:
    """Returns the steps of a stage's newest one-rank and many-rank checkpoints; -1 where there is none."""
    return _last(folder, r"step-(\d+)\.safetensors"), _last(folder / SHARDED, r"step-(\d+)")


def _last(folder: Path, pattern: str) -> int:
    names = [path.name for path in folder.iterdir()] if folder.is_dir() else []
    return max((int(found[1]) for name in names if (found := re.fullmatch(pattern, name))), default=-1)


def fill(
    folder: Path, shares: Sequence[Share], say: Callable[[str], None] = lambda _: None
) -> tuple[int, dict[str, Any]] | None:
    """Fills shares from the newest one-rank checkpoint; returns its step and meta. Otherwise as store.load_newest."""
    found = store.newest(folder, say, _opened)
    if found is None:
        return None
    step, shards, meta = found
    for share in shares:
        there = shards.specs[share.name].shape if share.name in shards.specs else None
        if there != share.shape and (there != () or share.shape != (1,)):
            problem = f"{share.name} is {there or 'missing'}, not {share.shape}"
            raise UserError("checkpoint", str(shards.files[0]), problem, "Continue with the model that wrote it.")
    apart = [replace(share, local=share.local.detach().contiguous()) for share in shares]
    Stored(shards, {name: (name,) for name in shards.specs}).fill(apart)
    for share, copy in zip(shares, apart, strict=True):
        if copy.local.data_ptr() != share.local.data_ptr():
            share.local.detach().copy_(copy.local)
    return step, meta


def _opened(path: Path) -> tuple[Shards, dict[str, Any]]:
    """Opens a one-rank checkpoint and verifies its digest, reading one tensor at a time."""
    try:
        shards = Shards(path)
    except UserError as error:
        raise UserError("checkpoint", str(path), error.problem, store.REMEDY) from None
    return shards, store.verify(path, shards.specs, shards.read)


def read(folder: Path, say: Callable[[str], None] = lambda _: None) -> tuple[int, dict[str, Tensor], dict[str, Any]]:
    """Returns step, whole tensors and meta of the newest many-rank checkpoint. Needs no process group."""
    from finback.checkpoint import distributed  # seconds of imports

    path, meta = distributed.newest(folder / SHARDED, say)
    return int(path.name.removeprefix("step-")), distributed.read_whole(path), meta
