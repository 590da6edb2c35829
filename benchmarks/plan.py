"""Predicted against measured: peak memory and step time of pre-training, ten models and batches, real runs in processes.

    python benchmarks/plan.py                         calibrates first, then runs all ten; half an hour on an idle machine
    python benchmarks/plan.py --only 0 4 --steps 8    a quick look
    python benchmarks/plan.py --calibration FILE      with a calibration that exists

Every run is `finback run` of a recipe with one Pretrain stage. A rank's peak is its VmHWM in /proc, a step's time the
median over the last third of its metrics.jsonl: oneDNN compiles a bf16 product at its first use of a shape, and a
router produces new shapes for many steps. The plan predicts a step of a long run; the mean of all steps is recorded
too.
"""

import argparse
import dataclasses
import json
import os
import statistics
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

import psutil
from record import header, write

from finback.model.config import TINY, ModelConfig
from finback.planner import calibration_file, recipe_plan
from finback.planner.planned_stage import planned_stages
from finback.runs.recipe import config_json
from finback.stages.pretrain import Pretrain

DENSE = ModelConfig(
    vocab_size=1024,
    hidden_size=256,
    num_hidden_layers=6,
    num_attention_heads=8,
    intermediate_size=704,
    attention="gqa",
    num_key_value_heads=4,
    head_dim=32,
    max_position_embeddings=1024,
    initializer_range=0.02,
)
WIDE = dataclasses.replace(
    TINY,
    hidden_size=384,
    num_attention_heads=8,
    intermediate_size=1024,
    q_lora_rank=256,
    kv_lora_rank=128,
    n_routed_experts=16,
    moe_intermediate_size=192,
)
DEEP = dataclasses.replace(TINY, num_hidden_layers=10, first_k_dense_replace=2)

# model, rows over all ranks, tokens per row, arithmetic; calibration times none of them
CONFIGS: tuple[tuple[str, ModelConfig, int, int, str], ...] = (
    ("tiny", TINY, 32, 128, "fp32"),
    ("tiny, bf16", TINY, 32, 128, "bf16"),
    ("tiny, long rows", TINY, 8, 384, "fp32"),
    ("tiny, many experts", dataclasses.replace(TINY, n_routed_experts=24, num_experts_per_tok=4), 32, 96, "fp32"),
    ("deep", DEEP, 16, 128, "fp32"),
    ("wide", WIDE, 16, 128, "fp32"),
    ("wide, bf16", WIDE, 16, 128, "bf16"),
    ("dense", DENSE, 32, 128, "fp32"),
    ("dense, bf16", DENSE, 16, 256, "bf16"),
    ("no MTP", dataclasses.replace(WIDE, num_nextn_predict_layers=0, hidden_size=256), 24, 160, "fp32"),
)

RECIPE = """
import json
from finback.model.config import from_json
from finback.stages.pretrain import Pretrain

knobs = json.loads({knobs!r})
recipe = [
    Pretrain(name="base", mixture={{"chitchat": 1.0}}, **knobs | {{"model": from_json(knobs["model"])}}),
]
"""
# a separate recipe, so that its memory is not counted
DATA = """
from finback.data.sources import Chitchat
from finback.stages.prepare import Prepare

recipe = [Prepare(name="prepare", text=(Chitchat(),), vocab_size=1024)]
"""


def prepare(folder: Path) -> Path:
    """Tokenise the corpus once; returns the finished stage."""
    recipe = folder / "data.py"
    recipe.write_text(DATA, encoding="utf-8")
    command = [sys.executable, "-m", "finback", "run", str(recipe), "--runs", str(folder), "--ranks", "1"]
    subprocess.run(command, check=True, capture_output=True)
    return folder / "data" / "prepare"


def knobs_of(config: tuple[str, ModelConfig, int, int, str], steps: int, data: Path) -> dict[str, Any]:
    """The stage's knobs; no checkpoint is written in the measured steps."""
    from finback.model.config import to_json

    _, model, rows, length, compute = config
    tokens = steps * rows * length
    return {
        "data": str(data),
        "model": to_json(model),
        "rows": rows,
        "length": length,
        "compute": compute,
        "max_tokens": tokens,
        "decay_tokens": rows * length,
        "warmup_tokens": rows * length,
        "checkpoint_steps": 10_000,
    }


