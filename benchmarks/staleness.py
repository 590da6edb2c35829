"""R1-Zero through a fleet on Ray, with answers that are 0, 1 and 4 updates old, and 4 without a correction.

    python benchmarks/staleness.py --seeds 0 1 2 --runs runs/staleness

Each seed pre-trains the small MLA mixture of experts of benchmarks/vllm_rollouts.py on short sums, then runs the same
RL from it four times, with a `Fleet(2)` that generates. `--engine vllm --python /path/to/python` generates with vLLM.
Needs Ray (`.venv/scale` of `make test-scale`). An interrupted run resumes; the result file is written after each seed,
and seeds that it already has are skipped.
"""

import argparse
import json
import statistics
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from record import over_seeds
from vllm_rollouts import ENVIRONMENT, FLAGS, SUMS, learning

import finback
from finback.rollouts.fleet import Fleet
from finback.runs.recipe import Stage
from finback.stages.evaluate import Evaluate, Exam
from finback.stages.grpo import GRPO
from finback.train.correction import Correction
from finback.train.grpo_loss import Objective

LEAST, APART = 0.8, 0.05  # minimum accuracy in every seed; largest difference from staleness 0
CORRECTED = Objective(correction=Correction(mode="token_truncate"))
WAYS = {
    "staleness-0": (0, Objective()),
    "staleness-1": (1, CORRECTED),
    "staleness-4": (4, CORRECTED),
    "staleness-4-uncorrected": (4, Objective()),
}


def reinforcement(name: str, options: argparse.Namespace) -> list[Stage]:
    """The RL stage of one variant, and its exam."""
    staleness, objective = WAYS[name]
    program: dict[str, Any] = {}
    if options.engine == "vllm":
        env = tuple(f"{key}={value}" for key, value in ENVIRONMENT.items())
        program = {"python": options.python, "flags": FLAGS, "env": env, "reload_method": "reload_experts"}
    rl = GRPO(
        name=name,
        start="base",
        task=SUMS,
        steps=options.steps,
        prompts_per_step=options.prompts,
        num_generations=8,
        max_tokens=24,
        patience=0,
        max_staleness=staleness,
        objective=objective,
        rollouts=Fleet(2, engine=options.engine, address=options.ray, **program),
    )
    exam = Exam(name="sampled", task=SUMS, problems=options.problems, max_tokens=24)
    return [rl, Evaluate(name=f"after-{name}", start=name, exams=(exam,))]


def measure(row: dict[str, Any], options: argparse.Namespace) -> Iterator[None]:
    """Runs one seed; adds accuracy, staleness and mismatch of each variant."""
    if WAYS.keys() <= row.keys():
        return
    stages = [*learning(options.tokens), *(stage for name in WAYS for stage in reinforcement(name, options))]
    runs = options.runs / f"seed-{row['seed']}"
    finback.run(stages, runs, name="rl", seed=row["seed"])
    row |= {name: described(runs / "rl", name) for name in WAYS}
    yield


def described(root: Path, name: str) -> dict[str, Any]:
    """Returns a variant's logged metrics and scores."""
    lines = [json.loads(line) for line in (root / name / "metrics.jsonl").read_text().splitlines()]
    steps = [line for line in lines if "accuracy" in line]
    exam = json.loads((root / f"after-{name}" / "sampled.json").read_text())
    found = {"sampled": exam["accuracy"], "steps": len(steps), "accuracy_by_step": [s["accuracy"] for s in steps]}
    for key in ("mismatch_kl", "mismatch_chi2", "clip_share"):
        found[key] = statistics.fmean(s[key] for s in steps)
    for key in ("staleness", "trainer_idle", "engines_idle", "weights_cut"):
        if key in steps[-1]:
            found[key] = statistics.fmean(s[key] for s in steps)
    return found


def verdicts(seeds: list[dict[str, Any]]) -> dict[str, Any]:
    """Returns the requirements that the results violate."""
    found = []
    for seed in seeds:
        first = seed["staleness-0"]["sampled"]
        for name in ("staleness-0", "staleness-1", "staleness-4"):
            score = seed[name]["sampled"]
            if score < LEAST or score < first - APART:
                found.append(f"seed {seed['seed']}, {name}: {score:.1%} sampled, {first:.1%} in turn")
    return {"does_not_hold": found}


def main() -> None:
    """Measures the seeds and writes the result file after each."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--engine", choices=("finback", "vllm"), default="finback")
    parser.add_argument("--python", default=".venv/vllm/bin/python", help="of vLLM's environment")
    parser.add_argument("--ray", default="", help="of a Ray that runs; default one of this run's own")
    parser.add_argument("--seeds", type=int, nargs="+", default=[0, 1, 2])
    parser.add_argument("--steps", type=int, default=300)
    parser.add_argument("--prompts", type=int, default=16)
    parser.add_argument("--problems", type=int, default=400)
    parser.add_argument("--tokens", type=int, default=1_500_000, help="of pre-training")
    parser.add_argument("--runs", type=Path, default=Path("runs/staleness"))
    parser.add_argument("--out", type=Path, default=Path("benchmarks/results/staleness.json"))
    options = parser.parse_args()
    knobs = {name: getattr(options, name) for name in ("engine", "steps", "prompts", "problems", "tokens")}
    results = over_seeds("staleness", knobs, options, measure, verdicts)
    if results["does_not_hold"]:
        raise SystemExit("\n".join(results["does_not_hold"]))


if __name__ == "__main__":
    main()
