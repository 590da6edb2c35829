"""Sums and prices what a stage's ledger.jsonl records. Does not import torch."""

import json
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from finback.runs.files import LEDGER, is_number

# Estimates, used where the machine cannot be measured; summary.json repeats them next to every figure.
WATTS_PER_CORE = 12.0

DOLLARS_PER_CORE_HOUR = 0.04

BASIS = (
    f"estimate: {WATTS_PER_CORE:g} W per busy core, ${DOLLARS_PER_CORE_HOUR:g} per core-hour "
    "(a common on-demand cloud price); nothing was metered"
)

# numeric entries of a ledger, besides tokens_* and flops_*
EXTERNAL = ("external_seconds", "external_core_seconds", "external_joules", "external_usd")
AMOUNTS = ("seconds", "cores", "cpu_seconds", "joules", "metered_core_seconds", "flops", "peak_flops", *EXTERNAL)
MOST = 1e30  # upper bound of any plausible amount

# FLOPs by purpose, as the EU's guidelines on general-purpose models distinguish them (annex, 117-133)
FLOPS = {
    "training": "forward and backward passes that update parameters",
    "recomputed": "activations recomputed in the backward pass",
    "generation": "answers sampled to learn from, rejected ones included",
    "evaluation": "probes, exams and validation text",
    "auxiliary": "forward passes of teachers and reference models",
}


@dataclass(frozen=True)
class Ledger:
    """The valid part of a ledger: every number in `lines` is finite and nonnegative; `faults` describes what was dropped."""

    lines: list[dict[str, Any]]
    faults: list[str]


def read(folder: Path) -> Ledger:
    """A stage's ledger. Invalid entries are dropped and reported; an incomplete last line, left by a kill, is not a fault."""
    path, lines, faults = folder / LEDGER, [], []
    texts = path.read_text(encoding="utf-8", errors="replace").split("\n") if path.is_file() else []
    for number, text in enumerate(texts, 1):
        if not text.strip():
            continue
        try:
            line = json.loads(text)
        except (ValueError, RecursionError):
            line = None
            if number == len(texts):
                continue
        if not isinstance(line, dict):
            faults.append(f"line {number} of {LEDGER} is torn and was ignored")
            continue
        bad = [key for key, value in line.items() if not _is_believed(key, value)]
        faults += [f"line {number} of {LEDGER} says {key} = {str(line[key])[:40]}, which is ignored" for key in bad]
        lines.append({key: value for key, value in line.items() if key not in bad})
    return Ledger(lines, faults)


def _is_believed(key: str, value: Any) -> bool:
    """Whether an entry is text, or a valid amount if it must be one."""
    is_amount = key in AMOUNTS or key.startswith(("flops_", "tokens_"))
    if isinstance(value, int | float) and not isinstance(value, bool):
        return 0 <= value <= MOST  # false for NaN
    return not is_amount


def spent(folder: Path) -> dict[str, float]:
    """Sums over a stage's ledger: seconds, core-seconds, and all other valid amounts."""
    return sums(read(folder).lines)


def sums(ledger: Iterable[dict[str, Any]]) -> dict[str, float]:
    """The same for a ledger's rows."""
    total = {"seconds": 0.0, "core_seconds": 0.0}
    for line in ledger:
        numbers = {key: value for key, value in line.items() if is_number(value)}
        total["core_seconds"] += numbers.get("seconds", 0.0) * numbers.pop("cores", 0)
        for key, value in numbers.items():
            total[key] = total.get(key, 0.0) + value
    return total


def watt_hours(ledger: Iterable[dict[str, Any]]) -> float:
    """Energy: metered if possible; otherwise from the CPU time of the run's processes, or in older ledgers from wall time."""
    joules = 0.0
    for line in ledger:
        wall = line.get("seconds", 0.0) * line.get("cores", 0)
        metered = line.get("metered_core_seconds", 0.0) if "joules" in line else 0.0
        joules += line.get("joules", 0.0)
        if metered < wall:
            joules += line.get("cpu_seconds", wall) * (1 - metered / wall) * WATTS_PER_CORE
        joules += line.get("external_joules", 0.0)
    return joules / 3600


def dollars(core_seconds: float) -> float:
    """The estimated price of core-seconds."""
    return core_seconds / 3600 * DOLLARS_PER_CORE_HOUR


