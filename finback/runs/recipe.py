"""Recipes and stages: definition, order, and executing each stage once.

A stage is a frozen dataclass: its fields are the knobs, `work()` says how much it will train and generate, `run()`
executes it. A recipe is a Python file whose `recipe` is a list of stages, or a function that returns one and whose
parameters are knobs of the recipe itself. The same list is run, priced and shown.
"""

import dataclasses
import inspect
import json
import re
import runpy
import sys
import traceback
import typing
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, ClassVar

from finback.config import UserError, as_json, check_fields, did_you_mean, override, parse
from finback.runs import adapters, contents, hub_models, knobs
from finback.runs.declaration import DECLARATION, Declaration
from finback.runs.files import CONFIG, HUB, MANIFEST, RECIPE, SUMMARY, is_checkpoint, read_object, write_json
from finback.runs.folder import Interrupted, Ranks, StageRun
from finback.runs.ledger import cost, spent
from finback.runs.recipe_files import demand_file


@dataclass(frozen=True)
class Work:
    """Upper bounds of a stage's work; the ledger records what it did."""

    tokens_trained: int = 0
    tokens_generated: int = 0


@dataclass(frozen=True, kw_only=True)
class Stage:
    """Base class of all stages. `name` is also the name of the stage's folder."""

    # unique in a recipe; names the stage's folder, and later stages refer to it
    name: str

    # knobs that do not change the result: they may change in a half-finished stage
    free: ClassVar[frozenset[str]] = frozenset({"checkpoint_steps", "max_gap", "patience", "rollouts", "workers"})
    # knobs whose files the stage itself reads again when they change
    watched: ClassVar[frozenset[str]] = frozenset()

    def __post_init__(self) -> None:
        check_fields(self, self.name)
        if not re.fullmatch(r"[a-z0-9][a-z0-9_-]*", self.name):
            raise UserError("name", self.name, "not a folder name", "Use lower-case letters, digits, - and _.")

    def wrong(self, knob: str, problem: str, remedy: str) -> UserError:
        """The error for a knob's value."""
        return UserError(f"{self.name}.{knob}", getattr(self, knob), problem, remedy)

    def inputs(self) -> tuple[str, ...]:
        """Names of earlier stages, or paths of finished ones, that this stage reads; default: the model of `start`."""
        return tuple(filter(None, adapters.split(getattr(self, "start", ""))))

    def work(self) -> Work:
        """Tokens this stage will train on and generate, at most."""
        return Work()

    def declaration(self) -> Declaration:
        """What readers of the stage's folder need to know."""
        return Declaration()

    def describe(self, results: dict[str, Any]) -> str:
        """What the run's summary says about the results besides cost; "" if nothing."""
        return ""

    def run(self, run: StageRun) -> dict[str, Any]:
        """Runs the stage and returns its results; must resume from what an interrupted call left in run.folder."""
        raise NotImplementedError(f"{type(self).__name__}.run")


@dataclass(frozen=True)
class Recipe:
    """A name and its stages, validated: names are distinct and every input exists before it is needed."""

    name: str
    stages: tuple[Stage, ...]
    # the file it was read from
    file: Path | None = None

    def __post_init__(self) -> None:
        if not re.fullmatch(r"[^/\\]+", self.name) or self.name in (".", ".."):
            raise UserError("name", self.name, "not a name for a folder", "Use no slashes, and not only dots.")
        names = [stage.name for stage in self.stages]
        if not names:
            raise UserError("recipe", self.name, "has no stages", "Add at least one stage.")
        for position, stage in enumerate(self.stages):
            if stage.name in names[:position]:
                raise UserError("name", stage.name, "two stages have the same name", "Rename one of them.")
            for start in stage.inputs():
                self._check_input(stage.name, start, names[:position], names[position:])

    @staticmethod
    def _check_input(stage: str, start: str, earlier: Sequence[str], later: Sequence[str]) -> None:
        path = Path(start)
        if start.partition("/")[0] in earlier or (path / MANIFEST).is_file() or adapters.is_adapter(path):
            return
        if (path.exists() and is_checkpoint(path)) or hub_models.is_name(path):
            return
        if start in later:
            problem = "is the stage itself" if start == stage else "comes later in the recipe"
            raise UserError(f"{stage} input", start, problem, "A stage can only read earlier ones; reorder them.")
        hint = did_you_mean(start, earlier) if earlier else "It is the first stage."
        problem = "neither an earlier stage, the folder of a finished one nor a checkpoint"
        raise UserError(f"{stage} input", start, problem, hint)


