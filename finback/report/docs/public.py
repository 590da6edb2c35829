"""Removes local paths from records before publication. Does not import torch."""

import re
from typing import Any

# a string that is a path (absolute, or starting at a home or parent folder), and a path within other words, where folder
# names may contain spaces
_PATH = re.compile(r"(?:file:/+|~[\w.-]*[/\\]|\.{1,2}[/\\]|/|[A-Za-z]:[/\\]|\\\\)(?=\S).*")
_WITHIN = re.compile(
    r"(?<![\w/.<>\\-])(?:file:/+|~[\w.-]*/|\.\./|/(?=[\w.~@+-]+/)|[A-Za-z]:[/\\]+(?=\w)|\\\\(?=\w))(?:[^\s\"'`;,|)\]}>]| (?=[\w -]{0,60}/))*"
)
# answers are written by people, and /v1/models is not a file: only what can hardly be anything else is reported
_OF_A_MACHINE = re.compile(
    r"(?<![\w/.<>\\-])(?:file:/|~/|/(?:home|Users|root|tmp|mnt|media|private|var|opt|srv|workspace|scratch)/|[A-Za-z]:\\|\\\\\w)"
)
_PLACES = ("files", "paths")  # keys of a data set whose values are paths; only their number is published


def without_paths(text: str) -> str:
    """/home/me/words.txt -> words.txt: a text with the folders of paths removed."""
    if _PATH.fullmatch(text):
        return _last(text)
    return _WITHIN.sub(lambda found: _last(found[0]), text)


def _last(path: str) -> str:
    return re.split(r"[/\\]+", path.rstrip("/\\"))[-1] or "a folder"


def names_a_path(text: str) -> bool:
    """Whether people's words name a local file."""
    return bool(_OF_A_MACHINE.search(text))


def counted(value: Any) -> Any:
    """A knob or record, with a data set's paths replaced by their number."""
    if isinstance(value, dict):
        return {k: _number(v) if k in _PLACES and isinstance(v, list) else counted(v) for k, v in value.items()}
    return list(map(counted, value)) if isinstance(value, (list, tuple)) else value


def _number(places: list[Any]) -> str:
    return f"{len(places)} file{'' if len(places) == 1 else 's'} of the provider's"
