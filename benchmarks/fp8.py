"""FP8 against bf16: trains the same model on the same rows and seed in both, and compares their losses.

    python benchmarks/fp8.py --size 10m --steps 2000 --runs runs/fp8

Every precision trains in its own process with --threads threads, all at once. After Ctrl-C or a kill, the next call
resumes from the last checkpoints; --report compares what has been logged so far. Without a Hopper GPU FP8 is emulated:
the numbers are FP8's, the speed is not.
"""

import argparse
import dataclasses
import multiprocessing
import os
import signal
import statistics
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import record
import torch
from driver import say
from sizes import SIZES
from text import prepare

from finback.config import UserError
from finback.model.config import ModelConfig
from finback.model.count import parameters
from finback.parallel.launch import die_with_parent
from finback.parallel.mesh import World
from finback.runs import recipe as recipes
from finback.runs.files import read_json, read_lines
from finback.runs.folder import Interrupted, StageRun, prepare_folder
from finback.runs.ledger import spent
from finback.stages.pretrain import Pretrain
from finback.tasks.math import Chains

PRECISIONS = ("bf16", "fp8", "fp32")


def stage(precision: str, options: argparse.Namespace) -> Pretrain:
    """The stage of one precision; everything but the precision is the same."""
    step = options.rows * options.length
    return Pretrain(
        name=precision,
        data=str(options.runs / "prepare"),
        model=SIZES[options.size],
        mixture={"chitchat": 1.0},
        max_tokens=options.steps * step,
        decay_tokens=options.steps // 5 * step,
        warmup_tokens=options.steps // 50 * step,
        batch_size=options.rows,
        seq_len=options.length,
        muon_lr=options.lr,
        adam_lr=options.lr,
        compute=precision,  # type: ignore[arg-type]
    )


def train(precision: str, options: argparse.Namespace, parent: int) -> None:
    """Trains one precision from its last checkpoint to the end, in this process."""
    die_with_parent(parent)
    torch.set_num_threads(options.threads)

    def watch(run: StageRun) -> None:
        def stop(*_: object) -> None:
            run.stop_requested = True

        signal.signal(signal.SIGINT, stop)

    plan, root = recipes.Recipe(f"fp8-{precision}", (stage(precision, options),)), options.runs / precision
    try:
        prepare_folder(root)
        recipes.claim(plan, root, options.seed)
        recipes.execute(plan, root, options.seed, World(), watch)
    except Interrupted:
        say(f"{precision}: stopped; start again to resume")
        sys.exit(1)
    except UserError as error:
        say(f"{precision}: {error}")
        sys.exit(2)


def train_all(options: argparse.Namespace) -> bool:
    """Trains all precisions at once; returns whether all finished."""
    context = multiprocessing.get_context("spawn")
    processes = [
        context.Process(target=train, args=(precision, options, os.getpid())) for precision in options.precisions
    ]
    for process in processes:
        process.start()
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # the children handle it, and stop at a safe point
    for process in processes:
        process.join()
    return all(process.exitcode == 0 for process in processes)


def smooth(losses: Sequence[float], window: int) -> list[float]:
    """Means over the last `window` steps, from step `window` on."""
    return [statistics.fmean(losses[end - window : end]) for end in range(window, len(losses) + 1)]


def gap(losses: Sequence[float], base: Sequence[float], window: int) -> dict[str, float]:
    """(loss - base) / base of smoothed losses: at the end, its mean, and the one farthest from 0; the last two from
    a tenth of the run on.
    """
    steps = min(len(losses), len(base))
    pairs = zip(smooth(losses[:steps], window), smooth(base[:steps], window), strict=True)
    relative = [(ours - theirs) / theirs for ours, theirs in pairs]
    late = relative[max(0, steps // 10 - window) :]
    return {"end": relative[-1], "mean": statistics.fmean(late), "farthest": max(late, key=abs)}


def report(options: argparse.Namespace) -> dict[str, Any]:
    """The content of the results file: every loss, the gaps to bf16, and bits per byte of validation text."""
    config: ModelConfig = dataclasses.replace(SIZES[options.size], vocab_size=1024)
    kept = {k: v for k, v in vars(options).items() if k not in ("runs", "out", "report")}
    counts = {"parameters": parameters(config), "active_parameters": parameters(config, active=True)}
    results = record.header("fp8", kept | counts | {"model": dataclasses.asdict(config)})
    folders = {p: options.runs / p / p for p in options.precisions}
    losses = {p: [r["loss"] for r in read_lines(f / "metrics.jsonl") if "loss" in r] for p, f in folders.items()}
    window = min(options.window, min(map(len, losses.values())))
    if window < 1:
        raise UserError("--runs", str(options.runs), "nothing has been logged yet", "Train first.")
    results["window"] = window
    results["gap_to_bf16"] = {p: gap(own, losses["bf16"], window) for p, own in losses.items() if p != "bf16"}
    results["runs"] = {p: figures(folder, losses[p], window) for p, folder in folders.items()}
    results["losses"] = losses
    return results


def figures(folder: Path, losses: Sequence[float], window: int) -> dict[str, Any]:
    """One run: steps, its smoothed last loss, seconds, and the results of a finished stage."""
    found = {"steps": len(losses), "loss_at_end": smooth(losses, window)[-1], "seconds": spent(folder)["seconds"]}
    if (folder / "manifest.json").is_file():
        said = read_json(folder / "manifest.json")["results"]
        found |= {k: said[k] for k in ("tokens", "bits_per_byte", "router_last_100_steps")}
    return found


def _options() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--size", choices=("tiny", "10m"), default="10m")
    parser.add_argument("--steps", type=int, default=2000)
    parser.add_argument("--rows", type=int, default=32, help="rows per step")
    parser.add_argument("--length", type=int, default=128, help="tokens per row")
    parser.add_argument("--lr", type=float, default=4e-3, help="of Muon and of AdamW")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--precisions", nargs="+", choices=PRECISIONS, default=["bf16", "fp8"])
    parser.add_argument("--threads", type=int, default=1, help="of each process")
    parser.add_argument("--window", type=int, default=100, help="steps that a smoothed loss is the mean of")
    parser.add_argument("--runs", type=Path, default=Path("runs/fp8"))
    parser.add_argument("--report", action="store_true", help="train nothing, compare what is logged")
    parser.add_argument("--out", type=Path, help="results file")
    options = parser.parse_args()
    if "bf16" not in options.precisions:
        parser.error("--precisions: bf16 must be among them, the others are compared with it")
    return options


def main() -> None:
    """Train what is not yet trained, then write benchmarks/results/fp8-<cpu>.json."""
    options = _options()
    options.runs = options.runs.resolve()
    if not options.report:
        prepare_folder(options.runs)
        prepare(options.runs, Chains())
        if not train_all(options):
            sys.exit(1)
    try:
        results = report(options)
    except UserError as error:
        sys.exit(str(error))
    record.write(results, options.out)
    for precision, found in results["gap_to_bf16"].items():
        numbers = ", ".join(f"{name} {value:+.3%}" for name, value in found.items())
        say(f"{precision} against bf16, means of {results['window']} steps: {numbers}")


if __name__ == "__main__":
    main()
