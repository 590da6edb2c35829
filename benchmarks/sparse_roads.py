"""recipes/v32_tiny.py and recipes/v4_tiny.py for several seeds, compared with the dense quickstart's base of the same seed.

    python benchmarks/sparse_roads.py --seeds 1 2 3 --runs runs/sparse

Each seed prepares and pre-trains recipes/tiny.py first. An interrupted call resumes; the result file is
written after each recipe, and seeds that it already has are skipped.
"""

import argparse
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from record import over_seeds
from seeds import exams, finback

LOST_BITS, LOST_POINTS = 0.01, 0.02  # most that a model may lose by becoming sparse
RECIPES = ("v32_tiny", "v4_tiny")


def base(seed: int, runs: Path) -> Path:
    """The run of recipes/tiny.py whose text and base both recipes use; its RL is cut to one step."""
    finback("recipes/tiny.py", "--runs", str(runs), "--seed", str(seed), "--set", "zero.steps=1")
    return runs / "tiny"


def road(name: str, seed: int, runs: Path, tiny: Path) -> dict[str, Any]:
    """One recipe: bits per byte and exams of every model, tokens and seconds."""
    stages = ["dense", "indexers", "sparse", "before", "after"] if name == "v32_tiny" else ["base", "before", "after"]
    changes = [f"{stage}.data={tiny / 'prepare'}" for stage in stages]
    if name == "v32_tiny":
        changes += [f"{stage}.start={tiny / 'base'}" for stage in ("dense", "indexers")]
    settings = [word for change in changes for word in ("--set", change)]
    summary = finback(f"recipes/{name}.py", "--runs", str(runs), "--seed", str(seed), *settings)
    found: dict[str, Any] = {}
    for stage, values in summary["stages"].items():
        results = values["results"]
        found[stage] = {"seconds": values["cost"]["wall_seconds"]}
        if "evaluations" in results:
            found[stage] |= {
                e: {k: v[k] for k in ("accuracy", "interval", "mean_tokens")} for e, v in exams(values).items()
            }
            found[stage]["bits_per_byte"] = results["bits_per_byte"]["chitchat"]
        elif "tokens" in results:
            found[stage]["tokens"] = results["tokens"]
    return found


def measure(row: dict[str, Any], options: argparse.Namespace) -> Iterator[None]:
    """Adds each recipe that a seed lacks."""
    for name in RECIPES:
        if name not in row:
            own = (options.runs / f"seed-{row['seed']}").absolute()
            row[name] = road(name, row["seed"], own, base(row["seed"], own))
            yield


def verdicts(seeds: list[dict[str, Any]]) -> dict[str, Any]:
    """The violated limits on what a dense model may lose by becoming sparse."""
    found = []
    for row in seeds:
        dense, sparse = row["v32_tiny"]["dense"], row["v32_tiny"]["before"]
        bits = sparse["bits_per_byte"] - dense["bits_per_byte"]
        points = dense["sampled"]["accuracy"] - sparse["sampled"]["accuracy"]
        if bits > LOST_BITS or points > LOST_POINTS:
            found.append(f"seed {row['seed']}: turning sparse costs {bits:.3f} bits per byte and {points:.1%} of sums")
    return {"does_not_hold": found}


def main() -> None:
    """Measures the seeds and writes the result file after each."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--seeds", type=int, nargs="+", default=[1, 2, 3])
    parser.add_argument("--runs", type=Path, default=Path("runs/sparse"))
    parser.add_argument("--out", type=Path, default=Path("benchmarks/results/sparse_roads.json"))
    options = parser.parse_args()
    over_seeds("sparse_roads", {}, options, measure, verdicts)


if __name__ == "__main__":
    main()
