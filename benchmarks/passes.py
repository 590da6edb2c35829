"""Compares pre-training steps with the C++ passes between products and with torch's operators, in alternating rounds.

One process or as many one-thread ranks as there are cores, AdamW, nothing compiled. The share of the GEMM peak counts a
step's products, as in pretrain.py.
"""

import argparse
import dataclasses
import os
import tempfile
from multiprocessing.connection import Connection
from pathlib import Path
from typing import Any

import driver
import gemm
import record
from driver import CORES, Contestant, Settings
from gemm import DTYPES
from pretrain import race, summarise
from pretrain_contestants import LENGTH, config_of, finback_worker
from sizes import SIZES
from text import prepare

from finback.tasks.math import Chains

FORMS = {"C++": "1", "torch": "0"}


def worker(pipe: Connection, settings: Settings) -> None:
    """The pre-training stage's own step, with or without the kernels."""
    os.environ["FINBACK_NATIVE"] = FORMS[settings["form"]]
    finback_worker(pipe, settings)


def contestant(common: Settings, form: str, precision: str) -> Contestant:
    """As many one-thread ranks as there are cores."""
    settings = common | {
        "optimiser": "adamw",
        "precision": precision,
        "mtp": False,
        "compile": False,
        "weights": "fp32",
        "form": form,
    }
    return Contestant(f"{form} {precision} {CORES}x1", worker, settings, CORES, 1)


def run(options: argparse.Namespace, folder: Path) -> dict[str, Any]:
    """Prepares and races."""
    size = SIZES[options.size]
    common = {"folder": str(folder), "rows": options.rows, "layers": size.num_hidden_layers, "size": options.size}
    shown = {"model": dataclasses.asdict(config_of(common)), "rows": options.rows, "length": LENGTH}
    results = record.header(f"passes-{options.size}", shown | {"rounds": options.rounds, "steps": options.steps})
    prepare(folder, Chains(), size.vocab_size)
    field, probes = driver.Field(""), gemm.contestants()
    try:
        driver.start(probes)
        raced = field.enter([contestant(common, form, p) for p in DTYPES for form in FORMS], at_once=1)
        race(raced, probes, options.rounds, options.steps)
        results["gemm_peak_flops"] = gemm.results(probes)
        tokens = options.rows * LENGTH * options.steps
        results["contestants"] = summarise(raced, results["gemm_peak_flops"], tokens)
        seconds = {c.name: c.record["seconds"] for c in raced}
        pairs = [tuple(f"{form} {p} {CORES}x1" for form in FORMS) for p in DTYPES]
        results["ratios"] = [record.versus("C++ / torch", a, b, seconds[a], seconds[b]) for a, b in pairs]
    finally:
        for each in (*field.contestants, *probes):
            each.stop()
    return results


def main() -> None:
    """Run and write benchmarks/results/passes-<size>-<cpu>.json."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--size", choices=SIZES, default="tiny")
    parser.add_argument("--rows", type=int, default=32, help="rows per step over all ranks")
    parser.add_argument("--rounds", type=int, default=7)
    parser.add_argument("--steps", type=int, default=2, help="steps per turn")
    parser.add_argument("--out", type=Path, help="results file")
    options = parser.parse_args()
    with tempfile.TemporaryDirectory() as folder:
        results = run(options, Path(folder))
    record.write(results, options.out)
    for ratio in results["ratios"]:
        driver.say(f"{ratio['median']:6.2f}  {ratio['over']} / {ratio['under']}")


if __name__ == "__main__":
    main()
