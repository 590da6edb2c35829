"""A half-finished stage whose layout changes: what one rank wrote is read share by share, what many wrote by one rank whole.

Both kinds of checkpoint have the same names, those of one rank. From layout to layout DCP reshards (distributed.py).
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

SHARDED = "sharded"  # the folder of many ranks' checkpoints within a stage's


def newest(folder: Path) -> tuple[int, int]:
    """The steps of a stage's newest checkpoints of one rank and of many; -1 where there are none."""
    return _last(folder, r"step-(\d+)\.safetensors"), _last(folder / SHARDED, r"step-(\d+)")


def _last(folder: Path, pattern: str) -> int:
    names = [path.name for path in folder.iterdir()] if folder.is_dir() else []
    return max((int(found[1]) for name in names if (found := re.fullmatch(pattern, name))), default=-1)


def fill(
    folder: Path, shares: Sequence[Share], say: Callable[[str], None] = lambda _: None
) -> tuple[int, dict[str, Any]] | None:
    """Take shares of all that the newest of one rank's checkpoints holds; its step and meta. As store.load_newest."""
    found = store.newest(folder, say, _opened)
    if found is None:
        return None
    step, shards, meta = found
    for share in shares:
        there = shards.specs[share.name].shape if share.name in shards.specs else None
        if there != share.shape and (there != () or share.shape != (1,)):
            problem = f"{share.name} is {there or 'missing'}, not {share.shape}"
            raise UserError("checkpoint", str(shards.files[0]), problem, "Continue it with the model that it is of.")
    apart = [replace(share, local=share.local.detach().contiguous()) for share in shares]
    Stored(shards, {name: (name,) for name in shards.specs}).fill(apart)
    for share, copy in zip(shares, apart, strict=True):
        if copy.local.data_ptr() != share.local.data_ptr():
            share.local.detach().copy_(copy.local)
    return step, meta


def _opened(path: Path) -> tuple[Shards, dict[str, Any]]:
    """A checkpoint of one rank, verified tensor by tensor."""
    try:
        shards = Shards(path)
    except UserError as error:
        raise UserError("checkpoint", str(path), error.problem, store.REMEDY) from None
    return shards, store.verify(path, shards.specs, shards.read)


def read(folder: Path, say: Callable[[str], None] = lambda _: None) -> tuple[int, dict[str, Tensor], dict[str, Any]]:
    """All tensors of the newest of many ranks' checkpoints, whole; its step and meta. Needs no process group."""
    from finback.checkpoint import distributed  # seconds of imports

    path, meta = distributed.newest(folder / SHARDED, say)
    return int(path.name.removeprefix("step-")), distributed.read_whole(path), meta
