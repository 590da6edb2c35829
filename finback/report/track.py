"""A run's curves in other people's viewers: TensorBoard, trackio, Weights & Biases.

They are fed from metrics.jsonl, while a run goes on or long after, so that no stage knows of them and none waits.
"""

import importlib
import json
import math
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any, Literal, Protocol

from finback.config import UserError
from finback.runs.files import read_json

Viewer = Literal["tensorboard", "trackio", "wandb"]


class Tracker(Protocol):
    """What takes a stage's numbers."""

    def log(self, step: int, numbers: dict[str, float]) -> None: ...

    def close(self) -> None: ...


class _TensorBoard:
    """One folder of events per stage, beside each other so that they show as runs."""

    def __init__(self, run: str, stage: str, knobs: dict[str, Any], out: Path) -> None:
        try:
            from torch.utils.tensorboard import SummaryWriter
        except ImportError:
            raise _missing("tensorboard") from None
        self.writer = SummaryWriter(str(out / run / stage))
        self.writer.add_text("knobs", "\n".join(f"    {k}: {v}" for k, v in knobs.items()))

    def log(self, step: int, numbers: dict[str, float]) -> None:
        for name, value in numbers.items():
            self.writer.add_scalar(name, value, step)

    def close(self) -> None:
        self.writer.close()


class _Logger:
    """trackio and wandb, whose interface is one and the same; wandb stays offline unless the user's own settings differ."""

    def __init__(self, package: str, run: str, stage: str, knobs: dict[str, Any], out: Path) -> None:
        try:
            self.module = importlib.import_module(package)
        except ImportError:
            raise _missing(package) from None
        offline = {"mode": "offline", "dir": str(out)} if package == "wandb" else {}
        self.module.init(project=run, name=stage, config=knobs, **offline)

    def log(self, step: int, numbers: dict[str, float]) -> None:
        self.module.log(numbers, step=step)

    def close(self) -> None:
        self.module.finish()


def _missing(package: str) -> UserError:
    return UserError("--to", package, "the package is not installed", f"pip install {package}")


def track(root: Path, to: Viewer, out: Path, follow: bool = False, every: float = 2.0) -> dict[str, int]:
    """Send every stage's numbers of a run; with `follow` wait for more until all its stages are finished.

    Returns how many lines of each stage were sent.
    """
    if not (root / "recipe.json").is_file():
        raise UserError("run", str(root), "not a run folder", "Name a folder such as runs/tiny.")
    sent: dict[str, int] = {}
    for folder in _stages(root, follow, every):
        knobs = read_json(folder / "config.json")
        tracker: Tracker = (
            _TensorBoard(root.name, folder.name, knobs, out)
            if to == "tensorboard"
            else _Logger(to, root.name, folder.name, knobs, out)
        )
        try:
            sent[folder.name] = _send(folder, tracker, follow, every)
        finally:
            tracker.close()
    return sent


def _stages(root: Path, follow: bool, every: float) -> Iterator[Path]:
    """Stages that log, in the order in which they were begun; with `follow` also those that begin later."""
    seen: set[Path] = set()
    while True:
        found = sorted(root.glob("*/metrics.jsonl"), key=lambda p: (p.parent / "config.json").stat().st_mtime_ns)
        fresh = [p.parent for p in found if p.parent not in seen]
        for folder in fresh:
            seen.add(folder)
            yield folder
        if not follow or (not fresh and _is_over(root)):
            return
        time.sleep(every)


def _is_over(root: Path) -> bool:
    """Whether every stage that was begun is finished and the run says so."""
    begun = {p.parent for p in root.glob("*/config.json")}
    done = {p.parent for p in root.glob("*/manifest.json")}
    return begun == done and (root / "summary.json").is_file()


def _send(folder: Path, tracker: Tracker, follow: bool, every: float) -> int:
    """Read a stage's metrics from the last byte that was read on; a run that is rewound writes a shorter file."""
    lines, place = 0, 0
    while True:
        over = (folder / "manifest.json").is_file()  # looked for first: what is logged before it is read below
        if (folder / "metrics.jsonl").stat().st_size < place:
            place = 0
        with (folder / "metrics.jsonl").open("rb") as handle:
            handle.seek(place)
            for line in handle:
                if not line.endswith(b"\n"):
                    break  # half a line: the rest comes next time
                place += len(line)
                lines += _send_line(line, tracker)
        if over or not follow:
            return lines
        time.sleep(every)


def _send_line(line: bytes, tracker: Tracker) -> int:
    try:
        record = json.loads(line)
    except ValueError:
        return 0  # torn by a kill
    numbers = {
        name: float(value)
        for name, value in record.items()
        if name != "step" and isinstance(value, (int, float)) and math.isfinite(value)
    }
    tracker.log(int(record["step"]), numbers)
    return 1
