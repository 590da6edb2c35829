"""Knobs: type-checked dataclasses, `--set` overrides, and the one error a user sees.

Every stage and model is a frozen dataclass; this file turns text into field values, refuses what does not
fit, and says what would. Does not import torch: `finback show` and bad input must answer at once.
"""

import dataclasses
import difflib
import json
import math
import types
import typing
from collections.abc import Callable, Iterable, Sequence
from typing import Any


class UserError(ValueError):
    """Something the user can put right; the CLI prints it without a traceback and exits with code 2.

    The message names the field, shows the value and says what to do.
    """

    def __init__(self, field: str, value: Any, problem: str, remedy: str) -> None:
        self.field, self.value, self.problem, self.remedy = field, value, problem, remedy
        super().__init__(f"{field} = {value!r}: {problem}. {remedy}")

    def __reduce__(self) -> tuple[type["UserError"], tuple[Any, ...]]:
        return type(self), (self.field, self.value, self.problem, self.remedy)  # so that other processes can raise it


def did_you_mean(word: str, known: Iterable[str], otherwise: str = "") -> str:
    """'Did you mean …?' for a near miss, `otherwise` or the list of known words for anything else."""
    known = sorted(set(known))
    near = difflib.get_close_matches(word, known, n=1, cutoff=0.6)
    return f"Did you mean {near[0]!r}?" if near else otherwise or f"Known: {', '.join(known) or 'none'}."


def check_fields(config: Any, where: str = "", but: Sequence[str] = ()) -> None:
    """Raise UserError for the first field of a dataclass, not in `but`, whose value does not fit its annotation.

    `where` is the field's stage, if any, or "--" for options of the command line: UserError then names the flag. An `int`
    passes for a `float`, infinity and nan do not; a list does not pass for a tuple (it would make the config unhashable).
    """
    hints = typing.get_type_hints(type(config))
    for field in dataclasses.fields(config):
        value, hint, name = getattr(config, field.name), hints[field.name], _name(where, field.name)
        if field.name not in but and not _fits(value, hint):
            literal = next((h for h in (hint, *typing.get_args(hint)) if typing.get_origin(h) is typing.Literal), None)
            if literal is not None and isinstance(value, str):
                raise _no_choice(name, value, literal)
            remedy = "Correct it." if where in ("", "--") else "Correct the value in the recipe."
            raise UserError(name, value, f"expected {_say(hint)}, got {_kind(value)}", remedy)


def check_positive(config: Any, where: str, *names: str) -> None:
    """Raise UserError for the first of the named fields that is not above 0; None is left alone."""
    for name in names:
        value = getattr(config, name)
        if value is not None and value <= 0:
            remedy = "Use 1 or more." if isinstance(value, int) else "Use a positive number."
            raise UserError(_name(where, name), value, "not above 0", remedy)


def check_not_negative(config: Any, where: str, *names: str) -> None:
    """Raise UserError for the first of the named fields that is below 0; None is left alone."""
    for name in names:
        value = getattr(config, name)
        if value is not None and value < 0:
            raise UserError(_name(where, name), value, "negative", "Use 0 or more.")


def check_share(config: Any, where: str, *names: str) -> None:
    """Raise UserError for the first of the named fields that is not in 0..1."""
    for name in names:
        if not 0 <= getattr(config, name) <= 1:
            raise UserError(_name(where, name), getattr(config, name), "a share is between 0 and 1", "Correct it.")


def check_characters(record: dict[str, Any], written: str, where: str) -> None:
    """Raise UserError for the first field of a JSON object with half a character, which `written` JSON can escape."""
    if "\\ud" not in written.lower():  # text in UTF-8 holds whole characters only
        return
    for name, value in record.items():
        try:
            json.dumps([name, value], ensure_ascii=False).encode()
        except UnicodeEncodeError as error:
            half = error.object[error.start : error.end]
            problem = "half a character (a lone surrogate)"
            raise UserError(f"{where} {name!a}", half, problem, "Write whole characters, or leave it out.") from None


def override(config: Any, path: Sequence[str], text: str, where: str) -> Any:
    """Return a copy of a dataclass with the field at `path` set from `text`, as in `--set base.lr=3e-3`.

    Entries of a tuple are numbered from 0, as in `--set after.exams.0.problems=20`.
    """
    names = {field.name for field in dataclasses.fields(config)}
    head, rest = path[0], path[1:]
    if head not in names:
        raise UserError(f"{where}.{head}", text, "no such field", did_you_mean(head, names))
    if rest:
        return dataclasses.replace(config, **{head: _within(getattr(config, head), rest, text, f"{where}.{head}")})
    hint = typing.get_type_hints(type(config))[head]
    return dataclasses.replace(config, **{head: parse(text, hint, f"{where}.{head}")})


