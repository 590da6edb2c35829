"""R1-Zero through a fleet on Ray, with answers that are 0, 1 and 4 updates old, and 4 without a correction.

    python benchmarks/staleness.py --seeds 1 2 3 --runs runs/staleness

Each seed pre-trains a small MLA mixture of experts on the text of recipes/tiny.py, then runs the same RL from it four
times, with a `Fleet(2)` that generates. `--engine vllm --python /path/to/python` generates with vLLM. On two cores
generating takes longer than learning, so answers would be fresh whatever is allowed: each update of an asynchronous
run sleeps for `--delay` seconds, in which the engines get as far ahead as they may.
Needs Ray (`.venv/scale` of `make test-scale`). An interrupted run resumes; the result file is written after each
variant, and those that it already has are skipped.
"""

import argparse
import dataclasses
import json
import statistics
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from overlap import DelayedLearning
from record import over_seeds
from vllm_rollouts import ENVIRONMENT, FLAGS

import finback
from finback.model.config import TINY
from finback.rollouts.fleet import Fleet
from finback.runs.folder import StageRun
from finback.runs.recipe import Stage
from finback.stages.evaluate import Evaluate
from finback.stages.grpo import GRPO
from finback.stages.pretrain import Pretrain
from finback.train import loop
from finback.train.correction import Correction
from finback.train.grpo_loss import Objective

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))
from recipes.tiny import chains, exams, recipe

LEAST, APART = 0.8, 0.05  # minimum accuracy in every seed; largest difference from staleness 0
# V3.2's mask, which leaves the clip relative to the engine's probabilities; with token_truncate four updates diverge (docs/log.md)
CORRECTED = Objective(correction=Correction(off_policy_mask_threshold=0.1))
WAYS = {
    "staleness-0": (0, Objective()),
    "staleness-1": (1, CORRECTED),
    "staleness-4": (4, CORRECTED),
    "staleness-4-uncorrected": (4, Objective()),
}
# recipes/tiny.py's model with attention of 32 + 32, which vLLM's CPU kernels have, and without MTP, which they cannot load
MODEL = dataclasses.replace(TINY, qk_rope_head_dim=32, num_nextn_predict_layers=0, max_position_embeddings=256)


@dataclasses.dataclass(frozen=True)
class SlowGRPO(GRPO):
    """GRPO whose updates take `delay` seconds longer."""

    # seconds
    delay: float = 0.0

    def run(self, run: StageRun) -> dict[str, Any]:
        training = DelayedLearning(self, run, self.delay)
        try:
            return loop.run(training)
        finally:
            training.close()


def learning() -> list[Stage]:
    """Text and base of recipes/tiny.py."""
    prepare, base, *_ = recipe
    assert isinstance(base, Pretrain)
    return [prepare, dataclasses.replace(base, model=MODEL)]


def reinforcement(name: str, options: argparse.Namespace) -> list[Stage]:
    """The RL stage of one variant, and its exam."""
    staleness, objective = WAYS[name]
    program: dict[str, Any] = {}
    if options.engine == "vllm":
        env = tuple(f"{key}={value}" for key, value in ENVIRONMENT.items())
        program = {"python": options.python, "flags": FLAGS, "env": env, "concurrency": 128}
        program["reload_method"] = "reload_experts"
    rl = SlowGRPO(
        name=name,
        start="base",
        task=chains,
        steps=options.steps,
        prompts_per_step=options.prompts,
        max_staleness=staleness,
        objective=objective,
        rollouts=Fleet(options.engines, engine=options.engine, address=options.ray, **program),
        delay=options.delay if staleness else 0.0,
    )
    sampled = dataclasses.replace(exams[0], problems=options.problems)
    return [rl, Evaluate(name=f"after-{name}", start=name, exams=(sampled,))]


def measure(row: dict[str, Any], options: argparse.Namespace) -> Iterator[None]:
    """Runs what a seed lacks; adds accuracy, staleness and mismatch of each variant."""
    runs, stages = options.runs / f"seed-{row['seed']}", learning()
    for name in options.ways:
        stages += reinforcement(name, options)
        if name not in row:
            finback.run(stages, runs, name="rl", seed=row["seed"])
            row[name] = described(runs / "rl", name)
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
    if "staleness_shares" in steps[-1]:
        found["staleness_shares"] = [
            statistics.fmean(x) for x in zip(*(s["staleness_shares"] for s in steps), strict=True)
        ]
    return found


def verdicts(seeds: list[dict[str, Any]]) -> dict[str, Any]:
    """Returns the requirements that the results violate."""
    found = []
    for seed in seeds:
        first = seed.get("staleness-0", {"sampled": 0.0})["sampled"]
        for name in sorted(seed.keys() & {"staleness-0", "staleness-1", "staleness-4"}):
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
    parser.add_argument("--seeds", type=int, nargs="+", default=[1, 2, 3])
    parser.add_argument("--ways", nargs="+", choices=WAYS, default=list(WAYS))
    parser.add_argument("--engines", type=int, default=2)
    parser.add_argument("--steps", type=int, default=100)
    parser.add_argument("--prompts", type=int, default=32)
    parser.add_argument("--problems", type=int, default=600)
    parser.add_argument("--delay", type=float, default=1.0, help="seconds that an asynchronous update takes longer")
    parser.add_argument("--runs", type=Path, default=Path("runs/staleness"))
    parser.add_argument("--out", type=Path, default=Path("benchmarks/results/staleness.json"))
    options = parser.parse_args()
    knobs = {name: getattr(options, name) for name in ("engine", "engines", "steps", "prompts", "problems", "delay")}
    results = over_seeds("staleness", knobs, options, measure, verdicts)
    if results["does_not_hold"]:
        raise SystemExit("\n".join(results["does_not_hold"]))


if __name__ == "__main__":
    main()
