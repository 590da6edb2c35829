"""What a stage depends on besides its knobs: contents of the files that they name, and code of functions in them.

Does not import torch. A knob's method `content_files` returns its fields with the paths that they name; `content_versions` returns
versions of what is not a file, such as a data set of the hub.
"""

import dataclasses
import functools
import hashlib
import re
import sys
import sysconfig
import types
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from finback.config import UserError
from finback.runs.provenance import sha256

OWN = Path(__file__).parent.parent
CODE = f"code of Python {sys.version_info.major}.{sys.version_info.minor}"  # other versions produce different bytecode
FILES = "files"


def digests(stage: Any) -> dict[str, dict[str, str]]:
    """SHA-256 of files and code, and versions, by knob, such as task.source; without what does not exist."""
    found: dict[str, dict[str, str]] = {FILES: {}, CODE: {}}
    for field in dataclasses.fields(stage):
        if field.name not in stage.watched:
            for kind, knob, digest in _within(getattr(stage, field.name), field.name):
                found[kind][knob] = digest
    return found


def changed(then: Any, now: dict[str, dict[str, str]]) -> tuple[str, str, str] | None:
    """The first knob whose content has changed, with both digests; knobs known to only one of them are not compared."""
    old = then if isinstance(then, dict) else {}
    for kind, knobs in now.items():
        for knob, digest in knobs.items():
            was = old.get(kind, {}).get(knob)
            if was not in (None, digest):
                return knob, str(was), digest
    return None


def shown(digest: str) -> str:
    """A short form of a digest or version that people can compare."""
    kind, _, rest = digest.rpartition(" ")
    return f"{kind or 'sha256'} {rest[:12]}"


def _within(value: Any, knob: str) -> Iterator[tuple[str, str, str]]:
    if isinstance(value, list | tuple):
        for i, each in enumerate(value):
            yield from _within(each, f"{knob}.{i}")
    elif isinstance(value, dict):
        for key, each in value.items():
            yield from _within(each, f"{knob}.{key}")
    elif dataclasses.is_dataclass(value) and not isinstance(value, type):
        if hasattr(value, "content_files"):
            yield from _files(value, knob)
        if hasattr(value, "content_versions"):
            yield from ((FILES, f"{knob}.{field}", v) for field, v in value.content_versions().items() if v)
        if _is_users(cls := type(value)):
            yield CODE, knob, code_digest(cls)
        for field in dataclasses.fields(value):
            yield from _within(getattr(value, field.name), f"{knob}.{field.name}")
    elif callable(value) and not isinstance(value, type):
        yield CODE, knob, code_digest(value)


def _files(value: Any, knob: str) -> Iterator[tuple[str, str, str]]:
    try:
        for field, paths in value.content_files().items():
            if paths and all(path.is_file() for path in paths):
                every = "".join(map(sha256, paths))
                yield FILES, f"{knob}.{field}", hashlib.sha256(every.encode()).hexdigest()
    except (UserError, OSError):  # the stage reports this when it reads them
        return


def code_digest(function: Any) -> str:
    """Digest of what a user's function does: its code and all user code that it calls or names, without comments."""
    whole = hashlib.sha256()
    for text in _described(function, set()):
        whole.update(text.encode(errors="surrogatepass") + b"\0")
    return whole.hexdigest()


def _described(value: Any, seen: set[int]) -> Iterator[str]:
    """Describes a value as texts that are the same in every process."""
    if id(value) in seen:
        return
    if isinstance(value, types.CodeType):
        yield from _code(value, seen)
    elif isinstance(value, str | bytes | int | float | complex | bool | None | type(Ellipsis)):
        yield repr(value)
    elif isinstance(value, tuple | list):
        yield f"{type(value).__name__} {len(value)}"
        for each in value:
            yield from _described(each, seen)
    elif isinstance(value, set | frozenset):
        yield from sorted(" ".join(_described(each, seen)) for each in value)
    elif isinstance(value, dict):
        for key, each in value.items():
            yield from (*_described(key, seen), *_described(each, seen))
    elif isinstance(value, re.Pattern):
        yield f"{value.pattern!r} {value.flags}"
    elif isinstance(value, functools.partial):
        yield from _described([value.func, list(value.args), value.keywords], seen)
    elif _is_users(value):
        seen.add(id(value))
        yield from _members(value, seen)
    else:
        yield getattr(value, "__qualname__", None) or getattr(value, "__name__", None) or type(value).__qualname__


def _members(value: Any, seen: set[int]) -> Iterator[str]:
    """Describes the members of a user's function, method, class or object."""
    function = getattr(value, "__func__", value)
    if isinstance(function, types.FunctionType):
        cells = [cell.cell_contents for cell in function.__closure__ or () if _is_filled(cell)]
        yield from _described([function.__code__, function.__defaults__, function.__kwdefaults__, cells], seen)
        named = {name for code in _codes(function.__code__) for name in code.co_names} & function.__globals__.keys()
        for name in sorted(named):
            yield name
            yield from _described(function.__globals__[name], seen)
        return
    cls = value if isinstance(value, type) else type(value)
    if cls is not value:
        yield from _described(dict(getattr(value, "__dict__", {})), seen)
    for base in cls.__mro__:
        for name, member in sorted(vars(base).items()) if _is_users(base) else ():
            inner = (
                getattr(member, "fget", None) or getattr(member, "func", None) or getattr(member, "__func__", member)
            )
            if isinstance(inner, types.FunctionType) and _is_users(inner):
                yield name
                yield from _described(inner, seen)


def _code(code: types.CodeType, seen: set[int]) -> Iterator[str]:
    yield from (repr(code.co_code), repr(code.co_names))
    for constant in code.co_consts:
        yield from _described(constant, seen)


def _codes(code: types.CodeType) -> Iterator[types.CodeType]:
    yield code
    for constant in code.co_consts:
        if isinstance(constant, types.CodeType):
            yield from _codes(constant)


def _is_filled(cell: types.CellType) -> bool:
    try:
        cell.cell_contents  # noqa: B018 - raises if it is empty
    except ValueError:
        return False
    return True


def _is_users(value: Any) -> bool:
    """Whether a function, class or object belongs to the user, not to Python, finback or an installed package."""
    function = getattr(value, "__func__", value)
    if isinstance(function, types.FunctionType):
        return _is_outside(function.__code__.co_filename)
    cls = value if isinstance(value, type) else type(value)
    methods = (m for m in vars(cls).values() if isinstance(m, types.FunctionType))
    return any(_is_outside(m.__code__.co_filename) for m in methods)


def _is_outside(file: str) -> bool:
    libraries = [Path(sysconfig.get_paths()[name]) for name in ("stdlib", "platstdlib", "purelib", "platlib")]
    path = Path(file)
    return path.suffix == ".py" and not any(path.is_relative_to(library) for library in [*libraries, OWN])
