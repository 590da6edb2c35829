"""Peak memory of two SFT steps with all weights, LoRA and QLoRA, on one rank and on several, compared with `finback plan`.

Each case runs in its own process, with one thread and fp32 arithmetic. `bytes` is the peak during the steps above the
process before it has a model, the largest of all ranks; `start` is the peak while the model is made, its base quantized
and its adapter added. `planned` is the planner's figure, without its reserve. If ranks shard all weights, `export` is
the peak while they write the model, and `of_states` is the largest of the three peaks over one rank's states: 16 bytes
per weight. The cases of SmolLM2-135M's shapes (8 rows of 512) compare the memory besides the weights, `beside_weights`,
of LoRA and of all weights.
"""

import argparse
import dataclasses
import json
import os
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import record
import torch
import torch.distributed as dist

from finback.checkpoint.shares import Share, Values, whole
from finback.data.messages import Lesson
from finback.model.config import ModelConfig
from finback.model.count import parameters
from finback.model.frozen import base_dtype, freeze
from finback.model.lora import LoRA, add_lora, learnt_parameters
from finback.model.recompute import use_recompute
from finback.model.transformer import Transformer
from finback.parallel.launch import free_port
from finback.parallel.layout import Layout
from finback.parallel.mesh import World
from finback.parallel.shard import local
from finback.planner import tuning
from finback.train.batch import of_lessons
from finback.train.heap import return_large_blocks
from finback.train.lean_adam import Moments, adam_of
from finback.train.loss import LossTerms
from finback.train.trainer import ReplicatedTrainer, Trainer


