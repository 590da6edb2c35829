"""How well a model compresses text it has never seen: bits per byte, comparable between tokenizers."""

import math
from collections.abc import Iterable
from pathlib import Path

import numpy as np
import torch

from finback.data import pack
from finback.model.count import forward_flops_of
from finback.model.logprobs import token_logprobs
from finback.model.transformer import Transformer
from finback.parallel.mesh import World
from finback.runs.files import read_json

LENGTH, MOST = 128, 128  # tokens of a window, windows of a source


def bits_by_source(
    model: Transformer, data: Path, sources: Iterable[str], world: World
) -> tuple[dict[str, float | None], float]:
    """Compression of each source's validation text in bits per byte, None where it has none; and the FLOPs it took.

    Every rank gets the same numbers.
    """
    windows = {name: _windows(data / f"{name}.valid.bin") for name in sources}
    found = {
        name: _bits_per_byte(model, data, name, count, world) if count else None for name, count in windows.items()
    }
    return found, sum(windows.values()) * forward_flops_of(model.config, [LENGTH])


@torch.no_grad()
def _bits_per_byte(model: Transformer, data: Path, source: str, count: int, world: World) -> float:
    """Of `count` windows of LENGTH tokens, spread evenly over a source's validation text."""
    shard = pack.read(data / f"{source}.valid.bin")
    record = read_json(data / "sources.json")[source]
    starts = np.linspace(0, len(shard) - LENGTH - 1, count).astype(int)
    mine = [int(s) for s in starts[world.rank :: world.size]]
    was_training = model.training
    model.eval()
    total = torch.zeros((), dtype=torch.float64)
    for begin in range(0, len(mine), 16):
        windows = np.stack([shard[s : s + LENGTH + 1] for s in mine[begin : begin + 16]]).astype(np.int64)
        tokens = torch.from_numpy(windows).to(model.embed.device)
        logp, _ = token_logprobs(model, model(tokens[:, :-1]).flatten(0, 1), tokens[:, 1:].flatten())
        total -= logp.double().sum().cpu()
    model.train(was_training)
    nats = world.sum_(total).item() / (count * LENGTH)
    return nats / math.log(2) * record["valid_tokens"] / record["valid_bytes"]


def _windows(path: Path) -> int:
    """How many windows of a shard are looked at; each wants the token behind it too."""
    tokens = len(pack.read(path)) if path.stat().st_size else 0
    return min(MOST, tokens // LENGTH) if tokens > LENGTH else 0
