"""Pre-training tokens per second: finback against transformers' DeepseekV3ForCausalLM, same shapes, same rows.

A step is everything training does: read rows, forward, backward, exchange between ranks, clip, optimiser.
"""

import argparse
import dataclasses
import os
import re
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager, nullcontext
from pathlib import Path
from typing import Any

import driver
import gemm
import qualify
import record
from driver import CORES, Contestant, Settings
from pretrain_contestants import (
    LENGTH,
    compiled_peers,
    config_of,
    dtype_of,
    eager_peers,
    finback_contestants,
    ranked_peers,
)
from sizes import SIZES
from text import prepare

from finback.model.count import training_flops
from finback.tasks.math import Chains

TRIAL_STEPS = 2
SINGLE, RANKS = f"1x{CORES}", f"{CORES}x1"


def race(
    contestants: Sequence[Contestant], probes: Sequence[Contestant], options: argparse.Namespace, until: float
) -> None:
    """Runs the alternating rounds while there is time, at least two; the GEMM probe runs first in each."""

    def take(contestant: Contestant, seconds: float, replies: list[Any]) -> None:
        contestant.record.setdefault("seconds", []).append(seconds)
        contestant.record["last_loss"] = replies[0]

    for number in range(options.rounds):
        if number > 1 and time.monotonic() > until:
            break
        driver.turns(probes, 1, None, gemm.take)
        order = contestants if number % 2 == 0 else list(reversed(contestants))
        driver.turns(order, 1, options.steps, take)
        driver.say(f"round {number + 1} of {options.rounds}")


def _kind(size: str) -> Callable[[Contestant], str]:
    """Which settings of the peer compete for a place in the race: those of a precision, and the compiled ones."""
    if size == "100m":  # memory for one
        return lambda c: ""
    return lambda c: "compiled" if c.settings["compile"] else dtype_of(c)


def beside_busy(quiet: Sequence[Contestant], tokens: int, rounds: int) -> dict[str, Any]:
    """finback's layouts, without and with another process that keeps a core busy, one step each, alternating.

    All wait passively, as finback's launcher sets it; the threaded layout also by OpenMP's default, and actively.
    """
    base = next((c for c in quiet if c.layout == SINGLE), None)
    if base is None or CORES == 1:
        return {}
    extra = [
        dataclasses.replace(
            base,
            name=f"{base.name}, OMP_WAIT_POLICY {policy or 'unset'}",
            wait_policy=policy,
            spins=policy == "active",
            record={},
            processes=[],
            pipes=[],
        )
        for policy in (None, "active")
    ]
    everybody = [*quiet, *extra]
    try:
        driver.start(extra, at_once=1)
        seconds = _alone_and_busy(everybody, rounds)
    finally:
        for contestant in extra:
            contestant.stop()
    return {
        c.name: {"wait_policy": c.wait_policy or "unset", "seconds": seconds[c.name]}
        | {s: record.spread([tokens / t for t in times]) for s, times in seconds[c.name].items() if times}
        for c in everybody
    }


def _alone_and_busy(contestants: Sequence[Contestant], rounds: int) -> dict[str, dict[str, list[float]]]:
    seconds: dict[str, dict[str, list[float]]] = {c.name: {"alone": [], "busy": []} for c in contestants}
    for _ in range(rounds):
        for state in ("alone", "busy"):

            def take(c: Contestant, spent: float, replies: list[Any], state: str = state) -> None:
                seconds[c.name][state].append(spent)

            with _spinning() if state == "busy" else nullcontext():
                driver.turns(contestants, 1, 1, take)
    return seconds


@contextmanager
def _spinning() -> Iterator[None]:
    """Runs another program that keeps a core busy within the context."""
    code = "import os\nparent = os.getppid()\nwhile os.getppid() == parent: pass"
    with subprocess.Popen([sys.executable, "-c", code]) as other:
        time.sleep(0.2)
        try:
            yield
        finally:
            other.kill()