def dense(vocab: int, hidden: int, layers: int, heads: int, width: int, kv: int, tied: bool = False) -> ModelConfig:
    shape: dict[str, Any] = {"num_key_value_heads": kv, "head_dim": hidden // heads, "tie_word_embeddings": tied}
    return ModelConfig(vocab, hidden, layers, heads, width, attention="gqa", max_position_embeddings=1024, **shape)


SMOL = dense(49152, 576, 30, 9, 1536, 3, tied=True)
STEPS = 2  # the second step includes what the first leaves in memory
BF16, NF4 = LoRA(), LoRA(base="nf4")


@dataclasses.dataclass(frozen=True)
class Case:
    """A model and how it is trained."""

    config: ModelConfig
    adapter: LoRA | None = None
    # tokens per row, and rows over all ranks
    tokens: int = 64
    rows: int = 1
    # data ranks of a layout; 1: none
    ranks: int = 1
    moments: Moments = "fp32"


# its single layers, embedding and head are small parts of the whole
DEEP = dense(4096, 512, 64, 8, 2048, 8)
FULL, LARGE = dense(8192, 1024, 4, 16, 4096, 4), dense(8192, 2048, 8, 16, 8192, 4)
# all but SmolLM2's have states of 1 GB and more
CASES = {
    "full": Case(FULL),
    "full int8": Case(FULL, moments="int8"),
    "full 2 ranks": Case(FULL, rows=2, ranks=2),
    "full 4 ranks": Case(FULL, rows=4, ranks=4),
    "deep 4 ranks": Case(DEEP, rows=4, ranks=4),
    "lora": Case(LARGE, BF16),
    "lora 2 ranks": Case(LARGE, BF16, rows=2, ranks=2),
    "qlora": Case(dense(65536, 2048, 14, 16, 8192, 4), NF4),
    "smol full": Case(SMOL, tokens=512, rows=8),
    "smol lora": Case(SMOL, BF16, tokens=512, rows=8),
}


class Noise(Values):
    """Numbers that are quick to make."""

    def fill(self, shares: Sequence[Share]) -> None:
        noise = torch.empty(1 << 20).normal_(0, 0.02, generator=torch.Generator().manual_seed(0))
        for share in shares:
            if share.local.ndim > 1:
                for part in share.local.detach().view(-1).split(len(noise)):
                    part.copy_(noise[: len(part)])
            else:
                share.local.detach().fill_(1.0)


def forget_peak() -> None:
    """Resets VmHWM to the present resident memory."""
    Path("/proc/self/clear_refs").write_text("5", encoding="utf-8")


def on_one(case: Case) -> ReplicatedTrainer:
    """The trainer of a stage without a layout, without reading files."""
    adapter = case.adapter
    model = Transformer(case.config, param_dtype=base_dtype(adapter.base) if adapter else torch.float32)
    Noise().fill([whole(name, parameter) for name, parameter in model.named_parameters()])
    if adapter is not None:
        model = add_lora(freeze(model, adapter.base), adapter)
    named = learnt_parameters(use_recompute(model, "block" if adapter else "none").train())
    return ReplicatedTrainer(model, World(), [adam_of(named, 0.0, case.moments)], named)


def on_many(case: Case) -> Trainer:
    """The trainer of a stage with a layout."""
    from finback.train.sharded_adapter import Adapter, AdapterTuner
    from finback.train.sharded_tuning import ShardedTuner, TuningOptions

    adapter, layout = case.adapter, Layout(dp=case.ranks)
    options = TuningOptions(recompute="block" if adapter else "none", base=adapter.base if adapter else None)
    if adapter is None:
        return ShardedTuner(case.config, layout, Noise(), options)
    return AdapterTuner(case.config, layout, Noise(), Adapter(adapter, Path(), None, 0), options)


def measured(name: str, rank: int, folder: Path) -> dict[str, Any]:
    """Measures one case in this process; ranks export to the folder."""
    torch.set_num_threads(1)
    case = CASES[name]
    if case.adapter is not None:
        return_large_blocks()
    if case.ranks > 1:
        dist.init_process_group("gloo", rank=rank, world_size=case.ranks)
        dist.barrier()
    row = [[Lesson(list(range(case.tokens)), list(range(case.tokens)))] for _ in range(case.rows // case.ranks)]
    before = record.resident("VmRSS")
    trainer = on_one(case) if case.ranks == 1 else on_many(case)
    start, model = record.resident("VmHWM") - before, trainer.model
    held = sum({t.data_ptr(): t.nbytes for t in map(local, [*model.parameters(), *model.buffers()])}.values())
    forget_peak()
    batch, loss, norm, begin = of_lessons(row, 0), 0.0, 0.0, 0.0
    for _ in range(STEPS):
        begin = time.perf_counter()
        trainer.zero()
        loss = trainer.backward(batch, LossTerms([float(batch.learnt.sum()) * case.ranks]))[0].item()
        norm = trainer.finish(1.0)
        trainer.update(1e-4)
    seconds, peak = time.perf_counter() - begin, record.resident("VmHWM") - before
    found = {
        **{"bytes": peak, "start": start, "beside_weights": peak - held},
        **{"seconds": seconds, "loss": loss, "grad_norm": norm},
    }
    if case.ranks > 1 and case.adapter is None:
        forget_peak()
        write_out(trainer, folder)
        found["export"] = record.resident("VmHWM") - before
    return found


def write_out(trainer: Any, folder: Path) -> None:
    """Exports like a stage with a layout."""
    from finback.parallel.build import shares
    from finback.parallel.export import save_shares

    save_shares(trainer.config, shares(trainer.models, trainer.mesh), folder)


def against_plan(name: str) -> dict[str, Any]:
    """Measures one case in its own processes; returns it with the planner's figures."""
    case = CASES[name]
    meet = {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(free_port()), "GLOO_SOCKET_IFNAME": "lo"}
    with tempfile.TemporaryDirectory() as folder:
        children = [
            subprocess.Popen(
                [sys.executable, __file__, "--child", name, "--rank", str(rank), "--folder", folder],
                stdout=subprocess.PIPE,
                text=True,
                env=os.environ | meet,
            )
            for rank in range(case.ranks)
        ]
        found = [json.loads(child.communicate()[0].splitlines()[-1]) for child in children]
    worst: dict[str, Any] = max(found, key=lambda each: float(each["bytes"]))
    knobs = {
        **{"adapter": dataclasses.asdict(case.adapter) if case.adapter else None, "moments": case.moments},
        **{"batch_size": case.rows, "seq_len": case.tokens},
    }
    planned = tuning.memory(case.config, knobs, 0.0, layout=Layout(dp=case.ranks) if case.ranks > 1 else None)
    of_plan = {"planned": planned.total, "off": worst["bytes"] / planned.total - 1}
    if "export" in worst:
        most = max(each[moment] for each in found for moment in ("start", "bytes", "export"))
        of_plan["of_states"] = most / (16 * parameters(case.config))
    return {"case": name, **worst, **of_plan, "parts": dataclasses.asdict(planned)}


def summaries(cases: list[dict[str, Any]]) -> Iterator[tuple[str, float]]:
    """Summary figures over all measured cases."""
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
    parser.add_argument("--rank", type=int, default=0, help=argparse.SUPPRESS)
    parser.add_argument("--folder", type=Path, default=Path(), help=argparse.SUPPRESS)
    parser.add_argument("--out", type=Path)
    options = parser.parse_args()
    if options.child:
        print(json.dumps(measured(options.child, options.rank, options.folder)))
        return
    results = record.header("tuning_memory", {"models": {n: dataclasses.asdict(c.config) for n, c in CASES.items()}})
    results["cases"] = []
    for name in options.cases:
        results["cases"].append(against_plan(name))
        print(results["cases"][-1], file=sys.stderr, flush=True)
        record.write(results | dict(summaries(results["cases"])), options.out)


if __name__ == "__main__":
    main()
