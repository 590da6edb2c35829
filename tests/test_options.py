"""One options object per verb: the command line is built from it, and an error names the flag from Python too."""

import dataclasses
import math
from pathlib import Path
from typing import Any, get_type_hints

import pytest
import typer
from typer.testing import CliRunner

from finback.cli import app
from finback.comparison.options import CompareOptions
from finback.config import UserError
from finback.options import Options, Settings, with_options
from finback.planner.options import PlanOptions
from finback.report.options import ChatOptions, DocsOptions, ExportOptions, TrackOptions, VerifyOptions
from finback.serve.options import ServeOptions, WatchOptions

MODEL = Path("toy")


def made(command: Any, *words: str) -> Any:
    """The arguments that a command passes on for these words."""
    calls: list[Any] = []
    one = typer.Typer()
    one.command()(with_options(command(calls)))
    result = CliRunner().invoke(one, list(words), catch_exceptions=False)
    assert result.exit_code == 0, result.output
    return calls


def test_the_command_line_gives_the_same_object_as_python() -> None:
    def command(calls: list[Any]) -> Any:
        def serve(options: ServeOptions, settings: Settings = ()) -> None:
            calls.append((options, settings))

        return serve

    assert made(command, "toy") == [(ServeOptions(model=MODEL), ())]
    words = "toy --alias a --alias b --no-reuse --allow-host h --reasoning none --also x/y --set a.b=1 --tokens 9"
    given = {"aliases": ["a", "b"], "reuse": False, "hosts": ["h"], "reasoning": "none", "also": ["x/y"]}
    assert made(command, *words.split()) == [(ServeOptions(model="toy", tokens=9, **given), ("a.b=1",))]  # type: ignore[arg-type]


@pytest.mark.parametrize(
    ("verb", "kind"),
    [
        ("serve", ServeOptions),
        ("watch", WatchOptions),
        ("plan", PlanOptions),
        ("compare", CompareOptions),
        ("chat", ChatOptions),
        ("verify", VerifyOptions),
        ("export", ExportOptions),
        ("docs", DocsOptions),
        ("track", TrackOptions),
    ],
)
def test_help_and_defaults_are_the_fields(verb: str, kind: type[Options]) -> None:
    parameters = {p.name: p for p in typer.main.get_command(app).commands[verb].params if p.name != "as_json"}  # type: ignore[attr-defined]
    hints = get_type_hints(kind, include_extras=True)
    fields = {f.name: f.default for f in dataclasses.fields(kind) if hasattr(hints[f.name], "__metadata__")}
    assert set(parameters) == set(fields)
    for name, parameter in parameters.items():
        said = hints[name].__metadata__[0]
        assert parameter.help.startswith(getattr(said, "help", said)), name
        required = fields[name] is dataclasses.MISSING
        assert parameter.required == required
        assert required or (parameter.default or None) == (fields[name] or None), name


BAD: list[tuple[type[Options], dict[str, Any], str]] = [
    (ServeOptions, {"model": MODEL, "rows": 0}, r"--rows = 0: not above 0\. Use 1 or more"),
    (ServeOptions, {"model": MODEL, "queue": -1}, "--queue = -1: negative"),
    (ServeOptions, {"model": MODEL, "dtype": "int3"}, r"--dtype = 'int3': expected one of .* Did you mean 'int8'"),
    (
        ServeOptions,
        {"model": MODEL, "dtype": "xx"},
        r"--dtype = 'xx': expected one of .*int8, kept\. Use one of them\.$",
    ),
    (ServeOptions, {"model": MODEL, "reasoning": "nope"}, "--reasoning = 'nope': expected one of both, deepseek"),
    (ServeOptions, {"model": MODEL, "drain": math.nan}, "--drain = nan: expected float"),
    (ServeOptions, {"model": MODEL, "also": ["a/toy"]}, "--also = .*two models have the same name"),
    (PlanOptions, {"on": 8}, "--on = 8: expected str, got int"),
    (PlanOptions, {"micro_rows": 0}, "--micro-rows = 0"),
    (PlanOptions, {"recompute": "some"}, "--recompute = 'some': expected one of none, attention"),
    (PlanOptions, {"price": -1.0}, "--price"),
    (CompareOptions, {"models": ["a"]}, "--tasks"),
    (CompareOptions, {"tasks": ["sums"]}, "no model named"),
    (CompareOptions, {"tasks": ["sums"], "models": ["a"], "price_hour": -1}, "--price-hour = -1: negative"),
    (CompareOptions, {"tasks": "sums", "models": ["a"]}, "--tasks = 'sums': expected tuple"),
    (ChatOptions, {"model": MODEL, "top_k": 1.5}, "--top-k = 1.5"),
    (VerifyOptions, {"folder": MODEL, "out": "no/such/card.md"}, "--out"),
    (TrackOptions, {"run": MODEL, "to": "wandbb"}, "Did you mean 'wandb'"),
    (DocsOptions, {"check": True}, "nothing to document"),
]


@pytest.mark.parametrize(("kind", "given", "said"), BAD, ids=[f"{k.__name__} {sorted(g)[-1]}" for k, g, _ in BAD])
def test_a_wrong_value_names_its_flag(kind: type[Options], given: dict[str, Any], said: str) -> None:
    with pytest.raises(UserError, match=said):
        kind(**given)


def test_texts_become_paths_and_lists_tuples() -> None:
    options = CompareOptions(models=["runs/toy"], tasks=["sums"], out="there")  # type: ignore[arg-type]
    assert options.models == (Path("runs/toy"),) and options.tasks == ("sums",) and options.out == Path("there")
    assert ServeOptions(model="runs/toy").name == "toy"  # type: ignore[arg-type]
