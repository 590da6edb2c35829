"""The verbs of the command line for Python and notebooks: `finback.run`, `finback.plan` and `finback.compare`.

Does not import torch until one of them is called.
"""

import os
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any

from finback.config import UserError
from finback.options import check_names
from finback.parallel.execute import execute
from finback.runs import recipe as recipes
from finback.runs.files import SUMMARY, read_json
from finback.runs.folder import Interrupted
from finback.runs.recipe import Recipe, Stage

What = str | Path | Sequence[Stage]  # a recipe file, or a recipe's stages


class Results(dict[str, Any]):
    """The values that the command line prints with --json. `print` shows the text that it prints without."""

    def __init__(self, values: dict[str, Any], text: str) -> None:
        super().__init__(values)
        self.text = text

    def __str__(self) -> str:
        return self.text

    __repr__ = __str__


def run(
    recipe: What,
    runs: str | Path = "runs",
    *,
    name: str = "recipe",
    settings: Iterable[str] = (),
    seed: int = 0,
    ranks: int = 1,
) -> Results:
    """Run a recipe or continue it, in the folder runs/NAME, and return its summary.

    The folder is named after the recipe file; for a list of stages it is `name`. One rank runs in this process; several
    ranks are separate processes and need a recipe file. `settings` change knobs, as in ("zero.steps=10",). Ctrl-C stops
    at a safe point, and the same call continues from there.
    """
    settings = (settings,) if isinstance(settings, str) else tuple(settings)
    found = _recipe(recipe, name, settings)
    arguments = None
    if ranks != 1:
        if found.file is None:
            raise UserError("ranks", ranks, "several ranks need a recipe file", "Write the stages to a recipe file.")
        changes = [word for setting in settings for word in ("--set", setting)]
        arguments = ["run", str(found.file), "--runs", str(runs), "--seed", str(seed), *changes]
    root = Path(runs) / found.name
    try:
        if not execute(found, root, seed, ranks, arguments):  # one of torchrun's ranks; the first has the summary
            return Results({}, "")
    except Interrupted:
        raise KeyboardInterrupt(f"stopped at a safe point; the same call continues {root}") from None
    from finback.report.summary import summarize

    return Results(read_json(root / SUMMARY), summarize(root))


def plan(what: What = "", **options: Any) -> Results:
    """Estimate time, money, energy and memory of a recipe or a preset; `options` are those of `finback plan`."""
    from finback.planner import calibration_file, command
    from finback.planner.options import PlanOptions

    check_names(PlanOptions, options)
    stages = not isinstance(what, str | Path)
    chosen = PlanOptions(what="" if stages else str(what), **options)
    path = chosen.calibration or calibration_file.default_path(os.environ)
    if stages:
        return Results(*command.recipe(_recipe(what, "recipe", chosen.settings), chosen, path))
    return Results(*command.run(chosen, path))


def compare(*models: str | Path, tasks: Iterable[str], **options: Any) -> Results:
    """Ask models the same questions; `options` are those of `finback compare`. Answers in the folder `out` are reused."""
    from finback.comparison import compare as comparing
    from finback.comparison.options import CompareOptions

    check_names(CompareOptions, options)
    wanted = (tasks,) if isinstance(tasks, str) else tuple(tasks)
    chosen = CompareOptions(models=models, tasks=wanted, **options)  # type: ignore[arg-type] # Options makes them paths
    report, text, _ = comparing.run(chosen, os.environ)
    return Results(report, text)


def _recipe(what: What, name: str, settings: Sequence[str]) -> Recipe:
    if isinstance(what, str | Path):
        return recipes.load(Path(what), settings)
    for stage in what:
        if not isinstance(stage, Stage):
            raise UserError("recipe", stage, "not a stage", "Give a list of stages, or the path of a recipe file.")
    return Recipe(name, recipes.overridden(what, settings))
