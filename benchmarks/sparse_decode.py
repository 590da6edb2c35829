"""Seconds of one decoding step after long texts: dense MLA, V3.2's sparse attention and V4's, of the quickstart's size.

One row, one thread, random weights, fp32, and caches filled with random numbers, since their content does not affect
the time. Rounds alternate between models; a ratio is formed within a round, then the median is taken. Each form is the
engine's: MLA decodes by the C++ kernel where there is one, the other two by plain torch.
"""

import argparse
import dataclasses
import runpy
import statistics
import time
from pathlib import Path

import torch
from driver import say
from record import header, write

from finback.model.cache import Cache
from finback.model.compressed_cache import CompressedCache, CompressedPool, pool_of
from finback.model.config import TINY, ModelConfig
from finback.model.native import use_native
from finback.model.transformer import Transformer

ROOT = Path(__file__).resolve().parent.parent
LENGTHS = (1024, 8192, 32768)
LONGEST = 1 << 16


def models() -> dict[str, ModelConfig]:
    """The quickstart's model, the same with an indexer, and recipes/v4_tiny.py's."""
    dense = dataclasses.replace(TINY, num_nextn_predict_layers=0, max_position_embeddings=LONGEST)
    v4 = runpy.run_path(str(ROOT / "recipes/v4_tiny.py"))["V4_TINY"]
    return {
        "mla": dense,
        "v3.2": dataclasses.replace(dense, index_topk=32, index_n_heads=8, index_head_dim=16),
        "v4": dataclasses.replace(v4, num_nextn_predict_layers=0, max_position_embeddings=LONGEST),
    }


class Decoder:
    """A model with a cache of some length."""

    def __init__(self, config: ModelConfig, length: int) -> None:
        self.model, self.length = use_native(Transformer(config).initialise(0).eval()), length
        pages = length // 16 + 2
        self.pool = pool_of(config, pages + 1, 1, torch.float32, torch.device("cpu"))
        stores = [self.pool.data]
        if isinstance(self.pool, CompressedPool):
            stores += [*self.pool.windows, *self.pool.records, *self.pool.far]
        for store in stores:
            store.normal_()
        self.table = torch.arange(1, pages + 1)[None]

    @torch.inference_mode()
    def seconds(self, steps: int = 5) -> float:
        """Seconds per token, logits included; the fastest of some steps."""
        taken = []
        for _ in range(steps):
            began = time.perf_counter()
            kind = CompressedCache if isinstance(self.pool, CompressedPool) else Cache
            cache = kind(self.pool, self.table, [self.length], 1)  # type: ignore[arg-type]
            self.model.logits(self.model(torch.tensor([[7]]), cache))
            taken.append(time.perf_counter() - began)
        return min(taken)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--rounds", type=int, default=9)
    parser.add_argument("--out", type=Path)
    options = parser.parse_args()
    torch.set_num_threads(1)
    results = header("sparse_decode", {"rounds": options.rounds})
    found: dict[str, dict[str, dict[str, float]]] = {}
    for length in LENGTHS:
        decoders = {name: Decoder(config, length) for name, config in models().items()}
        rounds = []
        for number in range(options.rounds + 1):
            order = list(decoders) if number % 2 else list(reversed(decoders))
            rounds.append({name: decoders[name].seconds() for name in order})
        rounds = rounds[1:]  # the first warms up
        found[str(length)] = {
            name: {
                "seconds": statistics.median(r[name] for r in rounds),
                "of_mla": statistics.median(r[name] / r["mla"] for r in rounds),
            }
            for name in decoders
        }
        say(f"{length:,} tokens: {found[str(length)]}")
    results["tokens"] = found
    write(results, options.out)


if __name__ == "__main__":
    main()
