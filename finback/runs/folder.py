"""The run folder: everything that later stages and reports read.

runs/<recipe>/recipe.json            the recipe and seed of this folder, and the commits of hub models
runs/<recipe>/<stage>/config.json    the stage's knobs, resolved
                      metrics.jsonl  one line per logged step
                      samples.jsonl  every answer of every step of RL
                      watched.jsonl  answers to RL's watched prompts
                      router.jsonl   loads and biases of the routers, every few steps of pre-training
                      ledger.jsonl   provenance, then what was spent between checkpoints
                      manifest.json  written last: its existence means finished
runs/<recipe>/summary.json           results and costs of all finished stages

Only rank 0 writes. Files are replaced as a whole, never rewritten in place.
"""

import contextlib
import hashlib
import json
import os
import platform
import shutil
import sys
import time
from collections.abc import Iterable, Iterator, Sequence
from pathlib import Path
from typing import Any, Protocol, TextIO

from finback.config import UserError
from finback.runs import adapters, hub_models, provenance
from finback.runs.energy import CpuTime, Energy
from finback.runs.external import EnginePrice, ExternalEngines, TokenCount, billed
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

STEPPED = (METRICS, SAMPLES, ROUTER, WATCHED)  # files with one or more rows per step

BEST = ".best"  # the model with the best validation score, during training
# needed for resuming only, deleted when a stage is finished
SCRATCH = ("step-*.safetensors*", ".tmp*", "part-*.json*", "sharded", ".model", ".weights", ".answers", BEST)

NEEDED_BYTES = 200 * 2**20  # free space required to start a stage


class Ranks(Protocol):
    """What run folders need from a group of processes; parallel.mesh.World implements it."""

    rank: int
    size: int

    def barrier(self) -> None:
        """Waits until all ranks have called it."""
        ...

    def any(self, flag: bool) -> bool:
        """Whether the flag is true on any rank."""
        ...

    def gather(self, value: Any) -> list[Any]:
        """The values of all ranks, by rank."""
        ...


class Interrupted(Exception):
    """Work stopped at a safe point because the user asked; running the recipe again continues there."""


