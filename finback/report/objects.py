"""`finback show NAME`: the knobs of anything in a recipe, with types, defaults and meaning."""

import ast
import dataclasses
import importlib
import inspect
import pkgutil
import textwrap
import typing
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

from finback.config import UserError, did_you_mean
from finback.runs.recipe import Stage
from finback.runs.terminal import columns

# packages whose modules define what a recipe may contain; subclasses are known once a module is imported
PACKAGES = ("finback.stages", "finback.tasks", "finback.rollouts")
MODULES = ("finback.data.sources", "finback.data.package_sources", "finback.model.config")


@dataclass(frozen=True)
class Knob:
    """One field of an object."""

    name: str
    type: str
    # as written in the class; "": required
    default: str
    # the comment on the line above
    comment: str


@dataclass(frozen=True)
class Described:
    """A class, described for people who write recipes."""

    name: str
    module: str
    doc: str
    knobs: tuple[Knob, ...]

    def as_json(self) -> dict[str, Any]:
        """The description as JSON values."""
        return {"object": self.name, **dataclasses.asdict(self)}

    def as_text(self) -> str:
        """The description for a terminal: one line per knob, followed by its meaning."""
        wide = min(100, columns())
        lines = [f"{self.name} (from {self.module} import {self.name})", "", self.doc, ""]
        for knob in self.knobs:
            default = f" = {knob.default}" if knob.default else "  (must be given)"
            lines.append(f"{knob.name}: {knob.type}{default}")
            lines += textwrap.wrap(knob.comment, wide, initial_indent="    ", subsequent_indent="    ")
        return "\n".join(lines)


def describe(name: str) -> Described:
    """The class of this name; otherwise UserError with the nearest names."""
    known = {cls.__name__: cls for cls in objects()}
    name = next((each for each in known if each.lower() == name.lower()), name)
    if name not in known:
        problem = "not a run folder, a recipe file, or anything that a recipe may contain"
        raise UserError("show", name, problem, did_you_mean(name, known))
    cls = known[name]
    return Described(name, cls.__module__, inspect.cleandoc(cls.__doc__ or ""), tuple(_knobs(cls)))


def objects() -> list[type[Any]]:
    """All classes that a recipe may contain: stages, the types of their knobs, and subclasses of these."""
    names = [*MODULES]
    for package in PACKAGES:
        names += [m.name for m in pkgutil.iter_modules(importlib.import_module(package).__path__, f"{package}.")]
    modules = [importlib.import_module(name) for name in names]
    # Task is a protocol, so tasks have no common base class
    tasks = [cls for module in modules for cls in vars(module).values() if inspect.isclass(cls) and _is_task(cls)]
    seen: dict[type[Any], None] = {}
    waiting: list[type[Any]] = [Stage, *tasks]
    while waiting:
        cls = waiting.pop()
        if cls in seen or not cls.__module__.startswith("finback."):
            continue
        seen[cls] = None
        waiting += cls.__subclasses__()
        if dataclasses.is_dataclass(cls):
            hints = typing.get_type_hints(cls)
            waiting += [part for field in dataclasses.fields(cls) for part in _classes(hints[field.name])]
    return [cls for cls in seen if dataclasses.is_dataclass(cls) and not inspect.isabstract(cls) and cls is not Stage]


def _is_task(cls: type[Any]) -> bool:
    return all(hasattr(cls, name) for name in ("draw", "check")) and not getattr(cls, "_is_protocol", False)


def _classes(hint: Any) -> Iterator[type[Any]]:
    """The classes in an annotation, at any depth."""
    if isinstance(hint, type) and not typing.get_args(hint):
        yield hint
    for part in typing.get_args(hint):
        yield from _classes(part)


def _knobs(cls: type[Any]) -> Iterator[Knob]:
    """Fields in order of declaration, a base's first; the most derived class that declares a field wins."""
    written: dict[str, Knob] = {}
    for base in reversed(cls.__mro__):
        if dataclasses.is_dataclass(base) and base.__module__.startswith("finback."):
            written |= {knob.name: _with_comment(knob, written) for knob in _written(base)}
    for field in dataclasses.fields(cls):
        if field.init and field.name in written:
            yield written[field.name]


def _with_comment(knob: Knob, before: dict[str, Knob]) -> Knob:
    """A field that a subclass declares again without a comment inherits its base's comment."""
    if knob.comment or knob.name not in before:
        return knob
    return dataclasses.replace(knob, comment=before[knob.name].comment)


def _written(cls: type[Any]) -> Iterator[Knob]:
    """The fields that a class itself declares."""
    source = textwrap.dedent(inspect.getsource(cls))
    lines = source.splitlines()
    (tree,) = ast.parse(source).body
    assert isinstance(tree, ast.ClassDef), "the source of a class"
    for node in tree.body:
        if not isinstance(node, ast.AnnAssign) or not isinstance(node.target, ast.Name):
            continue
        kind = ast.unparse(node.annotation)
        if not kind.startswith("ClassVar"):
            yield Knob(node.target.id, kind, _default(node.value), _comment_above(lines, node.lineno - 1))


def _default(value: ast.expr | None) -> str:
    """The default as a recipe would write it: `Reward()` for a field's default_factory=Reward."""
    if isinstance(value, ast.Call) and ast.unparse(value.func) == "field":
        given = {k.arg: k.value for k in value.keywords}
        if "default_factory" in given:
            return f"{ast.unparse(given['default_factory'])}()"
        return ast.unparse(given["default"]) if "default" in given else ""
    return "" if value is None else ast.unparse(value)


def _comment_above(lines: list[str], index: int) -> str:
    found: list[str] = []
    while index > 0 and lines[index - 1].lstrip().startswith("#"):
        index -= 1
        found.insert(0, lines[index].strip().removeprefix("#").strip())
    return " ".join(found)
