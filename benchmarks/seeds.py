"""Run recipes/tiny.py and its shuffled-reward control for several seeds; write one table, failures included.

    python benchmarks/seeds.py --seeds 0 1 2 3 4 --runs runs/seeds
    python benchmarks/seeds.py --controls 0 --runs runs/bf16 --out benchmarks/results/seeds-bf16.json \
        --set zero.compute=bf16 --set zero.objective.correction.mode=token_truncate

An interrupted call resumes. In bf16 trainer and engine differ by rounding: the gap is reported, and has no limit.
"""

import argparse
import json
import statistics
import subprocess
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from record import header

LIMITS = {"before": 0.50, "after": 0.85, "greedy": 0.95, "growth": 1.5, "gap": 1e-4}


def finback(*arguments: str) -> dict[str, Any]:
    """Run a recipe and return its summary; its progress goes to the terminal."""
    command = [sys.executable, "-m", "finback", "run", *arguments, "--json"]
    return dict(json.loads(subprocess.run(command, check=True, stdout=subprocess.PIPE, text=True).stdout))


def measure(seed: int, runs: Path, with_control: bool, changes: Sequence[str]) -> dict[str, Any]:
    """One seed's figures, from the run's summary and logs."""
    folder = runs / f"seed-{seed}"
    settings = [word for change in changes for word in ("--set", change)]
    summary = finback("recipes/tiny.py", "--runs", str(folder), "--seed", str(seed), *settings)
    stages = summary["stages"]
    before, after = (exams(stages[name]) for name in ("before", "after"))
    log = [json.loads(line) for line in (folder / "tiny/zero/metrics.jsonl").read_text().splitlines()]
    pretraining = [json.loads(line) for line in (folder / "tiny/base/metrics.jsonl").read_text().splitlines()]
    late = [r for r in pretraining if "loss" in r][-100:]
    controlled = control(seed, folder) if with_control else None
    growth = after["sampled"]["mean_tokens"] / before["sampled"]["mean_tokens"]
    gap = max(r["gap_max"] for r in log if "gap_max" in r)
    return {
        "seed": seed,
        "probe_reached": stages["base"]["results"]["probe_reached"],
        "pretraining_tokens": stages["base"]["results"]["tokens"],
        "precision": stages["base"]["results"]["precision"],
        "seconds": {name: stage["cost"]["wall_seconds"] for name, stage in stages.items()},
        "before": before,
        "after": after,
        "control": controlled,
        "length_growth": growth,
        "gap_max": gap,
        "gap_mean": statistics.fmean(r["gap_mean"] for r in log if "gap_mean" in r),
        "bits_per_byte": [stages[name]["results"]["bits_per_byte"]["chitchat"] for name in ("before", "after")],
        "max_violation_last_100": max(r["max_violation"] for r in late),
        "idle_experts_last_100": max(r["idle_experts"] for r in late),
        "holds": {
            "before <= 50 %": before["sampled"]["accuracy"] <= LIMITS["before"],
            "after >= 85 %": after["sampled"]["accuracy"] >= LIMITS["after"],
            "greedy >= 95 %": after["greedy"]["accuracy"] >= LIMITS["greedy"],
            "length x 1.5": growth >= LIMITS["growth"],
            "gap <= 1e-4": gap <= LIMITS["gap"] if "zero.compute=bf16" not in changes else None,
            "control gains nothing": controlled["sampled"]["interval"][0] <= before["sampled"]["interval"][1]
            if controlled
            else None,
        },
    }


def control(seed: int, folder: Path) -> dict[str, dict[str, Any]]:
    """The exams after the same RL with shuffled rewards."""
    base = f"zero.start={folder / 'tiny/base'}"
    summary = finback("recipes/control.py", "--runs", str(folder), "--seed", str(seed), "--set", base)
    return exams(summary["stages"]["after"])


def exams(stage: dict[str, Any]) -> dict[str, dict[str, Any]]:
    """A stage's evaluations by name."""
    return {e["exam"]: e for e in stage["results"]["evaluations"]}


def table(rows: list[dict[str, Any]]) -> str:
    """The rows as Markdown."""
    lines = [
        "| seed | sampled before | sampled after | greedy after | tokens | thinks | control | gap | all hold |",
        "|---|---|---|---|---|---|---|---|---|",
    ]
    for r in rows:
        b, a = r["before"]["sampled"], r["after"]["sampled"]
        shuffled = r["control"]["sampled"]["accuracy"] if r["control"] else None
        lines.append(
            f"| {r['seed']} | {b['accuracy']:.1%} | {a['accuracy']:.1%} | {r['after']['greedy']['accuracy']:.1%} "
            f"| {b['mean_tokens']:.1f} -> {a['mean_tokens']:.1f} | {b['thinks']:.0%} -> {a['thinks']:.0%} "
            f"| {f'{shuffled:.1%}' if shuffled is not None else '-'} | {r['gap_max']:.0e} "
            f"| {'NO' if False in r['holds'].values() else 'yes'} |"
        )
    return "\n".join(lines)


def main() -> None:
    """Measures the seeds and writes the result file after each."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--seeds", type=int, nargs="+", default=[0, 1, 2, 3, 4])
    parser.add_argument("--controls", type=int, default=1, help="for how many of the seeds to run the control")
    parser.add_argument("--set", action="append", default=[], metavar="STAGE.KNOB=VALUE", dest="changes")
    parser.add_argument("--runs", type=Path, default=Path("runs/seeds"))
    parser.add_argument("--out", type=Path, default=Path("benchmarks/results/seeds.json"))
    arguments = parser.parse_args()
    rows: list[dict[str, Any]] = []
    found = header("seeds", {"changes": arguments.changes}) | {"limits": LIMITS}
    for seed in arguments.seeds:
        rows.append(measure(seed, arguments.runs, len(rows) < arguments.controls, arguments.changes))
        arguments.out.parent.mkdir(parents=True, exist_ok=True)
        arguments.out.write_text(json.dumps(found | {"seeds": rows}, indent=1) + "\n")
        print(table(rows))


if __name__ == "__main__":
    main()