def run(config: tuple[str, ModelConfig, int, int, str], steps: int, ranks: int, data: Path) -> dict[str, Any]:
    """Trains for some steps; returns step times and peak memory."""
    with tempfile.TemporaryDirectory() as folder:
        recipe = Path(folder) / "measured.py"
        recipe.write_text(RECIPE.format(knobs=json.dumps(knobs_of(config, steps, data))), encoding="utf-8")
        command = [sys.executable, "-m", "finback", "run", str(recipe), "--runs", folder, "--ranks", str(ranks)]
        with subprocess.Popen(command, stdout=subprocess.DEVNULL, stderr=subprocess.PIPE, text=True) as process:
            peaks = watch(process)
            assert process.stderr is not None, "stderr was asked for"
            said = process.stderr.read()
        if process.returncode:
            raise SystemExit(f"{config[0]}: the run failed\n{said}")
        lines = (Path(folder) / "measured" / "base" / "metrics.jsonl").read_text(encoding="utf-8").splitlines()
    taken = [config[2] * config[3] / json.loads(line)["tokens_per_second"] for line in lines]
    late = taken[-max(1, len(taken) // 3) :]
    return {
        "step_seconds": statistics.median(late),
        "fastest_step": min(late),
        "mean_of_all": statistics.fmean(taken),
        "rank_peak_bytes": max(peaks),
    }


def watch(process: subprocess.Popen[str]) -> list[int]:
    """Largest VmHWM of each rank until the run ends; the parent, which holds no model, is left out."""
    peaks: dict[int, int] = {}
    while process.poll() is None:
        time.sleep(0.05)
        try:
            children = psutil.Process(process.pid).children(recursive=True)
        except psutil.NoSuchProcess:
            break
        for child in children:
            try:
                fields = Path(f"/proc/{child.pid}/status").read_text(encoding="utf-8").split()
                peaks[child.pid] = int(fields[fields.index("VmHWM:") + 1]) * 1024
            except (OSError, ValueError):  # it has just ended
                continue
    return list(peaks.values())


def compare(
    config: tuple[str, ModelConfig, int, int, str], calibration: dict[str, Any], steps: int, ranks: int, data: Path
) -> dict[str, Any]:
    """One configuration, predicted and measured."""
    name, model, rows, length, compute = config
    stage = Pretrain(
        name="base",
        data="prepare",
        model=model,
        mixture={"chitchat": 1.0},
        batch_size=rows,
        seq_len=length,
        compute=compute,  # type: ignore[arg-type]
        max_tokens=steps * rows * length,
    )
    said = recipe_plan.pretraining(planned_stages([config_json(stage)])[0], calibration, ranks)
    found = run(config, steps, ranks, data)
    row = {
        "name": name,
        "rows": rows,
        "length": length,
        "compute": compute,
        "ranks": ranks,
        "measured": found,
        "predicted": {
            "step_seconds": said["step_seconds"],
            "rank_peak_bytes": said["memory"]["total"],
            "parts": said["parts"],
            "memory": said["memory"],
        },
        "time_off": said["step_seconds"] / found["step_seconds"] - 1,
        "memory_off": said["memory"]["total"] / found["rank_peak_bytes"] - 1,
    }
    print(
        f"{name:20} step {found['step_seconds']:.3f} s, predicted {row['time_off']:+.1%}; "
        f"peak {found['rank_peak_bytes'] / 1e6:,.0f} MB, predicted {row['memory_off']:+.1%}",
        flush=True,
    )
    return row


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--only", type=int, nargs="*", help="numbers of configurations, from 0")
    parser.add_argument("--steps", type=int, default=96)
    parser.add_argument("--ranks", type=int, default=len(os.sched_getaffinity(0)))
    parser.add_argument("--calibration", type=Path)
    parser.add_argument("--out", type=Path, help="default benchmarks/results/plan-<cpu>.json")
    arguments = parser.parse_args()
    with tempfile.TemporaryDirectory() as folder:
        path = arguments.calibration or Path(folder) / "calibration.json"
        if arguments.calibration is None:
            command = [sys.executable, "-m", "finback", "plan", "--calibrate", "--calibration", str(path)]
            subprocess.run([*command, "--ranks", str(arguments.ranks)], check=True)
        calibration = calibration_file.read(path)
        chosen = [CONFIGS[i] for i in arguments.only] if arguments.only else list(CONFIGS)
        results = header("plan", {"steps": arguments.steps, "ranks": arguments.ranks})
        data = prepare(Path(folder))
        rows = [compare(c, calibration, arguments.steps, arguments.ranks, data) for c in chosen]
    results |= {
        "calibration": calibration,
        "configurations": rows,
        "worst_time_off": max(abs(row["time_off"]) for row in rows),
        "worst_memory_off": max(abs(row["memory_off"]) for row in rows),
    }
    write(results, arguments.out)


if __name__ == "__main__":
    main()
