"""The run folder: what a stage reads of earlier ones, and all that a report reads.

runs/<recipe>/recipe.json            which recipe and seed this folder belongs to, and which commits of the hub's models
runs/<recipe>/<stage>/config.json    the stage's knobs, resolved
                      metrics.jsonl  one line per logged step
                      samples.jsonl  every answer of every step of RL
                      watched.jsonl  answers to the prompts that RL watches
                      router.jsonl   loads and biases of the routers, every few steps of pre-training
                      ledger.jsonl   what it was made with, then what was spent between two checkpoints
                      manifest.json  written last: its existence means finished
runs/<recipe>/summary.json           results and costs of all finished stages

Only rank 0 writes. Files are replaced as a whole, never rewritten in place.
"""

import hashlib
import json
import os
import platform
import shutil
import sys
import time
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any, Protocol, TextIO

from finback.config import UserError
from finback.runs import adapters, hub_models, provenance
from finback.runs.energy import CpuTime, Energy
from finback.runs.files import (
    HUB,
    LEDGER,
    MANIFEST,
    METRICS,
    RECIPE,
    ROUTER,
    SAMPLES,
    WATCHED,
    read_lines,
    read_object,
    write_json,
    write_lines,
)
from finback.runs.ledger import FLOPS

STEPPED = (METRICS, SAMPLES, ROUTER, WATCHED)  # files whose lines belong to steps

BEST = ".best"  # the model of a stage in training that has answered its validation set best
# what resuming needs, and nobody once a stage is finished
SCRATCH = ("step-*.safetensors*", ".tmp*", "part-*.json*", "sharded", ".model", ".weights", ".answers", BEST)

NEEDED_BYTES = 200 * 2**20  # free space asked for before a stage starts


class Ranks(Protocol):
    """What run folders need of a group of processes; parallel.mesh.World is one."""

    rank: int
    size: int

    def barrier(self) -> None: ...

    def any(self, flag: bool) -> bool: ...

    def gather(self, value: Any) -> list[Any]: ...


class Interrupted(Exception):
    """Work stopped at a safe point because the user asked; running the recipe again continues from there."""


