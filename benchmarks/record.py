"""The content of a results file besides the contestants: the machine, statistics, the file itself."""

import argparse
import datetime
import importlib.metadata
import json
import os
import platform
import re
import statistics
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

from driver import CORES, Settings, say

from finback.runs import processor

RESULTS = Path(__file__).parent / "results"


def spread(values: Sequence[float]) -> dict[str, float]:
    """Median, smallest and largest."""
    return {"median": statistics.median(values), "min": min(values), "max": max(values)}


def versus(label: str, over: str, under: str, ours: Sequence[float], theirs: Sequence[float]) -> Settings:
    """How many times faster `over` is than `under`, from their seconds in the same rounds."""
    rounds = [their / our for our, their in zip(ours, theirs, strict=True)]
    return {"ratio": label, "over": over, "under": under, **spread(rounds), "per_round": rounds}


def machine() -> dict[str, Any]:
    """The machine and software of the measurement."""
    known = processor.fields()
    installed = {d.name: d.version for d in importlib.metadata.distributions()}
    versions = {n: installed[n] for n in ("torch", "transformers", "trl", "accelerate") if n in installed}
    return {
        "cpu": processor.name(),
        "cpu_family_model": "/".join(known.get(field, ["?"])[0] for field in ("cpu family", "model")),
        "cores": len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count(),
        "cores_used": CORES,
        "system": platform.system(),
        "python": platform.python_version(),
    } | versions


def resident(field: str) -> int:
    """Bytes in /proc/self/status: VmRSS is the present value, VmHWM the peak so far."""
    lines = Path("/proc/self/status").read_text(encoding="utf-8").splitlines()
    return next(int(line.split()[1]) * 1024 for line in lines if line.startswith(field))


def header(benchmark: str, settings: Settings) -> dict[str, Any]:
    """The first fields of a results file."""
    return {
        "benchmark": benchmark,
        "date": datetime.datetime.now(datetime.UTC).strftime("%Y-%m-%d %H:%M UTC"),
        "load_average_at_start": list(os.getloadavg()),
        "machine": machine(),
        "settings": settings,
    }


def over_seeds(
    benchmark: str,
    settings: Settings,
    options: argparse.Namespace,
    measure: Callable[[dict[str, Any], argparse.Namespace], Iterator[None]],
    judge: Callable[[list[dict[str, Any]]], dict[str, Any]],
) -> dict[str, Any]:
    """The results for `options.seeds`, written to `options.out` whenever `measure` yields.

    measure: adds what it lacks to {"seed": ...}, or to a row of an earlier call. judge: fields that follow from all rows.
    Seeds take hours, so several calls with the same settings may add to one file.
    """
    out, results, rows = options.out, header(benchmark, settings), list[dict[str, Any]]()
    if out.is_file():
        found = json.loads(out.read_text(encoding="utf-8"))
        if found["settings"] != json.loads(json.dumps(settings)):
            raise SystemExit(f"{out} has other settings: {found['settings']}; choose another --out, or delete it")
        rows = found["seeds"]
    results["seeds"] = rows
    for seed in options.seeds:
        row = next((each for each in rows if each["seed"] == seed), {"seed": seed})
        for _ in measure(row, options):
            rows += [] if row in rows else [row]
            write(results | judge(rows), out)
    return results | judge(rows)


def write(results: dict[str, Any], out: Path | None) -> None:
    """Write the results file, by default under the CPU's name; figures keep five digits."""
    slug = re.sub(r"[^a-z0-9]+", "-", results["machine"]["cpu"].lower()).strip("-")
    path = out or RESULTS / f"{results['benchmark']}-{slug}.json"
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(json.dumps(_rounded(results), indent=1) + "\n", encoding="utf-8")
    say(f"wrote {path}")


def _rounded(value: Any) -> Any:
    if isinstance(value, float):
        return float(f"{value:.5g}")
    if isinstance(value, dict):
        return {k: _rounded(v) for k, v in value.items()}
    return [_rounded(v) for v in value] if isinstance(value, list | tuple) else value
