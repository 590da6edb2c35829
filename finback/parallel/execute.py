"""Running a recipe, in this process or by ranks started for it: what the command line and `finback.run` share.

No torch here before a stage needs it.
"""

import contextlib
import os
import signal
import sys
import threading
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

from finback.config import UserError
from finback.parallel import launch
from finback.runs import recipe as recipes
from finback.runs.files import MANIFEST
from finback.runs.folder import Interrupted, StageRun, locked, prepare_folder
from finback.runs.recipe import Recipe


class RankFailed(Exception):
    """A rank ended with the exit code `code`; the reason is on its stderr."""

    def __init__(self, code: int) -> None:
        super().__init__(f"a rank ended with exit code {code}; its output is above")
        self.code = code


def execute(recipe: Recipe, root: Path, seed: int, ranks: int = 1, arguments: Sequence[str] | None = None) -> bool:
    """Do what is left of a recipe and write its summary; True where this process is the one to show it.

    Without `arguments` it runs in this process, with them in `ranks` processes `python -m finback <arguments>`. Ctrl-C
    asks it to stop at a safe point, and Interrupted says that it did; the same call continues.
    """
    if ranks < 0:
        raise UserError("ranks", ranks, "negative", "Use 0 for one per GPU or core, or a number of processes.")
    if "RANK" in os.environ:  # one of several ranks, ours or torchrun's
        _join(recipe, root, seed)
        if "FINBACK_PARENT" in os.environ or os.environ["RANK"] != "0":
            return False
    else:
        prepare_folder(root)
        with locked(root) as handle:
            recipes.claim(recipe, root, seed)
            if all((root / stage.name / MANIFEST).is_file() for stage in recipe.stages):
                pass
            elif arguments is None:
                _here(recipe, root, seed)
            elif code := launch.launch(arguments, ranks, (handle,)):
                if code == launch.INTERRUPTED:
                    print("interrupted; run the same command to continue", file=sys.stderr)
                    raise Interrupted
                raise RankFailed(code)
    recipes.write_summary(recipe, root, seed)  # a kill may have come before it
    return True


def _here(recipe: Recipe, root: Path, seed: int) -> None:
    """Run the stages as the only rank, with as many threads as a launched one has."""
    import torch

    from finback.parallel.mesh import World

    threads = torch.get_num_threads()
    torch.set_num_threads(launch.threads(1))
    try:
        with _stopping(say=True) as watch:
            recipes.execute(recipe, root, seed, World.join(0, 1), watch)
    finally:
        torch.set_num_threads(threads)


def _join(recipe: Recipe, root: Path, seed: int) -> None:
    """Run the stages as one rank among several."""
    if "FINBACK_PARENT" in os.environ:
        launch.die_with_parent(int(os.environ["FINBACK_PARENT"]))
    import torch

    from finback.parallel.mesh import World

    torch.set_num_threads(int(os.environ.get("OMP_NUM_THREADS", "1")))
    with _stopping() as watch:
        world = World.join(int(os.environ["RANK"]), int(os.environ["WORLD_SIZE"]))
        if "FINBACK_PARENT" not in os.environ:  # under torchrun nobody has prepared the folder
            if world.rank == 0:
                prepare_folder(root)
                recipes.claim(recipe, root, seed)
            world.barrier()
        try:
            recipes.execute(recipe, root, seed, world, watch)
        except Interrupted:
            world.barrier()  # whoever starts the ranks may end all of them when the first has ended: the writer is not done
            raise
        world.leave()


class _Stop:
    """Passes a wish to stop on to the stage that runs, and to those after it."""

    def __init__(self, say: bool) -> None:
        self.pressed, self.say = False, say
        self.stage: StageRun | None = None

    def __call__(self, stage: StageRun) -> None:
        """Watch a stage that is about to start."""
        self.stage, stage.stop_requested = stage, self.pressed

    def press(self, *_: Any) -> None:
        """Take a SIGINT; where nobody above does, the second one interrupts at once."""
        if self.say and self.pressed:
            raise KeyboardInterrupt
        if self.say:
            print("\nstopping at the next safe point; press Ctrl-C again to stop at once", file=sys.stderr)
        self.pressed = True
        if self.stage is not None:
            self.stage.stop_requested = True


@contextlib.contextmanager
def _stopping(say: bool = False) -> Iterator[_Stop]:
    """SIGINT asks the running stage to stop, as long as this lasts; only the main thread can take it."""
    stop = _Stop(say)
    if threading.current_thread() is not threading.main_thread():
        yield stop
        return
    before = signal.signal(signal.SIGINT, stop.press)
    try:
        yield stop
    finally:
        signal.signal(signal.SIGINT, before)
