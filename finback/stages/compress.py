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

# tokens of a window for models that read so many, windows of a source, windows of a pass
LENGTH, MOST, AT_ONCE = 128, 128, 16
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
    length = min(LENGTH, config.max_position_embeddings)
    windows = {name: _windows(data / f"{name}.valid.bin", length) for name in sources}
    found = {
        name: _bits_per_byte(read, data / f"{name}.valid.bin", (count, length), part, world) if count else None
        for name, count in windows.items()
    }
    return found, sum(windows.values()) * forward_flops_of(config, [length])


def _bits_per_byte(read: Reader, path: Path, sizes: tuple[int, int], part: tuple[int, int], world: World) -> float:
    """Of so many windows of so many tokens, spread evenly over a source's validation text."""
    shard, (count, length) = pack.read(path), sizes
    record = read_json(path.with_name("sources.json"))[path.name.removesuffix(".valid.bin")]
    starts = np.linspace(0, len(shard) - length - 1, count).astype(int)
    number, parts = part
    total = torch.zeros((), dtype=torch.float64)
    mine = range(number, -(-count // parts) * parts, parts)  # where parts are uneven, the first windows once more
    for begin in range(0, len(mine), AT_ONCE):
        here = mine[begin : begin + AT_ONCE]
        windows = np.stack([shard[(s := int(starts[i % count])) : s + length + 1] for i in here]).astype(np.int64)
        logp = read(torch.from_numpy(windows))
        total -= logp[: sum(i < count for i in here)].double().sum().cpu()
    same = world.size // parts  # ranks with the same part
    nats = world.sum_(total).item() / same / (count * length)
    return nats / math.log(2) * record["valid_tokens"] / record["valid_bytes"]


def _windows(path: Path, length: int) -> int:
    """How many windows of a shard are looked at, of so many tokens; each wants the token behind it too."""
    tokens = len(pack.read(path)) if path.stat().st_size else 0
    return min(MOST, tokens // length) if tokens > length else 0
