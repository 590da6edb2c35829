"""What a stage of a run was made with, and the energy that the machine's own counters tell. No torch here.

RAPL counts the joules of a processor's packages and of its memory, of everybody who works on the machine; NVML those of
a GPU. Neither knows of fans, disks and the power supply. Where there is no counter to read, run.py estimates.
"""

import hashlib
import importlib.metadata
import platform
import subprocess
import sys
import time
from dataclasses import dataclass
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

from finback import __version__

RAPL = Path("/sys/class/powercap")
WATTS_AT_MOST = (
    1000.0  # of one counted part: a counter that such a part could have turned over unseen is not believed
)
# FLOPs by what they were for, as the EU's guidelines on general-purpose models tell them apart (annex, 117-133)
FLOPS = {
    "training": "forward and backward passes that update parameters",
    "recomputed": "activations made again in the backward pass",
    "generation": "answers sampled to learn from, rejected ones included",
    "evaluation": "probes, exams and validation text",
    "auxiliary": "forward passes of teachers and reference models",
}
LOOK_SECONDS = 60.0  # counters of energy are read at least so often while a stage logs steps
PACKAGES = ("torch", "numpy", "safetensors", "tokenizers")


def made_with(recipe: Path | None) -> dict[str, Any]:
    """The time, versions, machine, and the commit of the recipe's checkout, if it lies in one."""
    checkout = commit(recipe) if recipe is not None else None
    return {
        "began": datetime.now(UTC).isoformat(timespec="seconds"), "software": software(), "machine": machine(),
        **(checkout or {"commit": None, "dirty": None}),
    }  # fmt: skip


def software() -> dict[str, str]:
    """Versions of what computes."""
    found = {"finback": __version__, "python": platform.python_version()}
    for name in PACKAGES:
        try:
            found[name] = importlib.metadata.version(name)
        except importlib.metadata.PackageNotFoundError:  # a copy on the path, without metadata
            continue
    return found


def commit(path: Path) -> dict[str, Any] | None:
    """The commit of the checkout that holds `path`, and whether tracked files differ from it; None without git."""
    folder = path if path.is_dir() else path.parent
    head = _git(folder, "rev-parse", "HEAD")
    if head is None:
        return None
    changed = _git(folder, "status", "--porcelain", "--untracked-files=no")
    return {"commit": head, "dirty": None if changed is None else bool(changed)}


def digest(path: Path) -> str | None:
    """SHA-256 that tells an input from another: of a stage's manifest, or of a checkpoint's config; None without."""
    for name in ("manifest.json", "config.json"):
        if (path / name).is_file():
            return sha256(path / name)
    return None


def sha256(path: Path) -> str:
    """Of a file's content, in hexadecimal."""
    with path.open("rb") as handle:
        return hashlib.file_digest(handle, "sha256").hexdigest()


def _git(folder: Path, *words: str) -> str | None:
    try:
        done = subprocess.run(["git", "-C", str(folder), *words], capture_output=True, text=True, timeout=10)
    except (OSError, subprocess.TimeoutExpired):
        return None
    return done.stdout.strip() if done.returncode == 0 else None


def machine() -> dict[str, Any]:
    """The processor and its GPUs, by name."""
    info = Path("/proc/cpuinfo")
    lines = info.read_text(encoding="utf-8", errors="replace").splitlines() if info.is_file() else []
    names = [line.partition(":")[2].strip() for line in lines if line.startswith("model name")]
    torch = _cuda()
    gpus = [torch.cuda.get_device_name(i) for i in range(torch.cuda.device_count())] if torch else []
    return {
        "cpu": names[0] if names else platform.processor() or platform.machine(), "cpus": len(names) or None,
        "gpus": gpus, "system": f"{platform.system()} {platform.release()}",
    }  # fmt: skip


def _cuda() -> Any:
    """torch, if it is loaded and has a GPU to work on."""
    torch = sys.modules.get("torch")
    return torch if torch is not None and torch.cuda.is_available() else None


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
        return " and ".join(
            part for part in (rapl, f"NVML of {len(self.gpus)} GPUs" if self.gpus else "") if part
        )

    def look(self, now: float | None = None) -> None:
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

    def glance(self) -> None:
        """Look if that was not done lately: cheap enough for every step."""
        if time.monotonic() - self.at > LOOK_SECONDS:
            self.look()

    def take(self) -> float | None:
        """Joules since the last call; None where nothing can be read, or a counter was not looked at for too long."""
        if not self.method:
            return None
        self.look()
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
    torch = _cuda()
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
