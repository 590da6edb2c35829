"""Peak memory of one SFT step by all weights, LoRA and QLoRA on one rank, against `finback plan`'s count.

Each case runs in a process of its own, one thread, fp32 arithmetic. `bytes` are those above the process before it has a model, at the step's
fullest moment; `start` the same while the model is made, its base quantized and its adapter put on. `planned` is the planner's, without its reserve.
The cases of SmolLM2-135M's shapes say what LoRA takes beside the weights of what all weights do (rows of 512, 8 of them): `beside_weights`.
"""

import argparse
import dataclasses
import json
import os
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import record
import torch

from finback.data.messages import Lesson
from finback.model.config import ModelConfig
from finback.model.frozen import base_dtype, freeze
from finback.model.lora import LoRA, add_lora, learnt_parameters
from finback.model.recompute import use_recompute
from finback.model.transformer import Transformer
from finback.parallel.mesh import World
from finback.planner import tuning
from finback.train.batch import of_lessons
from finback.train.heap import return_large_blocks
from finback.train.loss import LossTerms
from finback.train.optim import Adam
from finback.train.trainer import ReplicatedTrainer


def dense(vocab: int, hidden: int, layers: int, heads: int, width: int, kv: int, tied: bool = False) -> ModelConfig:
    shape: dict[str, Any] = {"num_key_value_heads": kv, "head_dim": hidden // heads, "tie_word_embeddings": tied}
    return ModelConfig(vocab, hidden, layers, heads, width, attention="gqa", max_position_embeddings=1024, **shape)


SMOL = dense(49152, 576, 30, 9, 1536, 3, tied=True)
BF16, NF4 = LoRA(), LoRA(base="nf4")
# name -> model, adapter, rows, tokens of each; the first three have states of 1 GB and more
CASES: dict[str, tuple[ModelConfig, LoRA | None, int, int]] = {
    "full": (dense(8192, 1024, 4, 16, 4096, 4), None, 1, 64),
    "lora": (dense(8192, 2048, 8, 16, 8192, 4), BF16, 1, 64),
    "qlora": (dense(65536, 2048, 14, 16, 8192, 4), NF4, 1, 64),
    "smol full": (SMOL, None, 8, 512),
    "smol lora": (SMOL, BF16, 8, 512),
}


def forget_peak() -> None:
    """Have VmHWM begin anew at what is resident now."""
    Path("/proc/self/clear_refs").write_text("5", encoding="utf-8")


def filled(model: Transformer) -> Transformer:
    """Numbers that are quick to make in every parameter."""
    noise = torch.empty(1 << 20).normal_(0, 0.02, generator=torch.Generator().manual_seed(0))
    for parameter in model.parameters():
        if parameter.ndim > 1:
            for part in parameter.data.view(-1).split(len(noise)):
                part.copy_(noise[: len(part)])
    return model


def measured(name: str) -> dict[str, Any]:
    """One case in this process."""
    torch.set_num_threads(1)
    config, adapter, rows, length = CASES[name]
    if adapter is not None:
        return_large_blocks()
    row = [[Lesson(list(range(length)), list(range(length)))] for _ in range(rows)]
    before = record.resident("VmRSS")
    model = filled(Transformer(config, param_dtype=base_dtype(adapter.base) if adapter else torch.float32))
    if adapter is not None:
        model = add_lora(freeze(model, adapter.base), adapter)
    model = use_recompute(model, "block" if adapter else "none").train()
    named = learnt_parameters(model)
    trainer = ReplicatedTrainer(model, World(), [Adam(named, (0.9, 0.95), 0.0)], named)
    start = record.resident("VmHWM") - before
    held = {t.data_ptr(): t.numel() * t.element_size() for t in [*model.parameters(), *model.buffers()]}
    forget_peak()
    batch, begin = of_lessons(row, 0), time.perf_counter()
    trainer.zero()
    loss = trainer.backward(batch, LossTerms([float(batch.learnt.sum())]))[0].item()
    norm = trainer.finish(1.0)
    trainer.update(1e-4)
    seconds, peak = time.perf_counter() - begin, record.resident("VmHWM") - before
    knobs = {"adapter": dataclasses.asdict(adapter) if adapter else None, "batch_size": rows, "seq_len": length}
    planned = tuning.memory(config, knobs, 0.0)
    return {
        **{"case": name, "bytes": peak, "planned": planned.total, "off": peak / planned.total - 1, "start": start},
        **{"beside_weights": peak - sum(held.values()), "seconds": seconds, "loss": loss, "grad_norm": norm},
        "parts": dataclasses.asdict(planned),
    }


def summaries(cases: list[dict[str, Any]]) -> Iterator[tuple[str, float]]:
    """What is to be said of all that were measured."""
    by_name = {case["case"]: case for case in cases}
    large = [abs(case["off"]) for name, case in by_name.items() if not name.startswith("smol")]
    if large:
        yield "worst_off", max(large)
    if {"smol full", "smol lora"} <= by_name.keys():
        yield "smol_lora_over_full", by_name["smol lora"]["beside_weights"] / by_name["smol full"]["beside_weights"]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--cases", nargs="*", default=list(CASES), choices=list(CASES))
    parser.add_argument("--child", choices=list(CASES), help=argparse.SUPPRESS)
    parser.add_argument("--out", type=Path)
    options = parser.parse_args()
    if options.child:
        print(json.dumps(measured(options.child)))
        return
    results = record.header("tuning_memory", {"models": {n: dataclasses.asdict(c[0]) for n, c in CASES.items()}})
    results["cases"] = []
    for name in options.cases:
        command = [sys.executable, __file__, "--child", name]
        done = subprocess.run(command, stdout=subprocess.PIPE, text=True, check=True, env=os.environ)
        results["cases"].append(json.loads(done.stdout))
        print(results["cases"][-1], file=sys.stderr, flush=True)
        record.write(results | dict(summaries(results["cases"])), options.out)


if __name__ == "__main__":
    main()