def summarise(contestants: Sequence[Contestant], peaks: dict[str, Any], tokens: int) -> dict[str, Any]:
    """Per contestant: settings, raw seconds, tokens per second, share of the GEMM peak of its layout."""
    out = {}
    for c in contestants:
        kept = {k: v for k, v in c.settings.items() if k not in ("folder", "rows", "layers")}
        entry = {"ranks": c.ranks, "threads": c.threads, **kept, **c.record}
        if "trial_seconds" in entry:
            entry["trial_tokens_per_second"] = c.settings["rows"] * LENGTH * TRIAL_STEPS / qualify.seconds(c)
        if seconds := entry.get("seconds"):
            rates = record.spread([tokens / s for s in seconds])
            flops = training_flops(config_of(c.settings), LENGTH / 2)
            entry["tokens_per_second"] = rates
            entry["share_of_gemm_peak"] = rates["median"] * flops / peaks[c.layout][dtype_of(c)]["median"]
        out[c.name] = entry
    return out


def ratios(contestants: Sequence[Contestant]) -> list[Settings]:
    """The ratios that are reported, each formed within a round."""
    raced = {c.name: c for c in contestants if c.record.get("seconds") and c.alive}
    median = {name: statistics.median(c.record["seconds"]) for name, c in raced.items()}

    def best(*patterns: str) -> str:
        names = [n for n in raced if all(re.search(p, n) for p in patterns)]
        return min(names, key=median.__getitem__, default="")

    p = default_precision(median)
    single, any_layout = best("^transformers", f" {SINGLE}$"), best("^transformers")
    # the faster of compiled and not, as for the peer
    ranks, one = (best("^finback adamw", layout) for layout in (f" {RANKS}$", f" {SINGLE}$"))
    pairs = [
        ("as it trains / best single process of the peer", f"finback muon {p} {RANKS}", single),
        ("as it trains / best of the peer in any layout", f"finback muon {p} {RANKS}", any_layout),
        ("as it trains, compiled / best of the peer in any layout", f"finback muon {p} compile {RANKS}", any_layout),
        ("same optimiser / best single process of the peer", ranks, single),
        ("same optimiser / best of the peer in any layout", ranks, any_layout),
        ("same optimiser, one process / best single process of the peer", one, single),
        (
            "same optimiser, fp32 / best fp32 of the peer, one process each",
            best("^finback adamw fp32", f" {SINGLE}$"),
            best("^transformers fp32", f" {SINGLE}$"),
        ),
        (
            "same optimiser, fp32 / best fp32 of the peer, one-thread ranks each",
            best("^finback adamw fp32", f" {RANKS}$"),
            best("^transformers fp32", f" {RANKS}$"),
        ),
        ("same optimiser, ranks / best of the peer as ranks", ranks, best("^transformers", f" {RANKS}$")),
        ("finback: compiled / not", f"finback adamw {p} compile {RANKS}", f"finback adamw {p} {RANKS}"),
        ("finback: ranks with exchange / threads", f"finback muon {p} {RANKS}", f"finback muon {p} {SINGLE}"),
        ("finback: all cores as ranks / one core", f"finback muon {p} {RANKS}", f"finback muon {p} 1x1"),
        ("finback: bf16 / fp32", f"finback muon bf16 {RANKS}", f"finback muon fp32 {RANKS}"),
        ("finback: Muon / AdamW", f"finback muon {p} {RANKS}", f"finback adamw {p} {RANKS}"),
        ("finback: with MTP / without", f"finback muon + MTP {p} {RANKS}", f"finback muon {p} {RANKS}"),
    ]
    return [
        record.versus(label, over, under, raced[over].record["seconds"], raced[under].record["seconds"])
        for label, over, under in pairs
        if over in raced and under in raced and over != under
    ]


def default_precision(seconds: dict[str, float]) -> str:
    """finback's `compute="auto"` rule, bf16 where it wins by 15 %, applied to the seconds of this run."""
    bf16, fp32 = (seconds.get(f"finback muon {p} {RANKS}", float("inf")) for p in ("bf16", "fp32"))
    return "bf16" if 1.15 * bf16 < fp32 else "fp32"


