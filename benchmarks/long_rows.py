"""Peak memory of one SFT step on packed rows of thousands of tokens: document by document, and under a mask.

Each step runs in its own process with one thread. `bytes` is the peak above the process's memory before it has a model:
weights, gradients, AdamW's moments and activations. Lessons have 64 to 4,096 tokens, the same for both forms.
"""

import argparse
import dataclasses
import json
import os
import random
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import record
import torch

from finback.data.messages import Lesson
from finback.kernels import documents
from finback.model.config import TINY, ModelConfig
from finback.model.transformer import Transformer
from finback.parallel.mesh import World
from finback.train.batch import of_lessons
from finback.train.loss import LossTerms
from finback.train.optim import Adam
from finback.train.trainer import ReplicatedTrainer

# the quickstart's model, with two layers
MOE = dataclasses.replace(TINY, vocab_size=8192, num_hidden_layers=2, max_position_embeddings=1 << 15)
DENSE = ModelConfig(
    vocab_size=49152,
    hidden_size=256,
    num_hidden_layers=2,
    num_attention_heads=8,
    num_key_value_heads=2,
    head_dim=32,
    intermediate_size=512,
    attention="gqa",
    rope_interleaved=False,
    max_position_embeddings=1 << 15,
)
MODELS = {"mla": MOE, "gqa": DENSE}


def lessons(tokens: int, vocab_size: int) -> list[Lesson]:
    """Lessons that fill one row exactly."""
    rng, found, left = random.Random(0), [], tokens
    while left:
        length = min(left, round(2 ** rng.uniform(6, 12)))
        ids = [rng.randrange(vocab_size) for _ in range(length)]
        found.append(Lesson(ids, ids))
        left -= length
    return found


def step(name: str, form: str, tokens: int) -> dict[str, Any]:
    """One step in this process."""
    torch.set_num_threads(1)
    if form == "mask":
        documents.LONGEST_MASKED = tokens
    config, world = MODELS[name], World()
    row = lessons(tokens, config.vocab_size)
    before = record.resident("VmRSS")
    model = Transformer(config).initialise(0).train()
    trainer = ReplicatedTrainer(model, world, [Adam(list(model.named_parameters()), (0.9, 0.95), 0.0)])
    batch = of_lessons([row], config.num_nextn_predict_layers)
    terms = LossTerms([float(batch.learnt.sum())] * (1 + config.num_nextn_predict_layers))
    begin = time.perf_counter()
    trainer.zero()
    losses = trainer.backward(batch, terms)
    norm = trainer.finish(1.0)
    trainer.update(1e-3)
    seconds = time.perf_counter() - begin
    found = {"loss": losses[0].item(), "grad_norm": norm, "documents": len(row), "seconds": seconds}
    return {"model": name, "form": form, "tokens": tokens, "bytes": record.resident("VmHWM") - before, **found}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--tokens", type=int, nargs="*", default=[4096, 8192, 16384, 32768])
    parser.add_argument("--masked", type=int, nargs="*", default=[2048, 4096, 8192], help="tokens under a mask")
    parser.add_argument("--child", nargs=3, metavar=("MODEL", "FORM", "TOKENS"), help=argparse.SUPPRESS)
    parser.add_argument("--out", type=Path)
    options = parser.parse_args()
    if options.child:
        name, form, tokens = options.child
        print(json.dumps(step(name, form, int(tokens))))
        return
    results = record.header("long_rows", {"models": {n: dataclasses.asdict(c) for n, c in MODELS.items()}})
    results["steps"] = []
    for name in MODELS:
        for form, sizes in (("documents", options.tokens), ("mask", options.masked)):
            for tokens in sizes:
                command = [sys.executable, __file__, "--child", name, form, str(tokens)]
                done = subprocess.run(command, capture_output=True, text=True, check=True, env=os.environ)
                results["steps"].append(json.loads(done.stdout))
                print(results["steps"][-1], file=sys.stderr)
    record.write(results, options.out)


if __name__ == "__main__":
    main()
