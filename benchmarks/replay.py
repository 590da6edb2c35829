"""Routing replay: the gap between trainer and engine in 100 steps of RL, with and without it, on two ranks.

    python benchmarks/replay.py --seeds 0 1 2 --runs runs/replay

Each seed pre-trains a small mixture of experts on short sums and then runs the same RL four times: with replay and
without, in fp32, to which the limits apply, and in bf16, in which trainer and engine route many tokens differently.
This file is its own recipe. An interrupted call resumes.
"""

import argparse
import dataclasses
import json
import statistics
import subprocess
import sys
from pathlib import Path
from typing import Any

from finback.data.sources import Chitchat
from finback.model.config import TINY
from finback.runs.recipe import Stage
from finback.stages.grpo import GRPO
from finback.stages.prepare import Prepare, TaskText
from finback.stages.pretrain import Pretrain
from finback.tasks.math import Chains

LIMITS = {"gap_mean": 1e-5, "gap_max": 1e-4}
STEPS = 100
MODEL = dataclasses.replace(TINY, hidden_size=64, vocab_size=512, intermediate_size=128, n_routed_experts=16)
SUMS = Chains(2, 3)
RL = GRPO(
    name="replayed",
    start="base",
    task=SUMS,
    steps=STEPS,
    prompts_per_step=16,
    num_generations=8,
    max_tokens=24,
    patience=0,
    max_gap=1.0,
    routing_replay=True,
)
recipe: list[Stage] = [
    Prepare(
        name="prepare",
        text=(Chitchat(),),
        tasks=(TaskText(name="chains", tasks=(SUMS,), documents=20_000, think=0.5),),
        vocab_size=512,
    ),
    Pretrain(
        name="base",
        data="prepare",
        model=MODEL,
        mixture={"chitchat": 0.1, "chains": 0.9},
        compute="fp32",
        max_tokens=600_000,
        decay_tokens=100_000,
        warmup_tokens=20_000,
    ),
    RL,
    dataclasses.replace(RL, name="native", routing_replay=False),
    dataclasses.replace(RL, name="replayed-bf16", compute="bf16"),
    dataclasses.replace(RL, name="native-bf16", compute="bf16", routing_replay=False),
]


def measure(seed: int, ranks: int, runs: Path) -> dict[str, Any]:
    """One seed's gaps by stage, from the logs of its run."""
    folder = runs / f"seed-{seed}"
    command = [sys.executable, "-m", "finback", "run", __file__, "--runs", str(folder), "--seed", str(seed)]
    subprocess.run([*command, "--ranks", str(ranks)], check=True)
    found: dict[str, Any] = {"seed": seed}
    for name in ("replayed", "native", "replayed-bf16", "native-bf16"):
        log = [json.loads(line) for line in (folder / "replay" / name / "metrics.jsonl").read_text().splitlines()]
        lines = [line for line in log if "gap_mean" in line]
        found[name] = {
            "steps": len(lines),
            "gap_mean": statistics.fmean(line["gap_mean"] for line in lines),
            "gap_mean_of_the_worst_step": max(line["gap_mean"] for line in lines),
            "gap_max": max(line["gap_max"] for line in lines),
            "tokens_with_gradient": int(sum(line["tokens_with_gradient"] for line in lines)),
            "accuracy": [statistics.fmean(x["accuracy"] for x in part) for part in (lines[:10], lines[-10:])],
        }
    replayed = found["replayed"]
    worst = replayed["gap_mean_of_the_worst_step"]
    found["holds"] = worst <= LIMITS["gap_mean"] and replayed["gap_max"] <= LIMITS["gap_max"]
    return found


def main() -> None:
    """Measures the seeds and writes the result file after each."""
    from record import header, write  # imported here because finback also reads this file, as a recipe

    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--seeds", type=int, nargs="+", default=[0, 1, 2])
    parser.add_argument("--ranks", type=int, default=2)
    parser.add_argument("--runs", type=Path, default=Path("runs/replay"))
    parser.add_argument("--out", type=Path, default=Path("benchmarks/results/replay.json"))
    options = parser.parse_args()
    results = header("replay", {"ranks": options.ranks, "steps": STEPS, "limits": LIMITS})
    results["seeds"] = []
    for seed in options.seeds:
        results["seeds"].append(measure(seed, options.ranks, options.runs))
        write(results, options.out)


if __name__ == "__main__":
    main()
