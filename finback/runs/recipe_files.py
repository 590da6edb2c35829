"""Suggests recipes if a recipe's file does not exist."""

import re
from pathlib import Path

from finback.config import UserError, did_you_mean


def demand_file(path: Path) -> None:
    """Raises UserError unless a path is a file; the error names similar recipes nearby."""
    if path.is_file():
        return
    problem = "a folder, not a recipe's file" if path.is_dir() else "no such file"
    near = _recipes_near(path)
    nothing = (
        ""
        if near
        else "There is no recipe in that folder, or in recipes/ of this one; finback's own are in its repository."
    )
    raise UserError("recipe", str(path), problem, did_you_mean(str(path), near, nothing))


def _recipes_near(path: Path) -> list[str]:
    """Files that look like recipes in the folder of a missing one, and in the folder `recipes`."""
    folders = dict.fromkeys((path.parent, Path("recipes")))
    files = [file for folder in folders for file in sorted(folder.glob("*.py"))]
    return [str(file) for file in files if re.search(r"^recipe\b.*=", file.read_text("utf-8", "replace"), re.MULTILINE)]
