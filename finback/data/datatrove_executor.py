"""datatrove's executor for corpora that are too large for one process.

Its local executor assigns each file of a source, and later each segment of kept documents, to one of several processes,
marks finished pieces and skips them after a restart. Documents are processed by finback's code, and decisions that depend
on all documents are made in order by one process, so the output is byte-identical to that of a single process.
datatrove's MinHash blocks are not used because they keep different documents: they first find a cluster of near
duplicates, in no particular order, and then reduce it to one.

The executor runs in a separate process because it forks, which a process with threads must not do.
"""

import importlib.util
import os
import pickle
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from finback.config import UserError
from finback.extras import how_to_get
from finback.runs.files import read_json, write_json

ERROR = "error.json"
RUN = f"from {__name__} import serve; serve()"

# processes a numbered piece of work; must be picklable
PartitionedTask = Callable[[int], None]


@dataclass(frozen=True)
class _Step:
    """A task as a block of datatrove's pipeline; a piece corresponds to a task of the executor."""

    task: PartitionedTask
    folder: Path

    def __call__(self, data: Any, rank: int, world_size: int) -> Iterator[None]:
        try:
            self.task(rank)
        except UserError as error:  # datatrove does not pass user errors on
            write_json(self.folder / ERROR, [error.field, str(error.value), error.problem, error.remedy])
            raise RuntimeError(str(error)) from None
        return iter(())


def each(task: PartitionedTask, pieces: int, workers: int, folder: Path, show: Callable[[int], None]) -> None:
    """Processes all pieces of a task that are not marked as done in `folder`; `show` receives the number done."""
    if importlib.util.find_spec("datatrove") is None:
        problem = "the package is not installed"
        raise UserError("workers", "datatrove", problem, f"{how_to_get('data')}, or leave workers at 0.")
    folder.mkdir(exist_ok=True)
    (folder / ERROR).unlink(missing_ok=True)
    with (folder / "executor.log").open("wb") as log:
        process = subprocess.Popen([sys.executable, "-c", RUN], stdin=subprocess.PIPE, stdout=log, stderr=log)
        try:
            assert process.stdin is not None, "opened as a pipe"
            process.stdin.write(pickle.dumps((task, pieces, workers, folder)))
            process.stdin.close()
            while process.poll() is None:
                show(_done(folder))
                time.sleep(0.05)
        finally:
            process.kill()
            process.wait()
    if process.returncode or _done(folder) < pieces:
        raise _failure(folder)


def serve() -> None:
    """Main function of the other process: reads a task from stdin and runs it under datatrove's executor."""
    task, pieces, workers, folder = pickle.load(sys.stdin.buffer)
    from datatrove.executor import LocalPipelineExecutor

    threading.Thread(target=_end_with, args=(os.getppid(),), daemon=True).start()
    LocalPipelineExecutor(pipeline=[_Step(task, folder)], tasks=pieces, workers=workers, logging_dir=str(folder)).run()


def _end_with(parent: int) -> None:
    """Exits when the parent process is gone, however it ended."""
    while os.getppid() == parent:
        time.sleep(0.5)
    os._exit(1)


def _done(folder: Path) -> int:
    return sum(1 for _ in (folder / "completions").glob("*"))


def _failure(folder: Path) -> Exception:
    if (folder / ERROR).is_file():
        return UserError(*read_json(folder / ERROR))
    log = (folder / "executor.log").read_text(encoding="utf-8", errors="replace")
    return RuntimeError(f"datatrove's executor failed:\n{log[-4000:]}")
