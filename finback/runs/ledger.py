"""The bill: what ledger.jsonl records of a stage, summed up and priced. No torch here."""

from collections.abc import Iterable
from pathlib import Path
from typing import Any

from finback.runs.files import LEDGER, is_number, read_lines

# Stated estimates, used where the machine cannot be asked; summary.json repeats them beside every figure.
WATTS_PER_CORE = 12.0

DOLLARS_PER_CORE_HOUR = 0.04

BASIS = (
    f"estimate: {WATTS_PER_CORE:g} W per busy core, ${DOLLARS_PER_CORE_HOUR:g} per core-hour "
    "(a common on-demand cloud price); nothing was metered"
)

# FLOPs by what they were for, as the EU's guidelines on general-purpose models distinguish them (annex, 117-133)
FLOPS = {
    "training": "forward and backward passes that update parameters",
    "recomputed": "activations made again in the backward pass",
    "generation": "answers sampled to learn from, rejected ones included",
    "evaluation": "probes, exams and validation text",
    "auxiliary": "forward passes of teachers and reference models",
}


def spent(folder: Path) -> dict[str, float]:
    """Sums over a stage's ledger: seconds, core-seconds, and whatever else was accounted, as far as it is numbers."""
    return sums(read_lines(folder / LEDGER))


def sums(ledger: Iterable[dict[str, Any]]) -> dict[str, float]:
    """The same of a ledger's lines."""
    total = {"seconds": 0.0, "core_seconds": 0.0}
    for line in ledger:
        numbers = {key: value for key, value in line.items() if is_number(value)}
        total["core_seconds"] += numbers.get("seconds", 0.0) * numbers.pop("cores", 0)
        for key, value in numbers.items():
            total[key] = total.get(key, 0.0) + value
    return total


def dollars(core_seconds: float) -> float:
    """What they cost, by the estimate."""
    return core_seconds / 3600 * DOLLARS_PER_CORE_HOUR


def cost(folder: Path) -> dict[str, Any]:
    """Wall time, throughput, FLOPs, MFU, energy and money of one stage, from its ledger."""
    total = spent(folder)
    seconds, hours = total["seconds"], total["core_seconds"] / 3600
    tokens = total.get("tokens_trained", 0) + total.get("tokens_generated", 0)
    flops, peak_flops = total.get("flops", 0), total.get("peak_flops", 0)
    energy, basis = _energy(folder, total)
    return {
        "wall_seconds": round(seconds, 2),
        "tokens_trained": int(total.get("tokens_trained", 0)),
        "tokens_generated": int(total.get("tokens_generated", 0)),
        "tokens_per_second": round(tokens / seconds, 1) if seconds else 0.0,
        "flops": flops,
        "mfu": round(flops / peak_flops, 4) if peak_flops else None,
        "mfu_basis": "model FLOPs over the GEMM peak measured on this machine, all ranks at once, times wall time",
        "energy_wh": round(energy, 3),
        "money_usd": round(hours * DOLLARS_PER_CORE_HOUR, 5),
        "basis": basis,
        "device_hours": hours,
        "flops_by": {name: total[f"flops_{name}"] for name in FLOPS if f"flops_{name}" in total},
    }


def _energy(folder: Path, total: dict[str, float]) -> tuple[float, str]:
    """Watt-hours, metered as far as they were and estimated for the rest; and how one knows, money's price included."""
    metered = total.get("metered_core_seconds", 0.0)
    estimated = max(0.0, total["core_seconds"] - metered)
    energy = (total.get("joules", 0.0) + estimated * WATTS_PER_CORE) / 3600
    if not metered:
        return energy, BASIS
    methods = sorted({m for line in read_lines(folder / LEDGER) if (m := line.get("metered"))})
    share = metered / total["core_seconds"]
    return energy, (
        f"estimate: ${DOLLARS_PER_CORE_HOUR:g} per core-hour (a common on-demand cloud price); energy of {share:.0%} of "
        f"the time metered by {', '.join(methods)}, of the whole machine, the rest at {WATTS_PER_CORE:g} W per busy core"
    )
