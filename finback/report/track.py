"""A run's curves in external viewers: TensorBoard, trackio, Weights & Biases.

This reads metrics.jsonl during or after the run, so stages do not depend on the viewers and never wait for them.
"""

import importlib
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Literal

from finback.config import UserError
from finback.extras import how_to_install
from finback.runs import reader
from finback.runs.files import is_number
from finback.runs.metrics_table import Tail, records
from finback.runs.reader import StageFolder

Viewer = Literal["tensorboard", "trackio", "wandb"]


Log = Callable[[int, dict[str, float]], None]  # receives a step's numbers


def _open(to: Viewer, run: str, stage: StageFolder, out: Path) -> tuple[Log, Callable[[], None]]:
    """A function that receives a stage's metrics, and one that closes the tracker."""
    try:
        if to == "tensorboard":
            from torch.utils.tensorboard import SummaryWriter
        else:
            module = importlib.import_module(to)
    except ImportError:
        raise UserError("--to", to, "the package is not installed", how_to_install(to)) from None
    if to == "tensorboard":  # one event folder per stage, so that stages show as runs
        writer = SummaryWriter(str(out / run / stage.name))
        writer.add_text("knobs", "\n".join(f"    {k}: {v}" for k, v in stage.config.items()))

        def write(step: int, numbers: dict[str, float]) -> None:
            for name, value in numbers.items():
                writer.add_scalar(name, value, step)

        return write, writer.close
    # trackio and wandb have the same interface; wandb stays offline unless the user's settings differ
    offline = {"mode": "offline", "dir": str(out)} if to == "wandb" else {}
    module.init(project=run, name=stage.name, config=stage.config, **offline)
    return lambda step, numbers: module.log(numbers, step=step), module.finish


def track(root: Path, to: Viewer, out: Path, follow: bool = False, every: float = 2.0) -> dict[str, int]:
    """Sends all metrics of a run's stages; with `follow`, continues until all stages are finished.

    Returns the number of rows sent per stage.
    """
    reader.recipe(root)
    sent: dict[str, int] = {}
    for stage in _logging(root, follow, every):
        log, close = _open(to, root.name, stage, out)
        try:
            sent[stage.name] = _send(stage, log, follow, every)
        finally:
            close()
    return sent


def _logging(root: Path, follow: bool, every: float) -> Iterator[StageFolder]:
    """Stages with metrics, in order of their start; with `follow` also those that start later."""
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


def _send(stage: StageFolder, log: Log, follow: bool, every: float) -> int:
    """Sends a stage's metrics as they are logged; steps that are repeated after a rewind are sent again."""
    lines, tail = 0, Tail(stage.metrics_file)
    while True:
        over = stage.has_ended()  # checked first, so that everything logged before is read below
        tail.restarted()
        while piece := tail.piece():
            for record in records(piece):
                numbers = {k: float(v) for k, v in record.items() if k != "step" and is_number(v)}
                log(int(record["step"]), numbers)
                lines += 1
        if over or not follow:
            return lines
        time.sleep(every)
