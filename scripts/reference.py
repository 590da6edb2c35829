"""Generates the reference pages of the site from the code: knobs, commands, HTTP and Python.

    python scripts/reference.py [FOLDER]

scripts/build_docs.py calls it; the pages are built and never committed.
"""

import dataclasses
import inspect
import re
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import typer.core
from typer.main import get_command

import finback
from finback.cli import app
from finback.report import objects
from finback.runs.recipe import Stage
from finback.serve import openapi

# a class's own methods that readers may call
METHOD = re.compile(r"[a-z]\w*")


def pages() -> Iterator[tuple[str, str]]:
    """Name and text of every page."""
    described = {cls.__name__: objects.describe(cls.__name__) for cls in objects.objects()}
    stages = sorted(cls.__name__ for cls in objects.objects() if issubclass(cls, Stage))
    parts = sorted(set(described) - set(stages))
    page_of = {name: f"stages.md#{name.lower()}" for name in stages} | {
        name: f"parts.md#{name.lower()}" for name in parts
    }
    for page, title, names in (("stages", "Stages", stages), ("parts", "What knobs hold", parts)):
        blocks = [f"# {title}", HEADS[page]]
        for name in names:
            blocks += _described(described[name], page_of)
        yield f"{page}.md", "\n\n".join(blocks) + "\n"
    yield "commands.md", "\n\n".join(_commands()) + "\n"
    yield "http.md", "\n\n".join(_http()) + "\n"
    yield "python.md", "\n\n".join(_python()) + "\n"


HEADS = {
    "stages": "Every stage of a recipe with its knobs, their types, defaults and units. `finback show NAME` prints the same in a terminal.",
    "parts": "Rewards, objectives, tasks, layouts and everything else that a knob of a stage may hold. `finback show NAME` prints the same.",
}


def prose(text: str) -> str:
    """Plain text for Markdown: escapes special characters outside backticks."""
    parts = re.split(r"(`[^`\n]*`)", text)
    return "".join(part if i % 2 else re.sub(r"([<>\[\]|*_{}])", r"\\\1", part) for i, part in enumerate(parts))


def docstring(text: str | None) -> str:
    """A docstring for Markdown: paragraphs stay, indented blocks become code."""
    blocks = []
    for block in inspect.cleandoc(text or "").split("\n\n"):
        indented = block.strip() and all(line.startswith("    ") for line in block.splitlines())
        blocks.append(f"```text\n{inspect.cleandoc(block)}\n```" if indented else prose(block))
    return "\n\n".join(blocks).replace("\n```\n\n```text\n", "\n\n")


def _described(found: objects.Described, page_of: dict[str, str]) -> Iterator[str]:
    yield f"## {found.name}"
    yield f"`from {found.module} import {found.name}`"
    yield docstring(found.doc)
    for knob in found.knobs:
        default = f" = {knob.default}" if knob.default else ""
        named = sorted(set(re.findall(r"\w+", f"{knob.type} {knob.default}")) & set(page_of) - {found.name})
        see = f" See {', '.join(f'[{name}]({page_of[name]})' for name in named)}." if named else ""
        must = "" if knob.default else " Must be given."
        comment = prose(knob.comment[:1].upper() + knob.comment[1:]).rstrip(".") + "." if knob.comment else ""
        yield f"`{knob.name}: {knob.type}{default}`\n:   {comment}{must}{see}"


def _commands() -> Iterator[str]:
    yield "# Commands"
    yield "Results go to stdout, progress and prose to stderr. Exit codes: 0 done, 1 a check did not hold, 2 your mistake, 130 interrupted. `finback help COMMAND` prints the same."
    group = get_command(app)
    assert isinstance(group, typer.core.TyperGroup), "the program has commands"
    for name, command in sorted(group.commands.items()):
        yield f"## finback {name}"
        yield docstring(command.help)
        lines = ["| option | meaning | default |", "|---|---|---|"]
        for parameter in command.params:
            lines += _parameter(parameter)
        yield "\n".join(lines)


def _parameter(parameter: Any) -> Iterator[str]:
    if parameter.name == "help":
        return
    argument = parameter.param_type_name == "argument"
    spelled = parameter.metavar or parameter.name.upper() if argument else ", ".join(parameter.opts)
    default = parameter.default
    empty = default is None or default == () or default == [] or default == "" or default is False or callable(default)
    shown = "" if empty or "Sentinel" in type(default).__name__ else f"`{default}`"
    required = "must be given" if parameter.required else shown
    yield f"| `{spelled.replace('|', '/')}` | {prose(parameter.help or '')} | {required} |"


