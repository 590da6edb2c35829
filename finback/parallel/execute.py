"""Runs a recipe in this process or in ranks that it starts; the command line and `finback.run` share it.

Does not import torch before a stage needs it.
"""

import contextlib
import dataclasses
import json
import os
import signal
import sys
import threading
import time
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from finback.config import UserError, as_json
from finback.parallel import launch
from finback.parallel.ray_ranks import launch_ranks
from finback.runs import contents, lock, provenance
from finback.runs import recipe as recipes
from finback.runs.files import MANIFEST, disk_trouble
from finback.runs.folder import Interrupted, StageRun, prepare_folder
from finback.runs.recipe import Recipe

if TYPE_CHECKING:
    from finback.parallel.mesh import World

SLOW_DISK = 10.0  # seconds within which a network file system must show what another machine has written
USERS_MISTAKE = 2


class RankFailed(Exception):
    """A rank ended with the exit code `code`; the reason is on its stderr."""

    def __init__(self, code: int) -> None:
        super().__init__(f"a rank ended with exit code {code}; its output is above")
        self.code = code


def execute(
    recipe: Recipe, root: Path, seed: int, ranks: int = 1, arguments: Sequence[str] | None = None, ray: str = ""
) -> bool:
    """Runs the unfinished stages of a recipe and writes its summary; returns whether this process should show it.

    Without `arguments` it runs in this process, with them in `ranks` processes `python -m finback <arguments>`, which the
    Ray at the address `ray` places if one is given. On Ctrl-C it stops at a safe point and raises Interrupted; the same call
    continues. RankFailed: a rank it started has failed.
    """
    if ranks < 0:
        raise UserError("ranks", ranks, "negative", "Use 0 for one per GPU or core, or a number of processes.")
    if "RANK" in os.environ:  # one of several ranks, ours or torchrun's
        _join(recipe, root, seed)
        if "FINBACK_PARENT" in os.environ or os.environ["RANK"] != "0":
            return False
    elif ray and ranks > 1 and arguments is not None:
        # the ranks claim the folder, since this machine may not be one of theirs; rank 0 shows the summary
        _demand_success(launch_ranks(recipe.stages, arguments, ranks, ray))
        return False
    else:
        prepare_folder(root)
        with lock.locked(root) as handle:
            recipes.claim(recipe, root, seed)
            if all((root / stage.name / MANIFEST).is_file() for stage in recipe.stages):
                pass
            elif arguments is None:
                _here(recipe, root, seed)
            else:
                _demand_success(launch.launch(arguments, ranks, (handle,)))
    recipes.write_summary(recipe, root, seed)  # also for a finished run, which may have been killed before writing it
    return True


def _demand_success(code: int) -> None:
    """Raises Interrupted or RankFailed unless all ranks have succeeded."""
    if code == launch.INTERRUPTED:
        print("interrupted; run the same command to continue", file=sys.stderr)
        raise Interrupted
    if code:
        raise RankFailed(code)


def on_ray(recipe: Recipe, address: str, ranks: int) -> Recipe:
    """The recipe with its fleets connected to the Ray cluster at `address`, unchanged if that is empty.

    UserError: it has no fleets, and its ranks are not placed by Ray either.
    """
    fleets = [stage.name for stage in recipe.stages if hasattr(getattr(stage, "rollouts", None), "address")]
    if address and not fleets and ranks < 2:
        remedy = "Set rollouts=Fleet(2) in a stage, place ranks there with --ranks N, or drop --ray."
        raise UserError("--ray", address, "no stage generates on a fleet", remedy)
    settings = [f"{name}.rollouts.address={address}" for name in fleets if address]
    return dataclasses.replace(recipe, stages=recipes.overridden(recipe.stages, settings)) if settings else recipe


def _here(recipe: Recipe, root: Path, seed: int) -> None:
    """Runs the stages as the only rank, with as many threads as a launched rank would have."""
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
    """Runs the stages as one rank among several."""
    launch.follow_parent()
    import torch

    from finback.parallel.mesh import World

    torch.set_num_threads(int(os.environ.get("OMP_NUM_THREADS", "1")))
    rank, size = int(os.environ["RANK"]), int(os.environ["WORLD_SIZE"])
    with _stopping() as watch:
        try:
            world = World.join(rank, size, _declared(recipe, seed), lambda: watch.pressed)
        except Interrupted:
            launch.dismiss_agent(is_asked=watch.pressed)
            raise
        try:
            with _owned(recipe, root, seed, world):
                recipes.execute(recipe, root, seed, world, watch)
                world.barrier()
        except Interrupted:
            # whatever started the ranks may end all of them once the first ends, so all wait for the one that still writes
            with contextlib.suppress(RuntimeError):
                world.barrier()
            world.leave()
            launch.dismiss_agent(is_asked=watch.pressed)
            raise
        except BaseException as error:
            _end_all(world, error)
            raise
        world.leave()


