"""What records hold and papers must not: where things lie on somebody's machine. No torch here."""

import re
from typing import Any

# a string that is a path, absolute or from a home or a parent folder, and one within other words, where a folder may have
# spaces in its name
_PATH = re.compile(r"(?:file:/+|~[\w.-]*[/\\]|\.{1,2}[/\\]|/|[A-Za-z]:[/\\]|\\\\)(?=\S).*")
_WITHIN = re.compile(
    r"(?<![\w/.<>\\-])(?:file:/+|~[\w.-]*/|\.\./|/(?=[\w.~@+-]+/)|[A-Za-z]:[/\\]+(?=\w)|\\\\(?=\w))(?:[^\s\"'`;,|)\]}>]| (?=[\w -]{0,60}/))*"
)
# an answer is people's own, and /v1/models is no file: of them only what can hardly be anything else is named
_OF_A_MACHINE = re.compile(
    r"(?<![\w/.<>\\-])(?:file:/|~/|/(?:home|Users|root|tmp|mnt|media|private|var|opt|srv|workspace|scratch)/|[A-Za-z]:\\|\\\\\w)"
)
_PLACES = ("files", "paths")  # keys of a data set whose values are places: their number is enough


def without_paths(text: str) -> str:
    """/home/me/words.txt -> words.txt: a text in which paths have lost their folders."""
    if _PATH.fullmatch(text):
        return _last(text)
    return _WITHIN.sub(lambda found: _last(found[0]), text)


def _last(path: str) -> str:
    return re.split(r"[/\\]+", path.rstrip("/\\"))[-1] or "a folder"


def names_a_path(text: str) -> bool:
    """Whether people's words name a file of their machine."""
    return bool(_OF_A_MACHINE.search(text))


def counted(value: Any) -> Any:
    """A knob or a record, with the number of a data set's files in place of where they lie."""
    if isinstance(value, dict):
        return {k: _number(v) if k in _PLACES and isinstance(v, list) else counted(v) for k, v in value.items()}
    return list(map(counted, value)) if isinstance(value, (list, tuple)) else value


def _number(places: list[Any]) -> str:
    return f"{len(places)} file{'' if len(places) == 1 else 's'} of the provider's"
