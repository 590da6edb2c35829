"""This machine's processor: its name, what it can do, and the precision that pays on it. No torch here."""

import platform
from functools import cache
from pathlib import Path

WIDE_ENOUGH = 128  # hidden_size from which bf16 gained on every processor measured (docs/log.md); 96 lost a tenth


@cache
def fields() -> dict[str, list[str]]:
    """/proc/cpuinfo as its fields, one value a core; empty where there is none."""
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
    """The processor's name as the operating system reports it."""
    return fields().get("model name", [platform.processor() or platform.machine()])[0]


def cores() -> int | None:
    """How many cores the system has, where it says so."""
    return len(fields().get("processor", [])) or None


def features() -> frozenset[str]:
    """The instruction sets it has, by Linux's names."""
    return frozenset(" ".join((fields().get("flags") or fields().get("Features") or [""])[:1]).split())


def multiplies_bf16() -> bool:
    """Whether it has instructions for products in bf16; without them bf16 is emulated, and slower than fp32."""
    return not features().isdisjoint({"avx512_bf16", "amx_bf16", "bf16"})


def precision(hidden_size: int, bf16: bool | None = None) -> str:
    """The precision of training where a recipe leaves it open: "bf16" or "fp32".

    It follows from the model's width and from whether the device multiplies bf16 itself (by default: this processor),
    never from a stopwatch, so that two runs of one seed on one machine are the same run.
    """
    able = multiplies_bf16() if bf16 is None else bf16
    return "bf16" if able and hidden_size >= WIDE_ENOUGH else "fp32"
