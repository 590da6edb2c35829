"""A run's curves in other people's viewers: TensorBoard, trackio, Weights & Biases.

They are fed from metrics.jsonl, while a run goes on or long after, so that no stage knows of them and none waits.
"""

import importlib
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any, Literal, Protocol

from finback.config import UserError
from finback.runs import reader
from finback.runs.files import is_number
from finback.runs.metrics_table import Tail, records
from finback.runs.reader import StageFolder

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
    reader.recipe(root)
    sent: dict[str, int] = {}
    for stage in _logging(root, follow, every):
        tracker: Tracker = (
            _TensorBoard(root.name, stage.name, stage.config, out)
            if to == "tensorboard"
            else _Logger(to, root.name, stage.name, stage.config, out)
        )
        try:
            sent[stage.name] = _send(stage, tracker, follow, every)
        finally:
            tracker.close()
    return sent


def _logging(root: Path, follow: bool, every: float) -> Iterator[StageFolder]:
    """Stages that log, in the order in which they were begun; with `follow` also those that begin later."""
    seen: set[str] = set()
    while True:
        begun = reader.stages(root)
        fresh = [stage for stage in begun if stage.has_metrics and stage.name not in seen]
        for stage in fresh:
            seen.add(stage.name)
            yield stage
        is_over = all(stage.is_finished for stage in begun) and reader.has_summary(root)
        if not follow or (not fresh and is_over):
            return
        time.sleep(every)


def _send(stage: StageFolder, tracker: Tracker, follow: bool, every: float) -> int:
    """Send a stage's metrics as they are logged; those of a run that is rewound are sent again."""
    lines, tail = 0, Tail(stage.metrics_file)
    while True:
        over = stage.has_ended()  # looked for first: what is logged before it is read below
        tail.restarted()
        while piece := tail.piece():
            for record in records(piece):
                numbers = {k: v for k, v in record.items() if k != "step" and is_number(v)}
                tracker.log(int(record["step"]), {k: float(v) for k, v in numbers.items()})
                lines += 1
        if over or not follow:
            return lines
        time.sleep(every)
