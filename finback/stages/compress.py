"""Compression of unseen text by a model, in bits per byte, which is comparable between tokenizers."""

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

# tokens per window (at most), windows per source, windows per forward pass
LENGTH, MOST, AT_ONCE = 128, 128, 16
# maps rows of token ids (n, t + 1) to the log-probability (n, t) of each token but the first
Reader = Callable[[Tensor], Tensor]


def bits_by_source(
    read: Reader,
    config: ModelConfig,
    data: Path,
    sources: Iterable[str],
    world: World,
    part: tuple[int, int] | None = None,
) -> tuple[dict[str, float | None], float]:
    """Bits per byte of each source's validation text, None if it has none; and the FLOPs spent.

    All ranks return the same numbers and make the same number of passes. `part` = (index, count): which of `count` equal
    parts of the windows this rank reads; by default each rank reads its own part.
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
    """Bits per byte over sizes = (windows, tokens per window), spread evenly over a source's validation text."""
    shard, (count, length) = pack.read(path), sizes
    record = read_json(path.with_name("sources.json"))[path.name.removesuffix(".valid.bin")]
    starts = np.linspace(0, len(shard) - length - 1, count).astype(int)
    number, parts = part
    total = torch.zeros((), dtype=torch.float64)
    mine = range(number, -(-count // parts) * parts, parts)  # uneven parts are filled up with the first windows
    for begin in range(0, len(mine), AT_ONCE):
        here = mine[begin : begin + AT_ONCE]
        windows = np.stack([shard[(s := int(starts[i % count])) : s + length + 1] for i in here]).astype(np.int64)
        logp = read(torch.from_numpy(windows))
        total -= logp[: sum(i < count for i in here)].double().sum().cpu()
    same = world.size // parts  # ranks that read the same part
    nats = world.sum_(total).item() / same / (count * length)
    return nats / math.log(2) * record["valid_tokens"] / record["valid_bytes"]


def _windows(path: Path, length: int) -> int:
    """Number of windows of `length` tokens to read from a shard; each also needs the token after it."""
    tokens = len(pack.read(path)) if path.stat().st_size else 0
    return min(MOST, tokens // length) if tokens > length else 0
