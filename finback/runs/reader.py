"""Reads run folders: stages, their state, results and logs. Does not import torch.

A page that may be public reads leniently: damaged files count as missing and mark their stage as torn, and symbolic links
are not followed. Everywhere else a damaged file is a UserError.
"""

import json
import math
import os
import time
from collections.abc import Iterator
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

from finback.config import UserError
from finback.runs import declaration as declarations
from finback.runs import files
from finback.runs import ledger as ledgers
from finback.runs.declaration import DECLARATION, Declaration
from finback.runs.files import CONFIG, LEDGER, LOCK, MANIFEST, METRICS, RECIPE, ROUTER, SAMPLES, SUMMARY, WATCHED
from finback.runs.ledger import Ledger
from finback.runs.lock import is_busy_elsewhere

MOST_BYTES = 4 << 20  # limit for a JSON file that is read leniently


@dataclass(frozen=True)
class StageFolder:
    """A stage that has begun."""

    folder: Path
    # the stage's recipe.config_json
    config_json: dict[str, Any]
    # None until it is finished
    manifest: dict[str, Any] | None = None
    # the damaged or missing file, if read leniently
    torn: str = ""

    @cached_property
    def config(self) -> dict[str, Any]:
        """Its knobs, with the name of its class as "type"."""
        return {k: v for k, v in self.config_json.items() if k != DECLARATION}

    @cached_property
    def declaration(self) -> Declaration:
        return declarations.from_json(self.config_json.get(DECLARATION))

    @property
    def name(self) -> str:
        """The stage's name."""
        return self.folder.name

    @property
    def inputs(self) -> list[str]:
        """Names of earlier stages, or paths, that it reads."""
        declared = self.config_json.get(DECLARATION)
        return list(declared.get("inputs") or ()) if isinstance(declared, dict) else []

    @property
    def type(self) -> str:
        """Name of the stage's class, such as GRPO."""
        return str(self.config.get("type", "?"))

    @property
    def kind(self) -> str:
        """The kind that it declares, such as reinforcement learning."""
        return self.declaration.kind

    @property
    def is_finished(self) -> bool:
        """Whether it has a valid manifest."""
        return self.manifest is not None

    def has_ended(self) -> bool:
        """Whether it has finished in the meantime."""
        return plain_file(self.folder, MANIFEST)

    @property
    def results(self) -> dict[str, Any]:
        """The results of the stage; {} until it is finished."""
        found = (self.manifest or {}).get("results")
        return found if isinstance(found, dict) else {}

    @property
    def exams(self) -> list[str]:
        """Names of the exams with answers in the folder."""
        listed = self.config.get("exams")
        names = [e.get("name") for e in listed if isinstance(e, dict)] if isinstance(listed, list) else []
        return [str(n) for n in names if plain_file(self.folder, f"{n}.jsonl")]

    @property
    def metrics_file(self) -> Path:
        """The file for metrics_table.MetricsTable."""
        return self.folder / METRICS

    def answers_file(self, exam: str = "") -> Path:
        """Answers to an exam, or of RL's steps; for samples.SampleIndex."""
        return self.folder / (f"{exam}.jsonl" if exam else SAMPLES)

    @property
    def watches(self) -> str:
        """The name by which `answers_file` finds answers to watched prompts; "" if there are none."""
        return WATCHED.removesuffix(".jsonl") if plain_file(self.folder, WATCHED) else ""

    @property
    def has_metrics(self) -> bool:
        """Whether it has logged steps."""
        return plain_file(self.folder, METRICS)

    @property
    def has_samples(self) -> bool:
        """Whether it has recorded answers of RL."""
        return plain_file(self.folder, SAMPLES)

    def metrics(self) -> list[dict[str, Any]]:
        """One record per logged step."""
        return self._lines(METRICS)

    def routers(self) -> list[dict[str, Any]]:
        """Loads and biases of the routers, every few steps of pre-training."""
        return self._lines(ROUTER)

    def ledger(self) -> list[dict[str, Any]]:
        """Provenance, and what was spent between checkpoints, without invalid rows."""
        return self._ledger.lines

    @property
    def ledger_faults(self) -> list[str]:
        """Descriptions of invalid rows that were ignored."""
        return self._ledger.faults

    @property
    def _ledger(self) -> Ledger:
        return ledgers.read(self.folder) if plain_file(self.folder, LEDGER) else Ledger([], [])

    def answers(self, exam: str = "") -> list[dict[str, Any]]:
        """Answers to an exam, or of RL's steps."""
        return self._lines(self.answers_file(exam).name)

    def _lines(self, name: str) -> list[dict[str, Any]]:
        return files.read_lines(self.folder / name) if plain_file(self.folder, name) else []


def stages(root: Path, lenient: bool = False) -> list[StageFolder]:
    """Stages that have begun: in the order of summary.json as far as it lists them, then by start time."""
    listed = _object(root, SUMMARY, lenient).get("stages")
    order = list(listed) if isinstance(listed, dict) else []
    found = [stage for folder in inside(root, lenient) if (stage := _stage(folder, lenient)) is not None]
    place = {name: i for i, name in enumerate(order)}
    return sorted(found, key=lambda s: (place.get(s.name, len(order)), _time_of(s.folder / CONFIG)))