def money(total: dict[str, float]) -> float:
    """Dollars for `sums` of a ledger, as far as they are known."""
    return dollars(total["core_seconds"]) + total.get("external_usd", 0.0)


def unknown(ledger: Iterable[dict[str, Any]]) -> list[str]:
    """What the amounts of a ledger leave out because nobody knows it, such as "money of rl.rollouts"."""
    lists = [line["unknown"] for line in ledger if isinstance(line.get("unknown"), list)]
    return sorted({text for texts in lists for text in texts if isinstance(text, str)})


def lacks(bill: dict[str, Any], what: str) -> bool:
    """Whether part of `what` ("money", "energy" or "FLOPs") is unknown in a bill of `cost`."""
    return any(text.startswith(f"{what} of ") for text in bill.get("unknown", ()))


def shown(amount: str, bill: dict[str, Any], what: str) -> str:
    """An amount of a bill as text, which says whether more is unknown; arguments as for `lacks`."""
    return f"{amount} + unknown" if lacks(bill, what) else amount


def cost(folder: Path) -> dict[str, Any]:
    """Wall time, throughput, FLOPs, MFU, energy and money of one stage, from its ledger."""
    ledger = read(folder)
    total = sums(ledger.lines)
    seconds, hours = total["seconds"], (total["core_seconds"] + total.get("external_core_seconds", 0.0)) / 3600
    tokens = total.get("tokens_trained", 0) + total.get("tokens_generated", 0)
    flops, peak_flops = total.get("flops", 0), total.get("peak_flops", 0)
    return {
        "wall_seconds": round(seconds, 2),
        "tokens_trained": int(total.get("tokens_trained", 0)),
        "tokens_generated": int(total.get("tokens_generated", 0)),
        "tokens_per_second": round(tokens / seconds, 1) if seconds else 0.0,
        "flops": flops,
        "mfu": round(flops / peak_flops, 4) if peak_flops else None,
        "mfu_basis": "model FLOPs over the GEMM peak measured on this machine, all ranks at once, times wall time",
        "energy_wh": round(watt_hours(ledger.lines), 3),
        "money_usd": round(money(total), 5),
        "basis": "; ".join([_basis(ledger.lines, total), *_external(total), *_left_out(ledger.lines), *ledger.faults]),
        "unknown": unknown(ledger.lines),
        "external": {key: total[key] for key in total if key.startswith(("external_", "tokens_external_"))},
        "device_hours": hours,
        "flops_by": {name: total[f"flops_{name}"] for name in FLOPS if f"flops_{name}" in total},
    }


def _external(total: dict[str, float]) -> list[str]:
    """What external engines did, for `basis`."""
    if "external_seconds" not in total:
        return []
    read, made = (int(total.get(f"tokens_external_{kind}", 0)) for kind in ("prompt", "generated"))
    text = f"external engines read {read:,} tokens and generated {made:,} in {total['external_seconds']:,.0f} engine-seconds"
    return [text + (f", ${total['external_usd']:.5g} of the money" if "external_usd" in total else "")]


def _left_out(lines: list[dict[str, Any]]) -> list[str]:
    """What the amounts do not include: unknown ones of external engines, and the energy of GPUs that could not be measured."""
    return [f"unknown and NOT included: {text}" for text in unknown(lines)] + _unmetered(lines)


def _unmetered(lines: list[dict[str, Any]]) -> list[str]:
    machines = [line["machine"] for line in lines if isinstance(line.get("machine"), dict)]
    asked = any("NVML" in str(line.get("metered")) for line in lines)
    if asked or not any(machine.get("gpus") for machine in machines):
        return []
    return ["energy of its GPUs is NOT included (install pynvml to measure it)"]


def _basis(lines: list[dict[str, Any]], total: dict[str, float]) -> str:
    """How energy and money were determined."""
    metered = sum(line.get("metered_core_seconds", 0.0) for line in lines if "joules" in line)
    if not metered:
        return BASIS
    methods = sorted({str(method) for line in lines if (method := line.get("metered"))})
    share = min(1.0, metered / total["core_seconds"]) if total["core_seconds"] else 1.0
    return (
        f"estimate: ${DOLLARS_PER_CORE_HOUR:g} per core-hour (a common on-demand cloud price); energy of {share:.0%} of "
        f"the time metered by {', '.join(methods)}, of the whole machine, the rest at {WATTS_PER_CORE:g} W per busy core"
    )
