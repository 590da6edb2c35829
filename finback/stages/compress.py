"""How well a model compresses text it has never seen: bits per byte, comparable between tokenizers."""

import math
from collections.abc import Iterable
from pathlib import Path

import numpy as np
import torch

from finback.data import pack
from finback.model.transformer import Transformer
from finback.parallel.mesh import World
from finback.runs.files import read_json

LENGTH = 128  # tokens of a window


@torch.no_grad()
def bits_per_byte(model: Transformer, data: Path, source: str, world: World, rows: int = 128) -> float | None:
    """Compression of a source's validation text, in bits per byte of text; None where the source has no validation text.

    Up to `rows` windows of LENGTH tokens; every rank gets the same number.
    """
    path = data / f"{source}.valid.bin"
    count = _windows(path, rows)
    if not count:
        return None
    shard = pack.read(path)
    record = read_json(data / "sources.json")[source]
    starts = np.linspace(0, len(shard) - LENGTH - 1, count).astype(int)
    mine = [int(s) for s in starts[world.rank :: world.size]]
    was_training = model.training
    model.eval()
    total = torch.zeros((), dtype=torch.float64)
    for begin in range(0, len(mine), 16):
        windows = np.stack([shard[s : s + LENGTH + 1] for s in mine[begin : begin + 16]]).astype(np.int64)
        tokens = torch.from_numpy(windows).to(model.embed.device)
        logp = model.logits(model(tokens[:, :-1])).log_softmax(dim=-1)
        total -= logp.gather(2, tokens[:, 1:, None]).double().sum().cpu()
    model.train(was_training)
    nats = world.sum_(total).item() / (count * LENGTH)
    return nats / math.log(2) * record["valid_tokens"] / record["valid_bytes"]


def tokens_compressed(data: Path, source: str, rows: int = 128) -> int:
    """How many tokens `bits_per_byte` reads of a source."""
    return _windows(data / f"{source}.valid.bin", rows) * LENGTH


def _windows(path: Path, most: int) -> int:
    """How many windows of a shard are looked at; each wants the token behind it too."""
    tokens = len(pack.read(path)) if path.stat().st_size else 0
    return min(most, tokens // LENGTH) if tokens > LENGTH else 0


def bits_by_source(model: Transformer, data: Path, sources: Iterable[str], world: World) -> dict[str, float]:
    """Bits per byte of each source's validation text, of those that have some."""
    found = {name: bits_per_byte(model, data, name, world) for name in sources}
    return {name: bits for name, bits in found.items() if bits is not None}