class StageRun:
    """One stage's folder and its means: inputs, seeds, metrics, ledger, progress, finish."""

    def __init__(self, root: Path, name: str, seed: int, ranks: Ranks, quiet: bool = False) -> None:
        self.root, self.folder, self.name, self.ranks, self.quiet = root, root / name, name, ranks, quiet
        self.base_seed = seed
        # those of the whole recipe, as far as it is known
        self.stages: Sequence[Any] = ()
        self.stop_requested = False
        self._mark = time.perf_counter()
        # of engines that others run for this stage, which cost what ranks cost
        self.hired_cores = 0
        self._energy: Energy | None = None
        self._cpu: CpuTime | None = None
        self._line: TextIO = sys.stderr

    @property
    def is_writer(self) -> bool:
        return self.ranks.rank == 0

    def seed(self, *purpose: object) -> int:
        """A seed for one purpose: the same for the same recipe seed and words, unrelated between purposes."""
        words = " ".join(map(str, (self.base_seed, *purpose)))
        return int.from_bytes(hashlib.blake2b(words.encode(), digest_size=7).digest(), "big")

    def input(self, start: str) -> Path:
        """The folder of an earlier stage, or what `start` names: a finished stage elsewhere, or a checkpoint.

        `base/average` is what lies within an earlier stage: another form of its model. Of base+adapter, both are looked up.
        A model of the hub is that of the commit at which the run was begun.
        """
        base, adapter = adapters.split(start)
        if adapter:
            return Path(f"{self.input(base)}+{self.input(adapter)}")
        stage, _, within = start.partition("/")
        inside = self.root / start
        if (self.root / stage / MANIFEST).is_file() and (not within or inside.is_dir()):
            return inside
        path = Path(start)
        if (self.root / stage).is_dir() or not hub_models.is_name(path):  # a stage has nothing of this name
            return path
        return hub_models.fetched(path, read_object(self.root / RECIPE).get(HUB, {}).get(start, ""))

    def begin(self, recipe: Path | None, inputs: Iterable[str]) -> None:
        """Write down what works from now on, on what and from what; start reading the counters of energy."""
        processes = self.ranks.gather((platform.node(), os.getpid()))
        if not self.is_writer:
            return
        self._energy, self._cpu = Energy(), CpuTime(processes)
        began = {
            "seconds": 0.0,
            "cores": self.ranks.size,
            **provenance.made_with(recipe),
            "metered": self._energy.method,
            "inputs": {start: provenance.digest(self.input(start)) for start in inputs},
        }
        self.append(LEDGER, began)

    def log(self, step: int, **metrics: Any) -> None:
        """Append one line to metrics.jsonl."""
        if self._energy is not None:
            self._energy.read_if_due()
        self.append(METRICS, {"step": step, **metrics})

    def rewind(self, step: int) -> None:
        """Forget logged steps from `step` on: they are about to be done again."""
        for path in (self.folder / name for name in STEPPED):
            if self.is_writer and path.is_file():
                write_lines(path, [r for r in read_lines(path) if r["step"] < step])

    def account(self, **spent: float) -> None:
        """Append what was spent since the last call to ledger.jsonl; wall and CPU seconds and metered joules are added here.

        FLOPs by purpose are named flops_<one of FLOPS>; `flops` are those that MFU is of.
        """
        assert all(k[6:] in FLOPS for k in spent if k.startswith("flops_")), f"unknown purpose in {set(spent)}"
        now = time.perf_counter()
        seconds, self._mark = now - self._mark, now
        joules = self._energy.take() if self._energy is not None else None
        if joules is not None:
            spent |= {"joules": joules, "metered_core_seconds": seconds * self.ranks.size}
        busy = self._cpu.take() if self._cpu is not None else None
        if busy is not None:
            spent["cpu_seconds"] = busy
        self.append(LEDGER, {"seconds": seconds, "cores": self.ranks.size + self.hired_cores, **spent})

    def append(self, name: str, *records: dict[str, Any]) -> None:
        """Append lines to one of the folder's files; those of a step have its number as "step"."""
        if not self.is_writer:
            return
        with (self.folder / name).open("a+b") as handle:
            torn = b""
            if handle.tell():
                handle.seek(-1, os.SEEK_END)
                torn = b"" if handle.read(1) == b"\n" else b"\n"  # a kill left half a line: keep it apart
            handle.write(torn + b"".join(json.dumps(record).encode() + b"\n" for record in records))

    def check_stop(self) -> bool:
        """Whether any rank was asked to stop; all ranks get the same answer."""
        return self.ranks.any(self.stop_requested)

    def say(self, text: str) -> None:
        """One line of prose on stderr, from rank 0."""
        if self.is_writer and not self.quiet:
            print(f"\r\033[K{text}" if self._line.isatty() else text, file=self._line, flush=True)

    def finish(self, results: dict[str, Any]) -> None:
        """Write the manifest, from now on the stage is done; only then is what resuming needs dropped."""
        self.account()
        if self.is_writer:
            scratch = {p.name for p in self._scratch()}
            names = {p.name for p in self.folder.iterdir() if p.is_file()} - scratch - {MANIFEST}
            write_json(self.folder / MANIFEST, {"stage": self.name, "files": sorted(names), "results": results})
        self.tidy()
        self.ranks.barrier()

    def tidy(self) -> None:
        """Drop what only resuming needed; a kill may have come between the manifest and this."""
        for path in self._scratch() if self.is_writer else ():
            shutil.rmtree(path) if path.is_dir() else path.unlink()

    def _scratch(self) -> list[Path]:
        return [path for pattern in SCRATCH for path in self.folder.glob(pattern)]


def prepare_folder(root: Path) -> None:
    """Make a run folder, or say why it cannot be used: not writable, or no space left."""
    try:
        root.mkdir(parents=True, exist_ok=True)
        probe = root / f".write-test-{os.getpid()}"
        probe.write_bytes(b"x")
        probe.unlink()
    except OSError as error:
        problem = f"cannot be written to ({error.strerror})"
        raise UserError("runs", str(root), problem, "Choose another folder with --runs.") from None
    free = shutil.disk_usage(root).free
    if free < NEEDED_BYTES:
        problem = f"only {free / 2**20:.0f} MB free, {NEEDED_BYTES / 2**20:.0f} MB needed"
        raise UserError("runs", str(root), problem, "Free some space or choose another disk with --runs.")