def _stage(folder: Path, lenient: bool) -> StageFolder | None:
    config = _object(folder, CONFIG, lenient)
    manifest = _object(folder, MANIFEST, lenient) if plain_file(folder, MANIFEST) else None
    if not config.get("type"):
        has_begun = any(plain_file(folder, name) for name in (CONFIG, LEDGER, MANIFEST, METRICS))
        if lenient:
            return StageFolder(folder, {}, manifest or None, CONFIG) if has_begun else None
        if manifest is not None:
            raise torn(folder / CONFIG, "missing, or not the knobs of a stage")
        return None
    is_torn = lenient and manifest == {}
    return StageFolder(folder, config, None if is_torn else manifest, MANIFEST if is_torn else "")


def finished_stages(root: Path) -> Iterator[Path]:
    """Folders under `root` with a manifest, oldest first.

    Those listed in summary.json come in its order, the recipe's, since files of a copied run may have any times.
    """
    listed = _object(root, SUMMARY, lenient=True).get("stages")
    place = {name: i for i, name in enumerate(listed if isinstance(listed, dict) else ())}
    written = _time_of(root / SUMMARY)

    def age(folder: Path) -> tuple[float, float]:
        finished = _time_of(folder / MANIFEST)
        return place.get(folder.name, len(place) if finished > written else -1), finished

    yield from sorted((p.parent for p in root.glob(f"*/{MANIFEST}")), key=age)


def is_run(root: Path) -> bool:
    """Whether a folder is a run folder."""
    return plain_file(root, RECIPE)


def recipe(root: Path, lenient: bool = False) -> dict[str, Any]:
    """The recipe's name and the seed of a run; UserError if the folder is not a run folder."""
    if not lenient and not is_run(root):
        problem = "not a run folder: it has no recipe.json" if root.is_dir() else "no such folder"
        raise UserError("run", str(root), problem, "Give a folder made by `finback run`, such as runs/tiny.")
    return _object(root, RECIPE, lenient)


def summary(root: Path) -> dict[str, Any]:
    """Results and costs of all finished stages; UserError if none has finished or they are not listed."""
    if not has_summary(root):
        raise UserError("run", str(root), "has no summary.json", "Give a folder such as runs/tiny.")
    found = _object(root, SUMMARY)
    stages = found.get("stages")
    if "recipe" not in found or not isinstance(stages, dict) or not all(isinstance(s, dict) for s in stages.values()):
        raise torn(root / SUMMARY, "not a recipe's stages")
    return found


def has_summary(root: Path) -> bool:
    """Whether a run folder has a summary."""
    return plain_file(root, SUMMARY)


def damaged(root: Path) -> list[str]:
    """The files of a run, outside its stages, that exist and cannot be read."""
    return [name for name in (RECIPE, SUMMARY) if plain_file(root, name) and not _object(root, name, lenient=True)]


def is_locked(root: Path) -> bool:
    """Whether a process is working in a run folder; without locks, whether it changed within a minute."""
    try:
        import fcntl
    except ImportError:
        return time.time() - changed(root) < 60
    try:
        with (root / LOCK).open("rb") as handle:
            fcntl.flock(handle.fileno(), fcntl.LOCK_SH | fcntl.LOCK_NB)
    except BlockingIOError:
        return True
    except OSError:
        pass  # no run has ever locked it, or this file system has no locks
    return is_busy_elsewhere(root)


def changed(root: Path) -> float:
    """Time of the last change in a run, in seconds since 1970."""
    written = (folder / name for folder in inside(root, lenient=True) for name in (METRICS, MANIFEST, CONFIG))
    return max([_time_of(root / RECIPE), *map(_time_of, written)])


def plain_file(folder: Path, name: str) -> bool:
    """Whether a folder itself has a file of this name, not a symbolic link."""
    path = folder / name
    return path.parent == folder and path.is_file() and not path.is_symlink()


def inside(folder: Path, lenient: bool = False) -> list[Path]:
    """The folders in a folder, sorted by name."""
    try:
        with os.scandir(folder) as entries:
            found = [e.name for e in entries if e.is_dir(follow_symlinks=not lenient) and not e.name.startswith(".")]
    except OSError:
        return []
    return [folder / name for name in sorted(found)]


def _object(folder: Path, name: str, lenient: bool = False) -> dict[str, Any]:
    """A JSON object in a file; {} if the file does not exist."""
    path = folder / name
    if not plain_file(folder, name):
        return {}
    found = _lenient(path) if lenient else files.read_json(path)
    if not isinstance(found, dict):
        raise torn(path, "not an object")
    return found


def _lenient(path: Path) -> dict[str, Any]:
    """{} for anything but a JSON object; NaN and infinities, which JSON cannot represent, become None."""

    def finite(text: str) -> float | None:
        return value if math.isfinite(value := float(text)) else None

    try:
        text = path.read_text(encoding="utf-8") if path.stat().st_size <= MOST_BYTES else ""
        found = json.loads(text, parse_constant=lambda _: None, parse_float=finite)
    except (OSError, ValueError, RecursionError):
        return {}
    return found if isinstance(found, dict) else {}


def torn(path: Path, problem: str) -> UserError:
    """The error for a file in a run folder that cannot be read."""
    what = "that file" if path.name in (RECIPE, SUMMARY) else "that stage's folder"
    return UserError("run", str(path), problem, f"Delete {what} and run the recipe again.")


def _time_of(path: Path) -> float:
    try:
        return path.stat().st_mtime
    except OSError:
        return 0.0
