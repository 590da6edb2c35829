"""Compares a stage's knobs with those that its folder was made with. Does not import torch."""

import dataclasses
import json
from collections.abc import Collection
from pathlib import Path
from typing import Any

from finback.config import UserError, as_json
from finback.runs import contents
from finback.runs.declaration import DECLARATION
from finback.runs.files import CONFIG, read_object

CONTENTS = "contents"  # key in the declaration of a stage that has begun
_REMEDY = "Choose another folder with --runs, or delete that stage's folder and those after it."


def check(stage: Any, folder: Path) -> None:
    """Raises UserError for the first knob of `stage`, or content that it names, that differs from those in config.json."""
    if not (folder / CONFIG).is_file():
        return
    then = read_object(folder / CONFIG)
    if found := difference(stage, then, stage.name, stage.free | {DECLARATION}):
        knob, now, was = found
        raise UserError(knob, now, f"{folder} was made with {was!r}", _REMEDY)
    if changed := contents.changed(then.get(DECLARATION, {}).get(CONTENTS), contents.digests(stage)):
        knob, before, digest = changed
        problem = f"the content has changed since {folder} was made, {contents.shown(before)}"
        raise UserError(f"{stage.name}.{knob}", contents.shown(digest), problem, _REMEDY)


def difference(value: Any, stored: Any, where: str, free: Collection[str] = ()) -> tuple[str, Any, Any] | None:
    """The first difference between a value and its stored JSON, as deep as possible: its path, and both values as JSON.

    A field that the stored value lacks was added in a later version; before, it had its default. `free` fields may differ.
    """
    now = json.loads(json.dumps(as_json(value)))
    if now == stored:
        return None
    if dataclasses.is_dataclass(value) and isinstance(stored, dict):
        defaults = {field.name: _default(field) for field in dataclasses.fields(value)}
        for name in ["type", *sorted((now.keys() | stored.keys()) - {"type", *free})]:
            mine = getattr(value, name) if name in defaults else now.get(name)
            if found := difference(mine, stored.get(name, defaults.get(name)), f"{where}.{name}"):
                return found
        return None
    if isinstance(value, (tuple, list)) and isinstance(stored, list) and len(value) == len(stored):
        pairs = [(str(i), a, b) for i, (a, b) in enumerate(zip(value, stored, strict=True))]
    elif isinstance(value, dict) and isinstance(stored, dict) and now.keys() == stored.keys():
        pairs = [(str(key), entry, stored[str(key)]) for key, entry in value.items()]
    else:
        return where, now, stored
    return next((found for key, mine, was in pairs if (found := difference(mine, was, f"{where}.{key}"))), None)


def _default(field: "dataclasses.Field[Any]") -> Any:
    """A field's default as JSON; None if it has none."""
    if field.default is not dataclasses.MISSING:
        return json.loads(json.dumps(as_json(field.default)))
    return None if field.default_factory is dataclasses.MISSING else as_json(field.default_factory())
