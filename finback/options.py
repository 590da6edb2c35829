"""Options of the commands as dataclasses: defaults, help and checks in one place. The command line is built from them.

A field is an option of the command if its annotation carries a help text, a `typer.Option` or a `typer.Argument`.
This file does not import torch.
"""

import dataclasses
import functools
import inspect
import types
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Annotated, Any, Literal, Union, get_args, get_origin, get_type_hints

import typer

from finback.config import UserError, check_fields, did_you_mean

Dtype = Annotated[
    Literal["auto", "fp32", "bf16", "int8", "kept"],
    "auto, fp32, bf16, int8 (weights only, rounded), or kept (weights as a GGUF file or packed folder stores them).",
]
# of a program that `finback serve` and `finback compare` start
EnginePython = Annotated[str, typer.Option(metavar="PYTHON", help="Python of the program's environment.")]
EngineFlags = Annotated[
    tuple[str, ...],
    typer.Option("--engine-flag", metavar="FLAG", help="Flag for the program, as --engine-flag=--x=1; repeatable."),
]
EngineEnv = Annotated[
    tuple[str, ...],
    typer.Option("--engine-env", metavar="NAME=VALUE", help="Variable for the program's environment; repeatable."),
]
Settings = Annotated[
    tuple[str, ...], typer.Option("--set", metavar="STAGE.FIELD=VALUE", help="Change a knob; repeatable.")
]


def check_names(options: type["Options"], given: Iterable[str]) -> None:
    """Raises UserError for the first name that is not an option."""
    known = [field.name for field in dataclasses.fields(options)]
    for name in given:
        if name not in known:
            raise UserError(name, "given", "no such option", did_you_mean(name, known))


@dataclasses.dataclass(frozen=True, kw_only=True)
class Options:
    """Base class of all options. Lists become tuples and strings become paths where the annotation says so."""

    def __post_init__(self) -> None:
        for name, hint in get_type_hints(type(self)).items():
            object.__setattr__(self, name, _converted(getattr(self, name), hint))
        check_fields(self, "--")


def _converted(value: Any, hint: Any) -> Any:
    if get_origin(hint) is tuple and isinstance(value, (list, tuple)):
        return tuple(_converted(item, get_args(hint)[0]) for item in value)
    return Path(value) if isinstance(value, str) and Path in (hint, *get_args(hint)) else value


def with_options(command: Callable[..., None]) -> Callable[..., None]:
    """Wraps a command for typer: each parameter that is an Options class becomes one parameter per option."""
    parameters: list[inspect.Parameter] = []
    made_of: dict[str, tuple[type[Options], list[str]]] = {}
    hints = get_type_hints(command, include_extras=True)
    for parameter in inspect.signature(command).parameters.values():
        hint = hints[parameter.name]
        if isinstance(hint, type) and issubclass(hint, Options):
            theirs = get_type_hints(hint, include_extras=True)
            fields = [f for f in dataclasses.fields(hint) if get_origin(theirs[f.name]) is Annotated]
            made_of[parameter.name] = hint, [f.name for f in fields]
            parameters += [_parameter(f.name, theirs[f.name], f.default) for f in fields]
        else:
            parameters.append(_parameter(parameter.name, hint, parameter.default))

    @functools.wraps(command)
    def with_one_object(**given: Any) -> None:
        given = {name: tuple(value) if isinstance(value, list) else value for name, value in given.items()}
        made = {name: kind(**{part: given.pop(part) for part in parts}) for name, (kind, parts) in made_of.items()}
        command(**given, **made)

    with_one_object.__signature__ = inspect.Signature(parameters)  # type: ignore[attr-defined]
    with_one_object.__annotations__ = {}
    return with_one_object


def _parameter(name: str, hint: Any, default: Any) -> inspect.Parameter:
    """A parameter whose annotation typer understands."""
    kind, more = get_args(hint)
    if default is dataclasses.MISSING:
        default = inspect.Parameter.empty
    default = list(default) if isinstance(default, tuple) else default
    annotation: Any = Annotated[_for_typer(kind), typer.Option(help=more) if isinstance(more, str) else more]
    return inspect.Parameter(name, inspect.Parameter.KEYWORD_ONLY, default=default, annotation=annotation)


def _for_typer(hint: Any) -> Any:
    """str for a Literal, because the dataclass checks it with a better message; list for a tuple of any length."""
    origin, args = get_origin(hint), get_args(hint)
    if origin is Literal:
        return str
    if origin is tuple:
        return list[args[0]]  # type: ignore[valid-type]
    return Union[*map(_for_typer, args)] if origin in (Union, types.UnionType) else hint  # type: ignore[return-value]
