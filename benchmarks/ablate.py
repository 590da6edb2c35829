"""Compares Muon with AdamW, and MTP with no MTP, on the tiny model and real text, with several seeds.

    python benchmarks/ablate.py --tokens 1000000 --seeds 0 1 2 --runs runs/ablate

Each optimiser first tries a few learning rates with a separate seed, and takes the one with the fewest bits per byte of
validation text. All four combinations then train on the same rows. An interrupted call resumes.
"""

import argparse
import multiprocessing
import os
import signal
import statistics
import sys
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import record
import torch
from driver import CORES, say
from text import prepare

from finback.model.config import TINY
from finback.model.count import parameters
from finback.parallel.launch import die_with_parent
from finback.parallel.mesh import World
from finback.runs import recipe as recipes
from finback.runs.files import read_json, read_lines
from finback.runs.folder import StageRun
from finback.stages.pretrain import Pretrain
from finback.tasks.math import Chains

RATES = {"muon": (1e-3, 2e-3, 4e-3, 8e-3), "adamw": (5e-4, 1e-3, 2e-3, 4e-3)}
TRIAL_SEED = 100

Plan = tuple[str, float, bool, int]  # optimiser, its rate, with MTP, seed


def stage(plan: Plan, options: argparse.Namespace) -> Pretrain:
    """One run; AdamW's rate for the parameters that Muon does not train is the same in all of Muon's runs."""
    optimizer, rate, mtp, seed = plan
    tokens = options.tokens
    return Pretrain(
        name=f"{optimizer}-{rate * 1e4:g}e-4-{'mtp' if mtp else 'plain'}-{seed}",
        data=str(options.runs / "prepare"),
        model=replace(TINY, num_nextn_predict_layers=int(mtp)),
        mixture={"chitchat": 1.0},
        max_tokens=tokens,
        decay_tokens=tokens // 4,
        warmup_tokens=tokens // 25,
        optimizer=optimizer,  # type: ignore[arg-type]
        muon_lr=rate,
        adam_lr=rate if optimizer == "adamw" else 8e-3,
        compute="bf16",
        checkpoint_steps=100,
    )


def train(plan: Plan, options: argparse.Namespace, parent: int) -> None:
    """One run from its last checkpoint to its end, in this process."""
    die_with_parent(parent)
    signal.signal(signal.SIGINT, signal.SIG_DFL)
    torch.set_num_threads(1)
    pretrain = stage(plan, options)
    recipes.execute(recipes.Recipe("ablate", (pretrain,)), options.runs, plan[3], World(), _nothing, quiet=True)


def _nothing(run: StageRun) -> None:
    pass


def train_all(plans: Sequence[Plan], options: argparse.Namespace) -> list[dict[str, Any]]:
    """Executes all runs, one per core at a time; returns their figures."""
    context = multiprocessing.get_context("spawn")
    for start in range(0, len(plans), CORES):
        now = plans[start : start + CORES]
        processes = [context.Process(target=train, args=(plan, options, os.getpid())) for plan in now]
        for process in processes:
            process.start()
        for process, plan in zip(processes, now, strict=True):
            process.join()
            if process.exitcode:
                sys.exit(f"{stage(plan, options).name} failed")
        say(", ".join(stage(plan, options).name for plan in now))
    return [outcome(plan, options) for plan in plans]


def outcome(plan: Plan, options: argparse.Namespace) -> dict[str, Any]:
    """A finished run's figures; those of the routers over its last tenth."""
    folder = options.runs / stage(plan, options).name
    said = read_json(folder / "manifest.json")["results"]
    lines = [r for r in read_lines(folder / "metrics.jsonl") if "loss" in r]
    late = lines[-max(1, len(lines) // 10) :]
    optimizer, rate, mtp, seed = plan
    return {
        "optimizer": optimizer,
        "rate": rate,
        "mtp": mtp,
        "seed": seed,
        "tokens": said["tokens"],
        "bits_per_byte": said["bits_per_byte"]["chitchat"],
        "loss": statistics.fmean(r["loss"] for r in late),
        "max_violation": statistics.fmean(r["max_violation"] for r in late),
        "idle_experts": max(r["idle_experts"] for r in late),
        "skipped": said["skipped_steps"],
    }


def told(rows: Sequence[dict[str, Any]], optimizer: str, mtp: bool) -> str:
    """One line of the table: mean and range over seeds."""
    bits = [r["bits_per_byte"] for r in rows if (r["optimizer"], r["mtp"]) == (optimizer, mtp)]
    violation = [r["max_violation"] for r in rows if (r["optimizer"], r["mtp"]) == (optimizer, mtp)]
    return (
        f"{optimizer:6} {'MTP' if mtp else 'no MTP':6} bits per byte {statistics.fmean(bits):.4f} "
        f"({min(bits):.4f} to {max(bits):.4f}), max violation {statistics.fmean(violation):.2f}"
    )


def main() -> None:
    """Write benchmarks/results/ablate-<cpu>.json."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--tokens", type=int, default=1_000_000)
    parser.add_argument("--seeds", type=int, nargs="+", default=[0, 1, 2])
    parser.add_argument("--runs", type=Path, default=Path("runs/ablate"))
    parser.add_argument("--out", type=Path, help="results file")
    options = parser.parse_args()
    options.runs = options.runs.resolve()
    options.runs.mkdir(parents=True, exist_ok=True)
    prepare(options.runs, Chains())
    trials = train_all([(o, rate, True, TRIAL_SEED) for o, rates in RATES.items() for rate in rates], options)
    best = {o: min((r for r in trials if r["optimizer"] == o), key=lambda r: r["bits_per_byte"])["rate"] for o in RATES}
    say(f"learning rates taken: {best}")
    rows = train_all(
        [(o, best[o], mtp, seed) for o in RATES for mtp in (True, False) for seed in options.seeds], options
    )
    results = record.header(
        "ablate", {"tokens": options.tokens, "seeds": options.seeds, "parameters": parameters(TINY), "text": "chitchat"}
    )
    results |= {"trials": trials, "rates": best, "runs": rows}
    record.write(results, options.out)
    for optimizer in RATES:
        for mtp in (True, False):
            say(told(rows, optimizer, mtp))


if __name__ == "__main__":
    main()
