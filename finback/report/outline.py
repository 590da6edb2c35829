"""`finback show RECIPE`: knobs and announced work."""

import dataclasses
from typing import Any

from finback.config import as_json
from finback.runs.recipe import Recipe


def knobs(recipe: Recipe) -> dict[str, Any]:
    """A recipe's resolved knobs as JSON values."""
    return {"recipe": recipe.name, "stages": [as_json(stage) for stage in recipe.stages]}


def outline(recipe: Recipe) -> str:
    """A recipe's stages with all knobs and the work they announce."""
    lines = [f"recipe {recipe.name}"]
    for stage in recipe.stages:
        work = stage.work()
        most = f"trains on at most {work.tokens_trained:,} tokens, generates at most {work.tokens_generated:,}"
        lines.append(f"\n{stage.name}: {type(stage).__name__}, {most}")
        lines += [f"  {f.name} = {getattr(stage, f.name)!r}" for f in dataclasses.fields(stage) if f.name != "name"]
    return "\n".join(lines)
