"""Location and reading of calibration files. Does not import torch."""

import json
import math
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from finback.config import UserError
from finback.planner.hardware import ASSUMPTIONS, Fact, Machine, Site
from finback.runs import processor
from finback.runs.ledger import DOLLARS_PER_CORE_HOUR, WATTS_PER_CORE

FORMAT = "finback-calibration-3"
_NUMBERS = ("ranks", "memory_bytes", "memory_bytes_per_second", "process_bytes")


def default_path(environment: Mapping[str, str]) -> Path:
    """<the user's cache folder>/finback/calibration.json, respecting XDG_CACHE_HOME."""
    home = environment.get("XDG_CACHE_HOME", "")
    folder = Path(home) if home and Path(home).is_absolute() else Path.home() / ".cache"
    return folder / "finback" / "calibration.json"


def read(path: Path) -> dict[str, Any]:
    """A calibration; UserError if the file is damaged or contains something else."""
    try:
        found = json.loads(path.read_text(encoding="utf-8"))
    except OSError as error:
        raise UserError("--calibration", str(path), str(error.strerror), "Run finback plan --calibrate.") from None
    except ValueError as error:
        raise _refuse(path, f"damaged ({error})") from None
    if not isinstance(found, dict) or found.get("format") != FORMAT:
        raise _refuse(path, "not a calibration of this version of finback")
    try:
        numbers = [found[name] for name in _NUMBERS]
        for part in ("passes_fp32", "passes_bf16", "update_fp32", "update_bf16", "exchange"):
            numbers += found["measured"][part].values()
        for name in ("fp32", "bf16"):
            numbers += [*found["gemm_flops_per_second"][name].values(), found["training_flops_per_second"][name]]
        strings = [found["date"], found["cpu"], found["torch"]]
    except (KeyError, TypeError, AttributeError) as error:
        raise _refuse(path, f"incomplete ({error})") from None
    if not all(isinstance(n, (int, float)) and 0 <= n < math.inf for n in numbers) or found["ranks"] < 1:
        raise _refuse(path, "contains an invalid measurement")
    if not all(isinstance(text, str) for text in strings):
        raise _refuse(path, "does not say when and where it was made")
    return found


def _refuse(path: Path, problem: str) -> UserError:
    return UserError("--calibration", str(path), problem, "Run finback plan --calibrate again.")


def machine(calibration: dict[str, Any], ranks: int) -> Machine:
    """This machine as a Machine of the planner; one device is one of `ranks` ranks."""
    source = f"measured here, {calibration['date']}"
    per_byte = calibration["measured"]["exchange"]["byte"]
    peak = {
        name: Fact(max(v.values()) / calibration["ranks"], source)
        for name, v in calibration["gemm_flops_per_second"].items()
    }
    return Machine(
        "here",
        memory=Fact(calibration["memory_bytes"] / ranks, source),
        bf16=peak["bf16"],
        fp32=peak["fp32"],
        memory_bandwidth=Fact(calibration["memory_bytes_per_second"] / ranks, source),
        node=Fact(ranks, source),
        # the exchange between ranks was not timed if there was one rank
        link=Fact(1 / per_byte if per_byte else calibration["memory_bytes_per_second"] / ranks, source),
        watts=Fact(WATTS_PER_CORE, "estimate of finback/runs/ledger.py"),
        price=Fact(DOLLARS_PER_CORE_HOUR, "estimate of finback/runs/ledger.py"),
    )


def site(calibration: dict[str, Any], ranks: int, precision: str) -> Site:
    """This machine as a site with `ranks` ranks, at the measured speed of its training steps."""
    here, source = machine(calibration, ranks), f"measured here, {calibration['date']}"
    rate = calibration["training_flops_per_second"][precision] / calibration["ranks"]
    known = {"reserve": calibration["process_bytes"], "efficiency": rate / here.peak(precision)}
    known["launch"] = 0.0  # measured steps already include it
    return Site(here, ranks, ASSUMPTIONS | {name: Fact(value, source) for name, value in known.items()})


def doubts(calibration: dict[str, Any], torch_version: str | None = None) -> list[str]:
    """Reasons why a calibration may be wrong here and now."""
    found = []
    if calibration["cpu"] != processor.name():
        found.append(f"calibrated on another processor: {calibration['cpu']}")
    if torch_version is not None and calibration["torch"] != torch_version:
        found.append(f"calibrated with torch {calibration['torch']}, this is {torch_version}")
    models, planned = calibration.get("models", 0), calibration.get("models_planned", 0)
    if models < planned:
        found.append(f"only {models} of {planned} models were timed: calibrate again when the machine is free")
    load = calibration.get("load_average")
    if isinstance(load, (int, float)) and load > calibration["ranks"] + 0.5:
        found.append(f"the machine was busy when it was calibrated (load {load:.1f})")
    return found
