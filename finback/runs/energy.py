"""Joules by the machine's own counters: RAPL for processor packages and memory, NVML for GPUs. No torch here.

RAPL counts what everybody on the machine uses. Neither counter includes fans, disks or the power supply. Where there
is no counter to read, runs/ledger.py estimates from the CPU time of the run's processes, which is counted here too.
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

# of one counted part: a counter that such a part could have wrapped around between two readings is not trusted
WATTS_AT_MOST = 1000.0
# a counter that went down has turned over, or was reset; more than this, or than half as much again as it was seen to
# take, says reset
WATTS_OVER_THE_TURN = 400.0
GPU_WATTS_AT_MOST = 2000.0
# what a counter may be ahead by at once: it is updated at its own times
SLACK_JOULES = 100.0
# counters are read at least so often while a stage logs steps
LOOK_SECONDS = 60.0


@dataclass
class Counter:
    """One counter of microjoules, which begins at 0 again after `turn`."""

    path: Path
    turn: int
    last: int
    # the most that it was seen to take while it went up
    watts: float = 0.0

    def joules(self, value: int, gap: float) -> float | None:
        """Since the last reading, `gap` seconds ago; None where the counter was reset, or says what cannot be."""
        turned, joules = value < self.last, (value - self.last) % self.turn / 1e6
        self.last = value
        most = (1.5 * self.watts or WATTS_OVER_THE_TURN) if turned else WATTS_AT_MOST
        if joules > most * gap + SLACK_JOULES:
            return None
        if not turned and gap > 1:
            self.watts = max(self.watts, joules / gap)
        return joules


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
        """Add what one counter says; one that cannot be believed adds nothing, and nothing is certain then."""
        self.joules += joules or 0.0
        self.certain &= joules is not None

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


class CpuTime:
    """CPU seconds of a run's processes and of what they start, whatever else the machine does meanwhile.

    `ranks` are a machine's name and a process id of each rank; ranks on other machines count as those here.
    """

    def __init__(self, ranks: Iterable[tuple[str, int]]) -> None:
        every = list(ranks)
        self.pids = [pid for machine, pid in every if machine == platform.node()]
        self.share = len(self.pids) / len(every)
        self._last = _cpu_seconds(self.pids)

    def take(self) -> float | None:
        """CPU seconds since the last call; None where no process can be asked."""
        now, last = _cpu_seconds(self.pids), self._last
        self._last = now
        return max(0.0, now - last) / self.share if self.share else None


def _cpu_seconds(pids: Iterable[int]) -> float:
    """Of these processes, of those they started, and of those that have ended since."""
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


def _millijoules(handle: Any) -> int | None:
    import pynvml

    try:
        return int(pynvml.nvmlDeviceGetTotalEnergyConsumption(handle))
    except Exception:  # a GPU that fell off the bus must not end a run
        return None
