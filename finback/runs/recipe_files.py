"""Which recipe may have been meant where there is none."""

import re
from pathlib import Path

from finback.config import UserError, did_you_mean


def demand_file(path: Path) -> None:
    """UserError unless a path leads to a file, with the recipes that lie near it."""
    if path.is_file():
        return
    problem = "a folder, not a recipe's file" if path.is_dir() else "no such file"
    near = _recipes_near(path)
    nothing = "" if near else "No recipe lies there, nor in recipes/ of this folder."
    raise UserError("recipe", str(path), problem, did_you_mean(str(path), near, nothing))


def _recipes_near(path: Path) -> list[str]:
    """Files that look like recipes where a missing one was looked for, and in the folder `recipes`."""
    folders = dict.fromkeys((path.parent, Path("recipes")))
    files = [file for folder in folders for file in sorted(folder.glob("*.py"))]
    return [str(file) for file in files if re.search(r"^recipe\b.*=", file.read_text("utf-8", "replace"), re.MULTILINE)]
