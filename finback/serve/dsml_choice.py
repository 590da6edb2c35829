"""Demanded calls in DSML, as Lark: arguments one by one, in the order of the schema, those that are not required or not.

Text is free up to the mark that ends it; what a schema says more of than its type is written as JSON.
"""

import json
from typing import Any

from finback.data.dsml import DSML, DsmlForm

# of a schema's own members those that one argument after the other follows
PLAIN = {
    *("type", "properties", "required", "additionalProperties", "$defs", "definitions", "x-guidance"),
    *("$schema", "$id", "$comment", "title", "description", "default", "examples"),
}
ANNOTATIONS = {"type", "title", "description", "default", "examples", "$comment"}


def is_plain(schema: dict[str, Any]) -> bool:
    """Whether arguments one by one can be held to a schema."""
    return schema.keys() <= PLAIN and set(schema.get("required", ())) <= set(schema.get("properties", ()))


def rules(form: DsmlForm, number: int, name: str, schema: dict[str, Any]) -> list[str]:
    """The rules f{number}, a call of this function, and those that it is made of; `text_rule` goes with them.

    The newline behind a call belongs to it: one that could be the next call's or the end's would have to be taken back.
    """
    properties, required = schema.get("properties", {}), set(schema.get("required", ()))
    shared: dict[str, Any] = {key: schema[key] for key in ("$defs", "definitions", "x-guidance") if key in schema}
    found: list[str] = []
    body: list[str] = []
    for i, (key, each) in enumerate(properties.items()):
        label = f"f{number}p{i}"
        found.append(f"{label}: {_argument(form, key, each, shared)}")
        body.append(label if key in required else f"{label}?")
    if not properties and schema.get("additionalProperties") is not False:
        found.append(f"f{number}any: {_any(form, shared)}")
        body.append(f"f{number}any*")
    if form.blank and not required:  # what is written in place of no arguments
        body.append(f"{_quoted(form.blank)}{'?' if body else ''}")
    head = _quoted(f'<{DSML}{form.space}invoke name="{name}">\n')
    tail = _quoted(f"</{DSML}{form.space}invoke>\n")
    return [f"f{number}: {' '.join([head, *body, tail])}", *found]


def text_rule(form: DsmlForm) -> str:
    """A text and what ends it."""
    return f"text[suffix={_quoted(_end(form))}]: /(?s:.*)/"


def _argument(form: DsmlForm, name: str, schema: Any, shared: dict[str, Any]) -> str:
    given = schema if isinstance(schema, dict) else {}
    said = [given["const"]] if "const" in given else given.get("enum")
    if given.get("type") == "string" and given.keys() <= ANNOTATIONS:
        return f"{_head(form, name, True)} text"
    if said and all(isinstance(each, str) for each in said):
        return f"{_head(form, name, True)} ({' | '.join(map(_quoted, said))}) {_quoted(_end(form))}"
    return f"{_head(form, name, False)} {_json(given | shared)} {_quoted(_end(form))}"


def _any(form: DsmlForm, shared: dict[str, Any]) -> str:
    """An argument of any name."""
    begin = _quoted(f'<{DSML}{form.space}parameter name="')
    value = f'"true\\">" text | "false\\">" {_json(shared)} {_quoted(_end(form))}'
    return f'{begin} /[A-Za-z0-9_.-]{{1,64}}/ "\\" string=\\"" ({value})'


def _head(form: DsmlForm, name: str, is_text: bool) -> str:
    return _quoted(f'<{DSML}{form.space}parameter name="{name}" string="{"true" if is_text else "false"}">')


def _end(form: DsmlForm) -> str:
    return f"</{DSML}{form.space}parameter>\n"


def _json(schema: dict[str, Any]) -> str:
    return f"%json {json.dumps(schema, ensure_ascii=False)}"


def _quoted(text: str) -> str:
    return json.dumps(text, ensure_ascii=False)
