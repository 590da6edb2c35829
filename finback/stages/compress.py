"""How well a model compresses text it has never seen: bits per byte, comparable between tokenizers."""

import math
from collections.abc import Callable, Iterable
from pathlib import Path

import numpy as np
import torch
from torch import Tensor

from finback.data import pack
from finback.model.config import ModelConfig
from finback.model.count import forward_flops_of
from finback.parallel.mesh import World
from finback.runs.files import read_json

LENGTH, MOST, AT_ONCE = 128, 128, 16  # tokens of a window, windows of a source, windows of a pass
# Rows of tokens (n, t + 1) -> the log-probability (n, t) of each but the first
Reader = Callable[[Tensor], Tensor]


def bits_by_source(
    read: Reader,
    config: ModelConfig,
    data: Path,
    sources: Iterable[str],
    world: World,
    part: tuple[int, int] | None = None,
) -> tuple[dict[str, float | None], float]:
    """Compression of each source's validation text in bits per byte, None where it has none; and the FLOPs it took.

    Every rank gets the same numbers, and reads equally often. `part`: which of how many equal parts of the windows this
    rank reads; by default each rank has its own.
    """
    part = part or (world.rank, world.size)
    windows = {name: _windows(data / f"{name}.valid.bin") for name in sources}
    found = {
        name: _bits_per_byte(read, data, name, count, part, world) if count else None for name, count in windows.items()
    }
    return found, sum(windows.values()) * forward_flops_of(config, [LENGTH])


def _bits_per_byte(read: Reader, data: Path, source: str, count: int, part: tuple[int, int], world: World) -> float:
    """Of `count` windows of LENGTH tokens, spread evenly over a source's validation text."""
    shard = pack.read(data / f"{source}.valid.bin")
    record = read_json(data / "sources.json")[source]
    starts = np.linspace(0, len(shard) - LENGTH - 1, count).astype(int)
    number, parts = part
    total = torch.zeros((), dtype=torch.float64)
    mine = range(number, -(-count // parts) * parts, parts)  # where parts are uneven, the first windows once more
    for begin in range(0, len(mine), AT_ONCE):
        here = mine[begin : begin + AT_ONCE]
        windows = np.stack([shard[(s := int(starts[i % count])) : s + LENGTH + 1] for i in here]).astype(np.int64)
        logp = read(torch.from_numpy(windows))
        total -= logp[: sum(i < count for i in here)].double().sum().cpu()
    same = world.size // parts  # ranks with the same part
    nats = world.sum_(total).item() / same / (count * LENGTH)
    return nats / math.log(2) * record["valid_tokens"] / record["valid_bytes"]


def _windows(path: Path) -> int:
    """How many windows of a shard are looked at; each wants the token behind it too."""
    tokens = len(pack.read(path)) if path.stat().st_size else 0
    return min(MOST, tokens // LENGTH) if tokens > LENGTH else 0
