"""How well a model compresses text it has never seen: bits per byte, comparable between tokenizers."""

import math
from pathlib import Path

import numpy as np
import torch

from finback.data import pack
from finback.model.transformer import Transformer
from finback.parallel.mesh import World
from finback.run import read_json


@torch.no_grad()
def bits_per_byte(model: Transformer, data: Path, source: str, world: World, rows: int = 128) -> float | None:
    """Compression of a source's validation text, in bits per byte of text; None where the source kept none apart.

    Up to `rows` windows of 128 tokens; every rank gets the same number.
    """
    shard = pack.read(data / f"{source}.valid.bin") if (data / f"{source}.valid.bin").stat().st_size else None
    length = 128
    if shard is None or len(shard) <= length:
        return None
    record = read_json(data / "sources.json")[source]
    starts = np.linspace(0, len(shard) - length - 1, min(rows, len(shard) // length)).astype(int)
    mine = [int(s) for s in starts[world.rank :: world.size]]
    was_training = model.training
    model.eval()
    total = torch.zeros((), dtype=torch.float64)
    for begin in range(0, len(mine), 16):
        windows = np.stack([shard[s : s + length + 1] for s in mine[begin : begin + 16]]).astype(np.int64)
        tokens = torch.from_numpy(windows)
        logp = model.logits(model(tokens[:, :-1])).log_softmax(dim=-1)
        total -= logp.gather(2, tokens[:, 1:, None]).double().sum()
    model.train(was_training)
    nats = world.sum_(total).item() / (len(starts) * length)
    return nats / math.log(2) * record["valid_tokens"] / record["valid_bytes"]