def load(path: Path, settings: Sequence[str] = ()) -> Recipe:
    """Runs a recipe file, applies `stage.field=value` settings and validates the list; errors are reported with their line.

    If the recipe is a function, a `name=value` setting gives one of its parameters.
    """
    demand_file(path)
    try:
        stages = runpy.run_path(str(path)).get("recipe")
        if inspect.isfunction(stages):
            own = [setting for setting in settings if "." not in setting.partition("=")[0]]
            settings = [setting for setting in settings if setting not in own]
            stages = stages(**_own_knobs(stages, own))
    except UserError:
        raise
    except (Exception, SystemExit) as error:
        raise _mistake(path, error) from None
    if not isinstance(stages, list) or not all(isinstance(stage, Stage) for stage in stages):
        raise UserError("recipe", str(path), "does not define `recipe`, a list of stages", "See recipes/tiny.py.")
    # validated after the changes: --set may name another start
    return Recipe(path.stem, overridden(stages, settings), path)


def _own_knobs(recipe: Callable[..., Any], settings: Sequence[str]) -> dict[str, Any]:
    """Values of a recipe's own parameters from `name=value` settings."""
    hints, known = typing.get_type_hints(recipe), inspect.signature(recipe).parameters
    found = {}
    for setting in settings:
        name, _, text = setting.partition("=")
        if name not in known:
            raise UserError("--set", setting, f"the recipe has no knob {name!r}", did_you_mean(name, known))
        found[name] = parse(text, hints[name], name)
    return found


def _mistake(path: Path, error: BaseException) -> UserError:
    lines = [f.lineno for f in traceback.extract_tb(error.__traceback__) if f.filename == str(path)]
    if isinstance(error, SyntaxError) and error.filename == str(path) and error.lineno:
        lines.append(error.lineno)
    where = f"{path}, line {lines[-1]}" if lines else str(path)
    unknown = re.match(r"(?:\w+\.)*(\w+)\.__init__\(\) got an unexpected keyword argument '(\w+)'", str(error))
    if unknown:
        stage, field = unknown.groups()
        return UserError(f"{stage}.{field}", where, "no such field", did_you_mean(field, _fields_of(stage)))
    return UserError("recipe", where, f"{type(error).__name__}: {error}", "Correct the recipe file.")


def _fields_of(name: str) -> list[str]:
    """Field names of the dataclass called `name`: a stage, perhaps the recipe's own, or a part of finback."""
    classes: list[Any] = [Stage]
    for cls in classes:
        classes += cls.__subclasses__()
    classes += [getattr(m, name, None) for n, m in list(sys.modules.items()) if n.startswith("finback.")]
    found = (c for c in classes if dataclasses.is_dataclass(c) and getattr(c, "__name__", "") == name)
    return [f.name for cls in found for f in dataclasses.fields(cls)]


def overridden(given: Sequence[Stage], settings: Sequence[str]) -> tuple[Stage, ...]:
    """Stages with `stage.field=value` settings applied."""
    stages = list(given)
    where = {stage.name: index for index, stage in enumerate(stages)}
    for setting in settings:
        target, equals, text = setting.partition("=")
        parts = target.split(".")
        if not equals or len(parts) < 2 or not all(parts):
            raise UserError("--set", setting, "not of the form stage.field=value", "Example: --set zero.steps=100")
        if parts[0] not in where:
            raise UserError("--set", setting, f"no stage {parts[0]!r}", did_you_mean(parts[0], where))
        index = where[parts[0]]
        stages[index] = override(stages[index], parts[1:], text, parts[0])
    return tuple(stages)


