"""Run recipes/r1.py for several seeds: every model's exams, the three students, the cost; one table, failures included.

    python benchmarks/road.py --seeds 0 1 2 --runs runs/road

An interrupted call resumes.
"""

import argparse
import json
from pathlib import Path
from typing import Any

from record import machine
from seeds import exams, finback


def measure(seed: int, runs: Path) -> dict[str, Any]:
    """One seed's figures, from the run's summary and logs."""
    folder = runs / f"seed-{seed}"
    stages = finback("recipes/r1.py", "--runs", str(folder), "--seed", str(seed))["stages"]
    models = {s["results"]["model"]: exams(s) for s in stages.values() if s["stage"] == "Evaluate"}
    gaps = {}
    for name, stage in stages.items():
        if stage["stage"] == "GRPO":
            lines = map(json.loads, (folder / "r1" / name / "metrics.jsonl").read_text().splitlines())
            gaps[name] = max(line["gap_max"] for line in lines if "gap_max" in line)
    return {
        "seed": seed,
        "probe_reached": stages["base"]["results"]["probe_reached"],
        "seconds": {name: stage["cost"]["wall_seconds"] for name, stage in stages.items()},
        "total_seconds": sum(stage["cost"]["wall_seconds"] for stage in stages.values()),
        "money_usd": sum(stage["cost"]["money_usd"] for stage in stages.values()),
        "models": models,
        "gap_max": gaps,
        "kept": {name: s["results"] for name, s in stages.items() if s["stage"] == "Reject"},
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--seeds", type=int, nargs="+", default=[0, 1, 2])
    parser.add_argument("--runs", type=Path, default=Path("runs/road"))
    parser.add_argument("--out", type=Path, default=Path(__file__).parent / "results/road.json")
    given = parser.parse_args()
    rows = []
    for seed in given.seeds:
        rows.append(measure(seed, given.runs))
        given.out.write_text(json.dumps({"machine": machine(), "seeds": rows}, indent=1) + "\n")
        for name, taken in rows[-1]["models"].items():
            e = taken["sums"]
            print(
                f"seed {seed}  {name:13} sums {e['accuracy']:6.1%}  tokens {e['mean_tokens']:5.1f}  "
                f"language {e['language'] or 0:6.1%}  talk {taken['talk']['accuracy']:6.1%}"
            )


if __name__ == "__main__":
    main()
