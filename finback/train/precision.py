"""Whether bf16 pays on this machine, for this model: decided by timing real steps."""

import math
import time

import torch

from finback.model.config import ModelConfig
from finback.model.transformer import Transformer
from finback.train.step import backward

COMPUTE = {"fp32": torch.float32, "bf16": torch.bfloat16}


def rates(config: ModelConfig, rows: int, length: int) -> dict[str, float]:
    """Tokens per second of forward and backward passes of `rows` rows, per dtype; the fastest of six turns each."""
    width = length + 1 + config.num_nextn_predict_layers
    tokens = torch.randint(config.vocab_size, (rows, width), generator=torch.Generator().manual_seed(0))
    contestants = {name: Transformer(config, dtype).initialise(0).train() for name, dtype in COMPUTE.items()}
    best = dict.fromkeys(COMPUTE, math.inf)
    for _ in range(6):  # in turns, so that another program's burst hits both
        for name, model in contestants.items():
            begin = time.perf_counter()
            backward(model, tokens, mtp_weight=0.3, balance_alpha=1e-4)
            best[name] = min(best[name], time.perf_counter() - begin)
    return {name: rows * length / seconds for name, seconds in best.items()}
