"""Energy in joules from the machine's counters: RAPL for CPU packages and memory, NVML for GPUs. Does not import torch.

RAPL counts all programs on the machine. Neither counter includes fans, disks or the power supply. Without counters,
runs/ledger.py estimates energy from the CPU time of the run's processes, which is measured here too.
"""

import contextlib
import platform
import time
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import psutil

from finback.runs.provenance import cuda

RAPL = Path("/sys/class/powercap")

# maximal power of one component: if a counter could have wrapped around since the last reading, it is not trusted
WATTS_AT_MOST = 1000.0
# a counter that went down has wrapped around, or was reset; more than this power, or than 1.5 times
# the highest power seen, means a reset
WATTS_OVER_THE_TURN = 400.0
GPU_WATTS_AT_MOST = 2000.0
# how far a counter may run ahead: its updates are not synchronized with the readings
SLACK_JOULES = 100.0
# longest time between readings while a stage logs steps, in seconds
LOOK_SECONDS = 60.0


@dataclass
class Counter:
    """A counter of microjoules that wraps around at `turn`."""

    path: Path
    turn: int
    last: int
    # highest power seen while it was increasing
    watts: float = 0.0

    def joules(self, value: int, gap: float) -> float | None:
        """Joules since the last reading, `gap` seconds ago; None if the counter was reset or is implausible."""
        turned, joules = value < self.last, (value - self.last) % self.turn / 1e6
        self.last = value
        most = (1.5 * self.watts or WATTS_OVER_THE_TURN) if turned else WATTS_AT_MOST
        if joules > most * gap + SLACK_JOULES:
            return None
        if not turned and gap > 1:
            self.watts = max(self.watts, joules / gap)
        return joules


class Energy:
    """Joules by the machine's counters since the last call."""

    def __init__(self, rapl: Path = RAPL) -> None:
        self.counters = [c for c in map(_counter, sorted(rapl.glob("intel-rapl:*"))) if c is not None]
        self.gpus = _gpus()
        self.joules, self.at, self.certain = 0.0, time.monotonic(), True
        self._gpu_last = [_millijoules(gpu) for gpu in self.gpus]

    @property
    def method(self) -> str:
        """The counters in use; "" if there are none."""
        rapl = "RAPL of processor packages and memory" if self.counters else ""
        return " and ".join(part for part in (rapl, f"NVML of {len(self.gpus)} GPUs" if self.gpus else "") if part)

    def read(self, now: float | None = None) -> None:
        """Reads all counters; call it often enough that none wraps around twice."""
        now = time.monotonic() if now is None else now
        gap, self.at = max(0.0, now - self.at), now
        for counter in self.counters:
            value = _read(counter.path)
            self._add(None if value is None or value < 0 else counter.joules(value, gap))
            self.certain &= gap * WATTS_AT_MOST * 1e6 < counter.turn
        values = [_millijoules(gpu) for gpu in self.gpus]
        for new, old in zip(values, self._gpu_last, strict=True):
            joules = None if new is None or old is None else (new - old) / 1e3
            believed = joules is not None and 0 <= joules <= GPU_WATTS_AT_MOST * gap + SLACK_JOULES
            self._add(joules if believed else None)
        self._gpu_last = values

    def _add(self, joules: float | None) -> None:
        """Adds one counter's joules; an implausible one adds nothing and makes the total uncertain."""
        self.joules += joules or 0.0
        self.certain &= joules is not None

    def read_if_due(self) -> None:
        """Reads the counters if the last reading is old; cheap enough for every step."""
        if time.monotonic() - self.at > LOOK_SECONDS:
            self.read()

    def take(self) -> float | None:
        """Joules since the last call; None if nothing can be read, or a counter was not read for too long."""
        if not self.method:
            return None
        self.read()
        joules, certain = self.joules, self.certain
        self.joules, self.certain = 0.0, True
        return joules if certain else None


class CpuTime:
    """CPU seconds of a run's processes and their children, regardless of other programs.

    `ranks`: (host name, process id) of each rank; ranks on other machines are assumed to use as much as those here.
    """

    def __init__(self, ranks: Iterable[tuple[str, int]]) -> None:
        every = list(ranks)
        self.pids = [pid for machine, pid in every if machine == platform.node()]
        self.share = len(self.pids) / len(every)
        self._last = _cpu_seconds(self.pids)

    def take(self) -> float | None:
        """CPU seconds since the last call; None if no process can be measured."""
        now, last = _cpu_seconds(self.pids), self._last
        self._last = now
        return max(0.0, now - last) / self.share if self.share else None


def _cpu_seconds(pids: Iterable[int]) -> float:
    """CPU seconds of these processes, their children, and ended children."""
    processes: set[psutil.Process] = set()
    for pid in pids:
        with contextlib.suppress(psutil.Error):
            process = psutil.Process(pid)
            processes |= {process, *process.children(recursive=True)}
    total = 0.0
    for process in processes:
        with contextlib.suppress(psutil.Error):
            times = process.cpu_times()._asdict()
            total += sum(times.get(k, 0.0) for k in ("user", "system", "children_user", "children_system"))
    return total


def _counter(folder: Path) -> Counter | None:
    """A RAPL counter of a package, or of memory, which packages exclude; cores and graphics are part of a package, psys is the total."""
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
    try:  # on most machines only root may read it
        return int(path.read_text())
    except (OSError, ValueError):
        return None


def _gpus() -> list[Any]:
    """NVML handles of the GPUs that torch sees; [] without pynvml."""
    torch = cuda()
    if torch is None:
        return []
    try:
        import pynvml

        pynvml.nvmlInit()
        ids = [f"GPU-{torch.cuda.get_device_properties(i).uuid}" for i in range(torch.cuda.device_count())]
        handles = [pynvml.nvmlDeviceGetHandleByUUID(uuid) for uuid in ids]
        for handle in handles:
            pynvml.nvmlDeviceGetTotalEnergyConsumption(handle)  # older GPUs lack this counter
    except Exception:  # pynvml's exceptions can be named only if it is installed
        return []
    return handles


def _millijoules(handle: Any) -> int | None:
    import pynvml

    try:
        return int(pynvml.nvmlDeviceGetTotalEnergyConsumption(handle))
    except Exception:  # a failing GPU counter must not end a run
        return None