def config_json(stage: Stage) -> dict[str, Any]:
    """Content of config.json: knobs, and what readers need: declaration, inputs and announced work."""
    declared = dataclasses.asdict(stage.declaration())
    declared |= {"inputs": stage.inputs(), "work": dataclasses.asdict(stage.work())}
    return dict(as_json(stage)) | {DECLARATION: declared}


def begun_json(stage: Stage) -> dict[str, Any]:
    """Content of config.json once the stage has begun: also digests of the files and code that its knobs name."""
    config = config_json(stage)
    return config | {DECLARATION: config[DECLARATION] | {knobs.CONTENTS: contents.digests(stage)}}


def claim(recipe: Recipe, root: Path, seed: int) -> None:
    """Checks that a run folder belongs to this recipe, seed and knobs, or claims it if it is new.

    Finished and half-finished stages must have the current knobs: mixing stages of two recipes in one folder would make its
    numbers meaningless. Hub models are fetched, and pinned to their current commits.
    """
    marker = root / RECIPE
    mine = {"recipe": recipe.name, "seed": seed}
    theirs = read_object(marker) if marker.is_file() else {}
    if theirs:
        for field, value in mine.items():
            if theirs.get(field) != value:
                problem = f"belongs to {field} {theirs.get(field)!r}, this is {value!r}"
                raise UserError("runs", str(root), problem, "Choose another folder with --runs, or delete this one.")
    elif any(root.glob(f"*/{CONFIG}")):
        remedy = (
            f"Choose another folder with --runs, or, if they are of this one, write {json.dumps(mine)} into {marker}."
        )
        raise UserError("runs", str(root), "holds stages of an unknown recipe", remedy)
    for stage in recipe.stages:
        knobs.check(stage, root / stage.name)
    pins = theirs.get(HUB, {})
    mine |= {HUB: pins | new} if (new := _commits(recipe, root, pins)) or pins else {}
    if mine != theirs:
        write_json(marker, mine)


def _commits(recipe: Recipe, root: Path, known: dict[str, str]) -> dict[str, str]:
    """Current commits of the hub models that unfinished stages start from, by name, without known ones."""
    stages = {stage.name for stage in recipe.stages}
    waiting = [stage for stage in recipe.stages if not (root / stage.name / MANIFEST).is_file()]
    starts = {start for stage in waiting for start in stage.inputs()}
    found = {}
    for start in sorted(starts - known.keys()):
        if start.partition("/")[0] not in stages and hub_models.is_name(Path(start)):
            found[start] = hub_models.commit(hub_models.fetched(Path(start)))
    return found


def execute(
    recipe: Recipe, root: Path, seed: int, ranks: Ranks, watch: Callable[[StageRun], None], quiet: bool = False
) -> None:
    """Runs every unfinished stage in order; `watch` gets each StageRun before it starts (to stop it)."""
    for stage in recipe.stages:
        run = StageRun(root, stage.name, seed, ranks, quiet)
        run.stages = recipe.stages
        if (run.folder / MANIFEST).is_file():
            run.say(f"{stage.name:10} already done")
            run.tidy()
            continue
        if run.is_writer:
            run.folder.mkdir(exist_ok=True)
            write_json(run.folder / CONFIG, begun_json(stage))
        ranks.barrier()
        watch(run)
        if run.check_stop():
            raise Interrupted
        run.begin(recipe.file, stage.inputs())
        with run.billed():
            results = stage.run(run)
        run.finish(results)
        if run.is_writer:
            write_summary(recipe, root, seed)
        run.say(f"{stage.name:10} done in {spent(run.folder)['seconds']:.0f} s")
        if run.check_stop():
            raise Interrupted


def write_summary(recipe: Recipe, root: Path, seed: int) -> None:
    """Writes summary.json: for each finished stage its results, a text about them, and its cost."""
    stages = {}
    for stage in recipe.stages:
        folder = root / stage.name
        if (folder / MANIFEST).is_file():
            results = read_object(folder / MANIFEST)["results"]
            about = {"stage": type(stage).__name__, "results": results, "text": stage.describe(results)}
            stages[stage.name] = about | {"cost": cost(folder)}
    write_json(root / SUMMARY, {"recipe": recipe.name, "seed": seed, "stages": stages})
