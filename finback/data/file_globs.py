"""Files from names and globs, each once even if several paths lead to it; reports circular links. Does not import torch."""

import glob
import os
from collections.abc import Iterator, Sequence
from pathlib import Path

from finback.config import UserError

_Identity = tuple[int, int]


def find(patterns: Sequence[str], where: str) -> tuple[list[Path], dict[str, str]]:
    """The files of patterns in order, and skipped paths with the reason: already read, or broken links."""
    found: list[Path] = []
    skipped: dict[str, str] = {}
    seen: dict[_Identity, Path] = {}
    for pattern in patterns:
        here = Path(pattern).is_file()  # a name may look like a glob
        names = [pattern] if here else list(_expand(pattern, skipped))
        matches = sorted({path for path in map(Path, names) if path.is_file()})
        skipped |= {name: "a link that leads nowhere" for name in names if _is_broken(name)}
        if not matches:
            raise UserError(where, pattern, "no such file", "Correct the path or glob.")
        for path in matches:
            identity = _identity(path)
            if identity not in seen:
                seen[identity] = path
                found.append(path)
            elif str(path) != str(seen[identity]):
                skipped[str(path)] = f"read as {seen[identity]}"
            else:
                skipped[str(path)] = "named twice"
    return found, skipped


def _expand(pattern: str, skipped: dict[str, str]) -> Iterator[str]:
    """Matches of a glob; ** visits every folder once, even with circular links."""
    parts = pattern.split("/")
    if "**" not in parts:
        yield from glob.glob(pattern)  # noqa: PTH207 - never raises
        return
    place = parts.index("**")
    head, tail = "/".join(parts[:place]), "/".join(parts[place + 1 :]) or "*"
    roots = glob.glob(head or "/") if place else [""]  # noqa: PTH207
    seen: dict[_Identity, str] = {}
    for root in sorted(roots):
        for folder in _folders(root, seen, skipped):
            yield from _expand(os.path.join(glob.escape(folder), tail), skipped)  # noqa: PTH118 - "" is no folder here


def _folders(root: str, seen: dict[_Identity, str], skipped: dict[str, str]) -> Iterator[str]:
    """A folder and all folders below, links last, so that a folder is found under its own name if possible."""
    waiting, links = [root], list[str]()
    while waiting or links:
        is_link = not waiting
        folder = links.pop(0) if is_link else waiting.pop(0)
        try:
            identity = _identity(Path(folder))
            inside = sorted(os.scandir(folder or "."), key=lambda entry: entry.name)
        except OSError:  # not a folder, or not readable
            continue
        if identity in seen:
            if folder != seen[identity]:
                skipped[folder] = f"read as {seen[identity] or '.'}"
            continue
        seen[identity] = folder
        yield folder
        below = [(os.path.join(folder, e.name), e.is_symlink()) for e in inside if _is_entered(e)]  # noqa: PTH118
        waiting = [name for name, linked in below if not linked] + waiting
        links += [name for name, linked in below if linked]


def _is_entered(entry: os.DirEntry[str]) -> bool:
    try:
        return entry.is_dir() and not entry.name.startswith(".")
    except OSError:  # a link to itself
        return False


def _identity(path: Path) -> _Identity:
    status = path.stat()
    return status.st_dev, status.st_ino


def _is_broken(name: str) -> bool:
    return os.path.islink(name) and not os.path.exists(name)  # noqa: PTH110, PTH114 - neither raises
