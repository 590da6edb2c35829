"""Run folders as a page shows them: which there are, how far their stages are, what they cost. Reads only; no torch here."""

import json
import math
import os
import time
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from finback.runs.files import read_lines
from finback.runs.ledger import BASIS, DOLLARS_PER_CORE_HOUR
from finback.serve.errors import ApiError

DEEPEST = 3  # folders below the runs folder in which a run is looked for
MOST_BYTES = 4 << 20  # of a JSON file that is read as a whole
MARKER = "recipe.json"


@dataclass(frozen=True)
class StageFolder:
    """One stage of a run."""

    name: str
    folder: Path
    config: dict[str, Any]
    results: dict[str, Any] | None  # None until it is finished

    @property
    def kind(self) -> str:
        """The stage's class, such as GRPO."""
        return str(self.config.get("type", "?"))

    @property
    def exams(self) -> list[str]:
        """Names of the exams whose answers lie in the folder."""
        listed = self.config.get("exams")
        names = [e.get("name") for e in listed if isinstance(e, dict)] if isinstance(listed, list) else []
        return [str(n) for n in names if plain_file(self.folder, f"{n}.jsonl")]


class Runs:
    """The run folders under one folder. What a request names is looked up among them, never made into a path."""

    def __init__(self, root: Path) -> None:
        self.root = root

    def folders(self) -> dict[str, Path]:
        """Run folders by name, the latest first; links are not followed."""
        found: list[tuple[float, str, Path]] = []
        here = self.root.resolve()
        waiting = [(here, 0)]
        while waiting:
            folder, depth = waiting.pop()
            if plain_file(folder, MARKER):
                name = folder.relative_to(here).as_posix() if folder != here else here.name
                found.append((_changed(folder), name, folder))
            elif depth < DEEPEST:
                waiting += [(p, depth + 1) for p in _inside(folder)]
        return {name: folder for _, name, folder in sorted(found, key=lambda f: (-f[0], f[1]))}

    def find(self, name: str) -> Path:
        """The folder of a run; ApiError 404 where there is none of this name."""
        folder = self.folders().get(name)
        if folder is None:
            raise ApiError(404, "no such run", "run")
        return folder

    def stage(self, run: str, name: str) -> StageFolder:
        """A stage of a run; ApiError 404 where there is none of this name."""
        for stage in stages(self.find(run)):
            if stage.name == name:
                return stage
        raise ApiError(404, "no such stage", "stage")


def stages(root: Path) -> list[StageFolder]:
    """Stages that have begun, in the order in which they did."""
    order = list(_object(root, "summary.json").get("stages", {}))
    found = []
    for folder in _inside(root):
        config = _object(folder, "config.json")
        if "type" in config:
            is_done = plain_file(folder, "manifest.json")
            results = (_object(folder, "manifest.json").get("results") or {}) if is_done else None
            found.append(StageFolder(folder.name, folder, config, results))
    last = len(order)

    def place(stage: StageFolder) -> tuple[int, float]:
        known = order.index(stage.name) if stage.name in order else last
        return known, _time_of(stage.folder / "config.json")

    return sorted(found, key=place)


def overview(name: str, root: Path) -> dict[str, Any]:
    """A run in a list: its stages with state and cost."""
    begun, busy = stages(root), is_locked(root)
    listed = [stage_state(stage, busy and stage is begun[-1]) for stage in begun]
    marker = _object(root, MARKER)
    running = any(s["state"] == "running" for s in listed)
    done = bool(listed) and all(s["state"] == "done" for s in listed) and plain_file(root, "summary.json")
    return {
        "name": name,
        "recipe": str(marker.get("recipe", "?")),
        "seed": marker.get("seed"),
        "stages": listed,
        "state": "running" if running or busy else "done" if done else "stopped",
        "changed": _changed(root),
        "seconds": sum(s["seconds"] for s in listed),
        "money": sum(s["money"] for s in listed),
        "basis": BASIS,
    }


def stage_state(stage: StageFolder, busy: bool) -> dict[str, Any]:
    """A stage's state, and what the ledger says that it has cost."""
    lines = read_lines(stage.folder / "ledger.jsonl") if plain_file(stage.folder, "ledger.jsonl") else []
    seconds = sum(_number(line.get("seconds")) for line in lines)
    core_seconds = sum(_number(line.get("seconds")) * _number(line.get("cores")) for line in lines)
    spent = {k: sum(_number(line.get(k)) for line in lines) for k in ("tokens_trained", "tokens_generated", "flops")}
    return {
        "name": stage.name,
        "kind": stage.kind,
        "state": "done" if stage.results is not None else "running" if busy else "stopped",
        "seconds": seconds,
        "money": core_seconds * DOLLARS_PER_CORE_HOUR / 3600,
        "cores": cores(stage),
        "has_metrics": plain_file(stage.folder, "metrics.jsonl"),
        "exams": stage.exams,
        "has_samples": plain_file(stage.folder, "samples.jsonl"),
        **spent,
    }


def cores(stage: StageFolder) -> float:
    """Cores that a stage works on; 1 until its ledger says."""
    path = stage.folder / "ledger.jsonl"
    if plain_file(stage.folder, path.name):
        with path.open("rb") as handle:
            try:
                return max(1.0, _number(json.loads(handle.readline()).get("cores")))
            except (ValueError, AttributeError):
                return 1.0
    return 1.0


def is_locked(root: Path) -> bool:
    """Whether somebody is at work in a run folder; where locks cannot be asked, whether it changed a minute ago."""
    try:
        import fcntl
    except ImportError:
        return time.time() - _changed(root) < 60
    try:
        with (root / ".lock").open("rb") as handle:
            fcntl.flock(handle.fileno(), fcntl.LOCK_SH | fcntl.LOCK_NB)
    except BlockingIOError:
        return True
    except OSError:
        return False
    return False


def plain_file(folder: Path, name: str) -> bool:
    """Whether a folder itself holds a file of this name: neither a link nor something elsewhere."""
    path = folder / name
    return path.parent == folder and path.is_file() and not path.is_symlink()


def _inside(folder: Path) -> list[Path]:
    try:
        with os.scandir(folder) as entries:
            names = [e.name for e in entries if e.is_dir(follow_symlinks=False) and not e.name.startswith(".")]
    except OSError:
        return []
    return [folder / name for name in sorted(names)]


def _object(folder: Path, name: str) -> dict[str, Any]:
    """A JSON object in a file; {} where there is none or it is damaged: a page shows what can be shown."""
    path = folder / name
    if not plain_file(folder, name) or path.stat().st_size > MOST_BYTES:
        return {}
    try:
        # what is no number cannot be sent on as JSON
        found = json.loads(path.read_text(encoding="utf-8"), parse_constant=lambda _: None, parse_float=_finite)
    except (OSError, ValueError, RecursionError):
        return {}
    return found if isinstance(found, dict) else {}


def _finite(text: str) -> float | None:
    found = float(text)
    return found if math.isfinite(found) else None


def _number(value: Any) -> float:
    is_number = isinstance(value, int | float) and value == value and abs(value) != float("inf")
    return float(value) if is_number else 0.0


def _time_of(path: Path) -> float:
    try:
        return path.stat().st_mtime
    except OSError:
        return 0.0


def _changed(root: Path) -> float:
    """When something in a run was last written."""
    names = ("metrics.jsonl", "manifest.json", "config.json")
    return max([_time_of(root / MARKER), *(_time_of(f / n) for f in _inside(root) for n in names)])
