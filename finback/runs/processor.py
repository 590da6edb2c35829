"""This machine's processor: name, features, and the faster precision. Does not import torch."""

import os
import platform
from functools import cache
from pathlib import Path

WIDE_ENOUGH = (
    128  # hidden_size from which bf16 was faster on every processor measured (docs/log.md); at 96 it was a tenth slower
)


@cache
def fields() -> dict[str, list[str]]:
    """/proc/cpuinfo as fields with one value per core; empty if it does not exist."""
    found: dict[str, list[str]] = {}
    try:
        text = Path("/proc/cpuinfo").read_text(encoding="utf-8", errors="replace")
    except OSError:
        return found
    for line in text.splitlines():
        field, _, value = line.partition(":")
        found.setdefault(field.strip(), []).append(value.strip())
    return found


def name() -> str:
    """The processor's name according to the operating system."""
    return fields().get("model name", [platform.processor() or platform.machine()])[0]


def cores() -> int | None:
    """Number of cores, None if unknown."""
    return len(fields().get("processor", [])) or None


def usable_cores() -> int:
    """Number of cores that this process may use."""
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1


def features() -> frozenset[str]:
    """Its instruction sets, by Linux's names."""
    return frozenset(" ".join((fields().get("flags") or fields().get("Features") or [""])[:1]).split())


def multiplies_bf16() -> bool:
    """Whether it has bf16 multiply instructions; otherwise bf16 is emulated, and slower than fp32."""
    return not features().isdisjoint({"avx512_bf16", "amx_bf16", "bf16"})


def precision(hidden_size: int, bf16: bool | None = None) -> str:
    """The precision of training if a recipe leaves it open: "bf16" or "fp32".

    Depends on the model's width and on whether the device multiplies bf16 natively (default: this processor), never on
    timing, so that two runs with one seed on one machine are identical.
    """
    able = multiplies_bf16() if bf16 is None else bf16
    return "bf16" if able and hidden_size >= WIDE_ENOUGH else "fp32"
