"""A Lark grammar for required calls in DSML: arguments in the schema's order; optional ones may be missing.

Strings are free text up to the closing mark; values with further constraints are written as JSON.
"""

import json
from typing import Any

from finback.data.dsml import DSML, DsmlForm

# schema keywords that can be enforced with arguments one by one
PLAIN = {
    *("type", "properties", "required", "additionalProperties", "$defs", "definitions", "x-guidance"),
    *("$schema", "$id", "$comment", "title", "description", "default", "examples"),
}
ANNOTATIONS = {"type", "title", "description", "default", "examples", "$comment"}


def is_plain(schema: dict[str, Any]) -> bool:
    """Whether a schema can be enforced with arguments one by one."""
    return schema.keys() <= PLAIN and set(schema.get("required", ())) <= set(schema.get("properties", ()))


def rules(form: DsmlForm, number: int, name: str, schema: dict[str, Any]) -> list[str]:
    """The rule f{number}, a call of this function, and the rules it uses; `text_rule` must be added once.

    The newline after a call belongs to it: otherwise it could belong to the next call or to the end, and parsing would backtrack.
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
    if form.blank and not required:  # what the form writes for no arguments
        body.append(f"{_quoted(form.blank)}{'?' if body else ''}")
    head = _quoted(f'<{DSML}{form.space}invoke name="{name}">\n')
    tail = _quoted(f"</{DSML}{form.space}invoke>\n")
    return [f"f{number}: {' '.join([head, *body, tail])}", *found]


def text_rule(form: DsmlForm) -> str:
    """Free text and its closing mark."""
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
    """An argument with any name."""
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
