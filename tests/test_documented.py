"""Every public name of the package has a docstring: its own, an inherited one, or that of the protocol that it implements."""

import importlib
import inspect
import pkgutil
from collections.abc import Iterator
from types import ModuleType
from typing import Any

import finback

PROGRAMS = (
    "finback.__main__",
    "finback.rollouts.guard",
    "finback.tasks.math_worker",
)  # they do their work when imported


def modules() -> list[ModuleType]:
    names = [found.name for found in pkgutil.walk_packages(finback.__path__, "finback.")]
    return [importlib.import_module(name) for name in names if name not in PROGRAMS]


def classes_and_functions(module: ModuleType) -> Iterator[tuple[str, Any]]:
    for name, value in vars(module).items():
        is_own = getattr(value, "__module__", None) == module.__name__
        if is_own and not name.startswith("_") and (inspect.isclass(value) or inspect.isfunction(value)):
            yield name, value


def methods(cls: type) -> Iterator[tuple[str, Any]]:
    """The public methods and properties that the class defines itself."""
    for name, value in vars(cls).items():
        function = value.fget if isinstance(value, property) else getattr(value, "__func__", value)
        own = getattr(function, "__qualname__", "") == f"{cls.__qualname__}.{name}"
        if inspect.isfunction(function) and own and not name.startswith("_"):
            yield name, function


def members(protocol: type) -> set[str]:
    return {name for name in {**vars(protocol), **inspect.get_annotations(protocol)} if not name.startswith("_")}


def implements(cls: type, protocol: type) -> bool:
    fields = {name for base in cls.__mro__ for name in inspect.get_annotations(base)}
    return all(hasattr(cls, name) or name in fields for name in members(protocol))


def test_every_public_name_is_documented() -> None:
    found = {f"{m.__name__}.{name}": value for m in modules() for name, value in classes_and_functions(m)}
    classes = {path: value for path, value in found.items() if inspect.isclass(value)}
    protocols = [cls for cls in classes.values() if getattr(cls, "_is_protocol", False)]

    def documented(cls: type, name: str, function: Any) -> bool:
        bases = [*cls.__mro__, *(p for p in protocols if p is not cls and name in members(p) and implements(cls, p))]
        defined = (vars(base).get(name) for base in bases)
        return bool(function.__doc__) or any(getattr(value, "__doc__", None) for value in defined)

    missing = [m.__name__ for m in modules() if not m.__doc__ and m.__file__ and not m.__file__.endswith("__init__.py")]
    missing += [path for path, value in found.items() if not value.__doc__]
    for path, cls in classes.items():
        missing += [f"{path}.{name}" for name, function in methods(cls) if not documented(cls, name, function)]
    assert len(found) > 1500 and missing == []