class StageRun:
    """One stage's folder and services: inputs, seeds, metrics, ledger, progress, finishing."""

    def __init__(self, root: Path, name: str, seed: int, ranks: Ranks, quiet: bool = False) -> None:
        self.root, self.folder, self.name, self.ranks, self.quiet = root, root / name, name, ranks, quiet
        self.base_seed = seed
        # stages of the whole recipe, if known
        self.stages: Sequence[Any] = ()
        self.stop_requested = False
        self._mark = time.perf_counter()
        # engines outside the ranks that work for this stage
        self.external: list[ExternalEngines] = []
        self._energy: Energy | None = None
        self._cpu: CpuTime | None = None
        self._line: TextIO = sys.stderr

    @property
    def is_writer(self) -> bool:
        """Whether this rank writes the files that a stage has once."""
        return self.ranks.rank == 0

    def seed(self, *purpose: object) -> int:
        """A seed for one purpose: the same for the same recipe seed and words, unrelated between purposes."""
        words = " ".join(map(str, (self.base_seed, *purpose)))
        return int.from_bytes(hashlib.blake2b(words.encode(), digest_size=7).digest(), "big")

    def input(self, start: str) -> Path:
        """The folder of an earlier stage, or what `start` names: a finished stage elsewhere, or a checkpoint.

        `base/average` names a folder within an earlier stage: another form of its model. For base+adapter, both are resolved.
        A model of the hub is used at the commit at which the run began.
        """
        base, adapter = adapters.split(start)
        if adapter:
            return Path(f"{self.input(base)}+{self.input(adapter)}")
        stage, _, within = start.partition("/")
        inside = self.root / start
        if (self.root / stage / MANIFEST).is_file() and (not within or inside.is_dir()):
            return inside
        path = Path(start)
        if (self.root / stage).is_dir() or not hub_models.is_name(path):  # the stage has no such folder
            return path
        return hub_models.fetched(path, read_object(self.root / RECIPE).get(HUB, {}).get(start, ""))

    def begin(self, recipe: Path | None, inputs: Iterable[str]) -> None:
        """Records provenance: software, machine and inputs; starts reading energy counters."""
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
        """Appends one row to metrics.jsonl."""
        if self._energy is not None:
            self._energy.read_if_due()
        self.append(METRICS, {"step": step, **metrics})

    def rewind(self, step: int) -> None:
        """Removes logged steps from `step` on, because they will be repeated."""
        for path in (self.folder / name for name in STEPPED):
            if self.is_writer and path.is_file():
                write_lines(path, [r for r in read_lines(path) if r["step"] < step])

    def account(self, **spent: float) -> None:
        """Appends what was spent since the last call to ledger.jsonl; adds wall and CPU seconds and metered joules.

        FLOPs by purpose are named flops_<one of FLOPS>; `flops` are those that MFU counts.
        """
        assert all(k[6:] in FLOPS for k in spent if k.startswith("flops_")), f"unknown purpose in {set(spent)}"
        if not self.is_writer:
            return
        now = time.perf_counter()
        seconds, self._mark = now - self._mark, now
        joules = self._energy.take() if self._energy is not None else None
        if joules is not None:
            spent |= {"joules": joules, "metered_core_seconds": seconds * self.ranks.size}
        busy = self._cpu.take() if self._cpu is not None else None
        if busy is not None:
            spent["cpu_seconds"] = busy
        external = billed(self.external, joules is not None)
        self.append(LEDGER, {"seconds": seconds, "cores": self.ranks.size, **spent, **external})

    def hire(self, name: str, price: EnginePrice, counts: list[TokenCount], knows_flops: bool) -> ExternalEngines:
        """Counts external engines of one knob in the ledger from now on; arguments as for ExternalEngines."""
        self.external.append(ExternalEngines(name, price, counts, knows_flops))
        return self.external[-1]

    @contextlib.contextmanager
    def billed(self) -> Iterator[None]:
        """A context that records external engines in the ledger if it ends with an error, because they must be paid for anyway."""
        try:
            yield
        except BaseException:
            if self.external:  # this rank may be the only one that fails, so nothing is gathered
                for engines in self.external:
                    engines.add(*engines.take())
                self.account()
            raise

    def gather_external(self) -> None:
        """Collects on rank 0 the tokens that external engines have read and generated for all ranks. Collective."""
        if not self.external:
            return
        found = self.ranks.gather([engines.take() for engines in self.external])
        for engines, *counts in zip(self.external, *found, strict=True):
            for count in counts:
                engines.add(*count)

    def append(self, name: str, *records: dict[str, Any]) -> None:
        """Appends rows to one of the folder's files; rows of a step have its number as "step"."""
        if not self.is_writer:
            return
        with (self.folder / name).open("a+b") as handle:
            torn = b""
            if handle.tell():
                handle.seek(-1, os.SEEK_END)
                torn = b"" if handle.read(1) == b"\n" else b"\n"  # terminate an incomplete line left by a kill
            handle.write(torn + b"".join(json.dumps(record).encode() + b"\n" for record in records))

    def check_stop(self) -> bool:
        """Whether any rank was asked to stop; all ranks get the same answer."""
        return self.ranks.any(self.stop_requested)

    def say(self, text: str) -> None:
        """Prints one line on stderr, on rank 0 only."""
        if self.is_writer and not self.quiet:
            print(f"\r\033[K{text}" if self._line.isatty() else text, file=self._line, flush=True)

    def finish(self, results: dict[str, Any]) -> None:
        """Writes the manifest, which marks the stage as finished; then deletes what only resuming needed."""
        self.gather_external()
        self.account()
        if self.is_writer:
            scratch = {p.name for p in self._scratch()}
            names = {p.name for p in self.folder.iterdir() if p.is_file()} - scratch - {MANIFEST}
            write_json(self.folder / MANIFEST, {"stage": self.name, "files": sorted(names), "results": results})
        self.tidy()
        self.ranks.barrier()

    def tidy(self) -> None:
        """Deletes what only resuming needed, in case a kill came after the manifest was written."""
        for path in self._scratch() if self.is_writer else ():
            shutil.rmtree(path) if path.is_dir() else path.unlink()

    def _scratch(self) -> list[Path]:
        return [path for pattern in SCRATCH for path in self.folder.glob(pattern)]


def prepare_folder(root: Path) -> None:
    """Creates a run folder; UserError if it is not writable or the disk is full."""
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
