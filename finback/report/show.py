"""`finback show`: a run, a recipe, or anything that a recipe may contain, as text or JSON values."""

from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

from finback.config import UserError
from finback.report import objects, outline, summary
from finback.report import samples as sampled
from finback.runs import reader
from finback.runs import recipe as recipes

# JSON values and text for the terminal; the one that was not requested may be empty if it is expensive
Shown = tuple[dict[str, Any], str]


def shown(what: str, settings: Sequence[str], beside_plan: Callable[[Path], Shown], as_json: bool) -> Shown:
    """Shows a run folder with plan and actual, a recipe file, or the named class."""
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
    """The answers of a run's RL stages, or of one stage and step."""
    if not path.is_dir():
        raise UserError("show", str(path), "not a run folder", "Give a folder such as runs/tiny.")
    if as_json:
        return {"samples": sampled.find(path, stage, step)}, ""
    return {}, sampled.describe(path, stage, step, count)