def _within(value: Any, path: Sequence[str], text: str, where: str) -> Any:
    """A copy of a knob's value with the field at `path` in it set from `text`."""
    if isinstance(value, tuple) and len(path) > 1 and all(map(dataclasses.is_dataclass, value)):
        if not path[0].isdigit() or int(path[0]) >= len(value):
            remedy = f"They are numbered from 0 to {len(value) - 1}." if value else "It is empty."
            raise UserError(f"{where}.{path[0]}", text, "no such entry", remedy)
        place = int(path[0])
        changed = _within(value[place], path[1:], text, f"{where}.{place}")
        return (*value[:place], changed, *value[place + 1 :])
    if not dataclasses.is_dataclass(value):
        raise UserError(".".join([where, *path]), text, f"{where} has no fields", f"Set {where} itself.")
    return override(value, path, text, where)


def parse(text: str, hint: Any, field: str) -> Any:
    """Read `text` as a value of the annotated type; UserError when it is not one."""
    origin, args = typing.get_origin(hint), typing.get_args(hint)
    if origin in (typing.Union, types.UnionType):
        if type(None) in args and text.lower() == "none":
            return None
        return parse(text, next(a for a in args if a is not type(None)), field)
    if origin is typing.Literal:
        if text not in args:
            raise _no_choice(field, text, hint)
        return text
    if origin is tuple:
        return tuple(parse(part.strip(), args[0], field) for part in text.split(",") if part.strip())
    readers: dict[Any, Callable[[str], Any]] = {int: _integer, float: _number, bool: _boolean, str: str}
    if hint not in readers:
        raise UserError(field, text, f"a {_say(hint)} cannot be given on the command line", "Edit the recipe file.")
    try:
        return readers[hint](text)
    except ValueError:
        raise UserError(field, text, f"expected {_say(hint)}", f"Write for example {_example(hint)}.") from None


def as_json(value: Any) -> Any:
    """Plain JSON values from dataclasses (with their class under "type"), tuples, functions and numbers."""
    if dataclasses.is_dataclass(value) and not isinstance(value, type):
        fields = {f.name: as_json(getattr(value, f.name)) for f in dataclasses.fields(value)}
        return {"type": type(value).__name__, **fields}
    if isinstance(value, dict):
        return {str(k): as_json(v) for k, v in value.items()}
    if isinstance(value, (tuple, list)):
        return [as_json(v) for v in value]
    return getattr(value, "__qualname__", value) if callable(value) else value


def _name(where: str, field: str) -> str:
    """A field as the user knows it: stage.field, or the flag of the command line."""
    return f"--{field.replace('_', '-')}" if where == "--" else f"{where}.{field}".removeprefix(".")


def _no_choice(field: str, value: str, literal: Any) -> UserError:
    remedy = did_you_mean(value, map(str, typing.get_args(literal)), "Use one of them.")
    return UserError(field, value, f"expected {_say(literal)}", remedy)


def _integer(text: str) -> int:
    try:
        return int(text)
    except ValueError:
        number = float(text)  # 2e6 is how people write token counts
    if not number.is_integer():  # inf and nan are not integers either
        raise ValueError(text)
    return int(number)


def _number(text: str) -> float:
    number = float(text)
    if not math.isfinite(number):  # nan is not even equal to itself, and no knob means anything at infinity
        raise ValueError(text)
    return number


def _boolean(text: str) -> bool:
    if text.lower() not in ("true", "false"):
        raise ValueError(text)
    return text.lower() == "true"


def _fits(value: Any, hint: Any) -> bool:
    origin, args = typing.get_origin(hint), typing.get_args(hint)
    if hint is Any:
        return True
    if origin in (typing.Union, types.UnionType):
        return any(_fits(value, a) for a in args)
    if origin is typing.Literal:
        return value in args
    if origin is tuple:
        if not isinstance(value, tuple) or not args:
            return isinstance(value, tuple)
        if args[-1] is not Ellipsis:
            return len(value) == len(args) and all(map(_fits, value, args))
        return all(_fits(v, args[0]) for v in value)
    if origin is dict:
        return isinstance(value, dict) and all(_fits(k, args[0]) and _fits(v, args[1]) for k, v in value.items())
    if hint is type(None):
        return value is None
    if hint is float:
        return isinstance(value, (int, float)) and not isinstance(value, bool) and math.isfinite(value)
    if hint is int:
        return isinstance(value, int) and not isinstance(value, bool)
    return isinstance(value, origin or hint)


def _kind(value: Any) -> str:
    if isinstance(value, float) and not math.isfinite(value):
        return "NaN or infinity"
    return type(value).__name__


def _say(hint: Any) -> str:
    if typing.get_origin(hint) is typing.Literal:
        return "one of " + ", ".join(map(str, typing.get_args(hint)))
    return getattr(hint, "__name__", str(hint)) if not typing.get_args(hint) else str(hint)


def _example(hint: Any) -> str:
    return {int: "100 or 2e6", float: "0.5 or 3e-4", bool: "true or false"}.get(hint, "text")