def _declared(recipe: Recipe, seed: int) -> dict[str, Any]:
    """The values that must agree on all ranks: versions, seed, and every knob with digests of the files and code it names."""
    found: dict[str, Any] = {f"version of {name}": version for name, version in provenance.software().items()}
    found |= {"recipe": recipe.name, "seed": seed, "stages": [stage.name for stage in recipe.stages]}
    for stage in recipe.stages:
        found[stage.name] = type(stage).__name__
        found |= _flat(stage.name, as_json(stage))
        for kind, knobs in contents.digests(stage).items():
            found |= {f"{stage.name}.{knob}, {kind}": contents.shown(digest) for knob, digest in knobs.items()}
    return dict(json.loads(json.dumps(found)))


def _flat(name: str, value: Any) -> dict[str, Any]:
    """The leaves of nested knobs, as stage.knob.knob."""
    if not isinstance(value, dict) or not value:
        return {name: value}
    return {path: leaf for key, each in value.items() for path, leaf in _flat(f"{name}.{key}", each).items()}


@contextlib.contextmanager
def _owned(recipe: Recipe, root: Path, seed: int, world: "World") -> Iterator[None]:
    """Claims the run folder and checks that all ranks share it; under a finback launcher, the launcher has done so."""
    if "FINBACK_PARENT" in os.environ:
        yield
        return
    with contextlib.ExitStack() as stack:
        if world.rank == 0:
            prepare_folder(root)
            stack.enter_context(lock.locked(root, launch.job()))
            if world.heartbeat is not None:
                world.heartbeat.at_end = lambda: lock.release(root)
            recipes.claim(recipe, root, seed)
        _check_shared(root, world)
        yield


def _check_shared(root: Path, world: "World") -> None:
    """Raises UserError on all ranks unless all of them see what rank 0 has just written to the folder."""
    written = world.gather(lock.owner(root))[0]
    until = time.monotonic() + SLOW_DISK
    while (seen := lock.owner(root)) != written and time.monotonic() < until:
        time.sleep(0.2)
    blind = [rank for rank, sees in enumerate(world.gather(seen == written)) if not sees]
    if blind:
        problem = f"rank {blind[0]} does not see the file that rank 0 has written there"
        raise UserError("runs", str(root), problem, "Use a folder that all machines share under the same path.")


def _end_all(world: "World", error: BaseException) -> None:
    """Ends all ranks with the message of the first that fails; raises RankFailed if that is another rank."""
    beat = world.heartbeat
    if beat is None:
        return
    if world.has_lost_a_rank(error):
        ending = beat.reason()
        lost = f"rank {world.rank} lost its connection to another rank ({str(error).splitlines()[0]})"
        print(f"error: {ending.text if ending else lost}", file=sys.stderr)
        raise RankFailed(ending.code if ending else 1) from None
    if text := str(error) if isinstance(error, UserError) else disk_trouble(error):
        beat.tell(f"rank {world.rank}: {text}", USERS_MISTAKE)
    else:
        beat.tell(f"rank {world.rank} failed with {type(error).__name__}: {error}", 1)


class _Stop:
    """Passes a request to stop (SIGINT or SIGTERM) on to the running stage and to later ones."""

    def __init__(self, say: bool) -> None:
        self.pressed, self.say = False, say
        self.stage: StageRun | None = None

    def __call__(self, stage: StageRun) -> None:
        """Watches a stage that is about to start."""
        self.stage, stage.stop_requested = stage, self.pressed

    def press(self, number: int, _: Any) -> None:
        """Handles a signal. Without a launcher (`say`), a second SIGINT interrupts at once."""
        if self.say and self.pressed and number == signal.SIGINT:
            raise KeyboardInterrupt
        if self.say and not self.pressed:
            print("\nstopping at the next safe point; press Ctrl-C again to stop at once", file=sys.stderr)
        self.pressed = True
        if self.stage is not None:
            self.stage.stop_requested = True


@contextlib.contextmanager
def _stopping(say: bool = False) -> Iterator[_Stop]:
    """Within the context, SIGINT and SIGTERM ask the running stage to stop. Outside the main thread it has no effect."""
    stop = _Stop(say)
    if threading.current_thread() is not threading.main_thread():
        yield stop
        return
    before = {number: signal.signal(number, stop.press) for number in (signal.SIGINT, signal.SIGTERM)}
    try:
        yield stop
    finally:
        for number, handler in before.items():
            if signal.getsignal(number) == stop.press:  # otherwise a stage has replaced the handler, which stays
                signal.signal(number, handler)