def _http() -> Iterator[str]:
    document = openapi.document()
    schemas = document["components"]["schemas"]
    yield "# HTTP"
    yield prose(document["info"]["description"]) + " A running server has this as OpenAPI at `/openapi.json`."
    failures: dict[str, str] = {}
    for path, methods in document["paths"].items():
        for method, operation in methods.items():
            yield f"## {method.upper()} {prose(path)}"
            yield "\n".join(_operation(operation, failures))
    yield "## Errors"
    yield "\n".join(
        ["| status | meaning |", "|---|---|", *(f"| {code} | {text} |" for code, text in sorted(failures.items()))]
    )
    for name in sorted(schemas):
        yield f"## {name}"
        yield docstring(schemas[name].get("description", ""))
        needed = schemas[name].get("required", [])
        lines = ["| field | type | meaning | default |", "|---|---|---|---|"]
        for field, schema in schemas[name].get("properties", {}).items():
            default = f"`{schema['default']}`" if schema.get("default") is not None else ""
            cells = (
                _schema(schema),
                prose(schema.get("description", "")),
                "must be given" if field in needed else default,
            )
            lines.append(f"| `{field}` | {' | '.join(cells)} |")
        yield "\n".join(lines)


def _operation(operation: Any, failures: dict[str, str]) -> Iterator[str]:
    """A line for the request, each parameter and each successful response; errors are gathered in one table."""
    body = operation.get("requestBody", {}).get("content", {}).get("application/json", {}).get("schema")
    if body:
        yield f"- request: {_schema(body)}"
    for parameter in operation.get("parameters", []):
        yield f"- `{parameter['name']}` ({parameter['in']}): {_schema(parameter['schema'])}"
    errors = []
    for code, response in operation["responses"].items():
        kinds = response.get("content", {})
        if int(code) >= 400:
            failures.setdefault(code, prose(response["description"]))
            errors.append(code)
            continue
        said = ", ".join(f"`{kind}` {_schema(value.get('schema'))}".strip() for kind, value in kinds.items())
        yield f"- {code}: {prose(response['description'])} {said}"
    if errors:
        yield f"- [errors](#errors): {', '.join(errors)}"


def _schema(schema: Any) -> str:
    """A type in a few words, with a link to the schema that it names."""
    if not schema:
        return ""
    if "$ref" in schema:
        name = schema["$ref"].rsplit("/", 1)[1]
        return f"[{name}](#{name.lower()})"
    for word in ("anyOf", "oneOf"):
        if word in schema:
            return " or ".join(dict.fromkeys(_schema(part) or "anything" for part in schema[word]))
    if "enum" in schema:
        return ", ".join(f"`{value}`" for value in schema["enum"])
    if schema.get("type") == "array":
        return f"list of {_schema(schema.get('items')) or 'anything'}"
    kind = schema.get("type", "anything")
    return " or ".join(kind) if isinstance(kind, list) else kind


def _python() -> Iterator[str]:
    yield "# Python"
    yield docstring(finback.__doc__)
    for name in sorted(finback.__all__, key=str.lower):
        value = getattr(finback, name)
        if inspect.isclass(value) and issubclass(value, Stage):
            continue
        yield f"## finback.{prose(name)}"
        yield f"```python\n{_signature(name, value)}\n```"
        yield docstring(value.__doc__)
        if inspect.isclass(value):
            for method, function in vars(value).items():
                if METHOD.fullmatch(method) and callable(getattr(value, method)) and function.__doc__:
                    yield f"```python\n{_signature(method, getattr(value, method))}\n```"
                    yield docstring(function.__doc__)
    yield "`finback` also exports the stages, which have [their own page](stages.md)."


def _signature(name: str, value: Any) -> str:
    """The signature as written in code; abbreviated for a dataclass with many fields."""
    if dataclasses.is_dataclass(value) and len(dataclasses.fields(value)) > 12:
        return (
            f"{name}(...)  # finback show {name}" if name in {c.__name__ for c in objects.objects()} else f"{name}(...)"
        )
    try:
        return re.sub(r"\b(?:[a-z_]+\.)+(?=[A-Z])", "", f"{name}{inspect.signature(value)}")
    except (TypeError, ValueError):
        return f"{name}(...)"


def write(folder: Path) -> list[str]:
    """Write all pages and return their names."""
    folder.mkdir(parents=True, exist_ok=True)
    made = dict(pages())
    for name, text in made.items():
        (folder / name).write_text(text, encoding="utf-8")
    return list(made)


if __name__ == "__main__":
    print(*write(Path(sys.argv[1] if len(sys.argv) > 1 else "build/docs/reference")), sep="\n")
