"""What `finback show` prints: a run, a recipe, or anything that stands in one, as text or as JSON values."""

from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

from finback.config import UserError
from finback.report import objects, outline, summary
from finback.report import samples as sampled
from finback.runs import reader
from finback.runs import recipe as recipes

# JSON values, and what a terminal shows; one of them is empty where the other is asked for and dear
Shown = tuple[dict[str, Any], str]


def shown(what: str, settings: Sequence[str], beside_plan: Callable[[Path], Shown], as_json: bool) -> Shown:
    """A run folder, beside what was planned for it, a recipe file, or the name of what stands in a recipe."""
    path = Path(what)
    if path.is_dir():
        beside, text = beside_plan(path)
        if as_json:
            return reader.summary(path) | {"plan_and_actual": beside}, ""
        return {}, f"{summary.summarize(path)}\n\n{text}"
    if path.suffix == ".py":
        plan = recipes.load(path, settings)
        return outline.knobs(plan), outline.outline(plan)
    described = objects.describe(what)
    return described.as_json(), described.as_text()


def samples_of(path: Path, stage: str, step: int, count: int, as_json: bool) -> Shown:
    """The answers of a run's RL, of one stage and step where they are named."""
    if not path.is_dir():
        raise UserError("show", str(path), "not a run folder", "Name a folder such as runs/tiny.")
    if as_json:
        return {"samples": sampled.find(path, stage, step)}, ""
    return {}, sampled.describe(path, stage, step, count)
