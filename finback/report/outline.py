"""What `finback show` prints of a recipe or a stage: knobs, announced work, source."""

import dataclasses
import inspect
from typing import Any

from finback.config import UserError, as_json, did_you_mean
from finback.runs.recipe import Recipe, Stage


def knobs(recipe: Recipe) -> dict[str, Any]:
    """A recipe's resolved knobs as JSON values."""
    return {"recipe": recipe.name, "stages": [as_json(stage) for stage in recipe.stages]}


def outline(recipe: Recipe) -> str:
    """A recipe's stages with all their knobs and the work they announce."""
    lines = [f"recipe {recipe.name}"]
    for stage in recipe.stages:
        work = stage.work()
        most = f"trains on at most {work.tokens_trained:,} tokens, generates at most {work.tokens_generated:,}"
        lines.append(f"\n{stage.name}: {type(stage).__name__}, {most}")
        lines += [f"  {f.name} = {getattr(stage, f.name)!r}" for f in dataclasses.fields(stage) if f.name != "name"]
    return "\n".join(lines)


def stage_source(name: str) -> str:
    """The source of a stage class: its fields are the knobs, its comments their meaning."""
    from finback.stages import distill, evaluate, extend, grpo, prepare, pretrain, reject, sft

    modules = (prepare, pretrain, extend, sft, grpo, reject, distill, evaluate)
    classes = {n: c for m in modules for n, c in vars(m).items() if inspect.isclass(c) and issubclass(c, Stage)}
    classes.pop("Stage")
    if name not in classes:
        raise UserError("show", name, "neither a run folder, a recipe file nor a stage", did_you_mean(name, classes))
    return inspect.getsource(classes[name])
