"""Joules by the machine's own counters: RAPL for processor packages and memory, NVML for GPUs. No torch here.

RAPL counts what everybody on the machine uses. Neither counter includes fans, disks or the power supply. Where there
is no counter to read, runs/ledger.py estimates.
"""

import time
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from finback.runs.provenance import cuda

RAPL = Path("/sys/class/powercap")

# of one counted part: a counter that such a part could have wrapped around between two readings is not trusted
WATTS_AT_MOST = 1000.0
# counters are read at least so often while a stage logs steps
LOOK_SECONDS = 60.0


@dataclass
class Counter:
    """One counter of microjoules, which begins at 0 again after `turn`."""

    path: Path
    turn: int
    last: int


class Energy:
    """Joules by the machine's counters since they were last asked for."""

    def __init__(self, rapl: Path = RAPL) -> None:
        self.counters = [c for c in map(_counter, sorted(rapl.glob("intel-rapl:*"))) if c is not None]
        self.gpus = _gpus()
        self.joules, self.at, self.certain = 0.0, time.monotonic(), True
        self._gpu_last = [_millijoules(gpu) for gpu in self.gpus]

    @property
    def method(self) -> str:
        """What is read; empty where nothing is."""
        rapl = "RAPL of processor packages and memory" if self.counters else ""
        return " and ".join(part for part in (rapl, f"NVML of {len(self.gpus)} GPUs" if self.gpus else "") if part)

    def read(self, now: float | None = None) -> None:
        """Read all counters; often enough, so that none turns over twice in between."""
        now = time.monotonic() if now is None else now
        gap, self.at = now - self.at, now
        for counter in self.counters:
            value = _read(counter.path)
            self.certain &= value is not None and gap * WATTS_AT_MOST * 1e6 < counter.turn
            if value is not None:
                self.joules += (value - counter.last) % counter.turn / 1e6
                counter.last = value
        values = [_millijoules(gpu) for gpu in self.gpus]
        self.joules += sum(new - old for new, old in zip(values, self._gpu_last, strict=True)) / 1e3
        self._gpu_last = values

    def read_if_due(self) -> None:
        """Read if that was not done lately: cheap enough for every step."""
        if time.monotonic() - self.at > LOOK_SECONDS:
            self.read()

    def take(self) -> float | None:
        """Joules since the last call; None where nothing can be read, or a counter was not read for too long."""
        if not self.method:
            return None
        self.read()
        joules, certain = self.joules, self.certain
        self.joules, self.certain = 0.0, True
        return joules if certain else None


def _counter(folder: Path) -> Counter | None:
    """A package, or memory, which no package includes; cores and graphics are parts of a package, psys is the whole."""
    try:
        name = (folder / "name").read_text().strip()
        turn = int((folder / "max_energy_range_uj").read_text())
    except (OSError, ValueError):
        return None
    value = _read(folder / "energy_uj")
    if value is None or turn <= 0 or not name.startswith(("package", "dram")):
        return None
    return Counter(folder / "energy_uj", turn, value)


def _read(path: Path) -> int | None:
    try:  # root alone may read it on most machines
        return int(path.read_text())
    except (OSError, ValueError):
        return None


def _gpus() -> list[Any]:
    """NVML's handles of the GPUs that torch sees; none without pynvml."""
    torch = cuda()
    if torch is None:
        return []
    try:
        import pynvml

        pynvml.nvmlInit()
        ids = [f"GPU-{torch.cuda.get_device_properties(i).uuid}" for i in range(torch.cuda.device_count())]
        handles = [pynvml.nvmlDeviceGetHandleByUUID(uuid) for uuid in ids]
        for handle in handles:
            pynvml.nvmlDeviceGetTotalEnergyConsumption(handle)  # older GPUs have no such counter
    except Exception:  # the library's own errors, which cannot be named without it
        return []
    return handles


def _millijoules(handle: Any) -> int:
    import pynvml

    return int(pynvml.nvmlDeviceGetTotalEnergyConsumption(handle))