def _options() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--size", choices=SIZES, default="tiny", help="1.5, 10 or 100 M parameters")
    parser.add_argument("--rounds", type=int, default=7)
    parser.add_argument("--steps", type=int, default=2, help="steps per turn")
    parser.add_argument("--rows", type=int, default=32, help="rows per step over all ranks")
    parser.add_argument("--minutes", type=float, default=8.0, help="no round begins later, but the first two")
    parser.add_argument("--only", default="", help="take only contestants whose name matches this pattern")
    parser.add_argument(
        "--thorough",
        action="store_true",
        help="more settings of the peer, and a race beside a busy process; some minutes more",
    )
    parser.add_argument("--smoke", action="store_true", help="two layers, four rows, one round: does it run?")
    parser.add_argument("--out", type=Path, help="results file")
    options = parser.parse_args()
    if options.smoke:
        options.rounds, options.steps, options.rows = 1, 1, 4
    return options


def run(options: argparse.Namespace, folder: Path) -> dict[str, Any]:
    """Prepares, selects the peer's settings by a trial, races, then measures next to a busy process."""
    until = time.monotonic() + 60 * options.minutes
    layers = 2 if options.smoke else SIZES[options.size].num_hidden_layers
    common = {"folder": str(folder), "rows": options.rows, "layers": layers, "size": options.size}
    results = record.header(
        "pretrain" if options.size == "tiny" else f"pretrain-{options.size}",
        {
            "model": dataclasses.asdict(config_of(common)),
            "rows": options.rows,
            "length": LENGTH,
            "steps_per_turn": options.steps,
            "rounds": options.rounds,
            "text": "chitchat, tokenised",
            "only": options.only,
        },
    )
    prepare(folder, Chains(), SIZES[options.size].vocab_size)
    field = driver.Field(options.only)
    probes = gemm.contestants()

    try:
        driver.start(probes)
        peers = [*eager_peers(common, options.thorough), *compiled_peers(common, options.thorough)]
        single = qualify.one_by_one(field, peers, _kind(options.size), turns=2, command=TRIAL_STEPS)
        field.enter(ranked_peers(common, single), at_once=1)  # each has a process on every core
        ours = finback_contestants(common)
        if options.size == "tiny":
            field.enter(ours)
        else:
            qualify.one_by_one(field, ours, lambda c: c.settings["optimiser"], turns=2, command=TRIAL_STEPS)
        race(field.contestants, probes, options, until)
        raced = [c for c in field.contestants if c.alive]
        p = default_precision({c.name: statistics.median(c.record["seconds"]) for c in raced})
        quiet = [c for c in raced if re.fullmatch(rf"finback muon {p} \S+", c.name)]
        results["gemm_peak_flops"] = gemm.results(probes)
        tokens = options.rows * LENGTH * options.steps
        results["contestants"] = summarise(field.contestants, results["gemm_peak_flops"], tokens)
        results["finback_default"] = f"finback muon {p} {RANKS}"
        results["ratios"] = ratios(field.contestants)
        results["beside_a_busy_process"] = (
            beside_busy(quiet, options.rows * LENGTH, min(3, options.rounds)) if options.thorough else {}
        )
    finally:
        for contestant in (*field.contestants, *probes):
            contestant.stop()
    return results


def main() -> None:
    """Run and write benchmarks/results/pretrain-<cpu>.json."""
    options = _options()
    begin = time.perf_counter()
    with tempfile.TemporaryDirectory() as folder:
        # compiles without a cache, as a first run does
        os.environ["TORCHINDUCTOR_CACHE_DIR"] = f"{folder}/compiled"
        results = run(options, Path(folder))
    results["run_seconds"] = time.perf_counter() - begin
    record.write(results, options.out)
    for ratio in results["ratios"]:
        driver.say(f"{ratio['median']:6.2f}  {ratio['ratio']}: {ratio['over']} / {ratio['under']}")


if __name__ == "__main__":
    main()
