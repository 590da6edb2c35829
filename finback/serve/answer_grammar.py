"""The required form of an answer, from any of a request's fields: a JSON schema, or a grammar in llguidance's Lark.

Schemas are read leniently where that does not change their meaning: an unknown `format` is an annotation, as JSON Schema
defines it. Keywords that cannot be enforced are dropped with a note, or refused with their location if the request is `strict`.
"""

import json
import re
from collections.abc import Iterator
from dataclasses import dataclass, field
from typing import Any

from llguidance.gbnf_to_lark import any_to_lark

from finback.serve.errors import bad
from finback.serve.protocol import ChatRequest, small
from finback.serve.schema_ends import can_end, target
from finback.serve.tool_calls import ToolForm

# one line, with at most one space after commas and colons: a model that does not want to continue could write spaces forever
COMPACT = {"whitespace_flexible": False, "item_separator": ", ?", "key_separator": ": ?", "coerce_one_of": True}
FORMATS = ["date-time", "time", "date", "duration", "email", "hostname", "ipv4", "ipv6", "uri", "uuid"]
# keywords whose values are a schema, schemas by name, or a list of schemas
ONE = ("additionalProperties", "items", "additionalItems", "not", "if", "then", "else", "contains", "propertyNames")
NAMED = ("properties", "patternProperties", "$defs", "definitions", "dependentSchemas")
LISTED = ("anyOf", "oneOf", "allOf", "prefixItems", "items")
# keywords that llguidance does not support
UNKNOWN = [
    "not",
    "if",
    "then",
    "else",
    "uniqueItems",
    "contains",
    "minContains",
    "maxContains",
    "propertyNames",
    "dependentRequired",
    "dependentSchemas",
    "unevaluatedProperties",
    "unevaluatedItems",
    "$dynamicRef",
    "$recursiveRef",
]
_LOOKAROUND = re.compile(r"\(\?<?[=!]")


@dataclass(frozen=True)
class AnswerGrammar:
    """The required form of an answer: a JSON schema or a Lark grammar, and the request's field that errors name."""

    param: str
    schema: str | None = None
    grammar: str | None = None
    # for a grammar: the schemas in it, by the request's field
    schemas: dict[str, str] = field(default_factory=dict)
    # the form of tool calls that it demands or allows
    form: ToolForm | None = None
    notes: tuple[str, ...] = ()


def answer_grammar(request: ChatRequest) -> AnswerGrammar | None:
    """The form that the request requires; ApiError 400 if two fields specify one."""
    wanted = list(_wanted(request))
    if len(wanted) > 1:
        raise bad(f"{wanted[0][0]} and {wanted[1][0]} both specify the form of the answer; send one", wanted[1][0])
    if not wanted:
        return None
    param, kind, value = wanted[0]
    if kind == "json":
        strict = bool(request.response_format and (form := request.response_format.json_schema) and form.strict)
        schema, notes = readable(value, strict, param)
        return AnswerGrammar(param, schema=json.dumps(schema, ensure_ascii=False), notes=notes)
    if kind == "regex":
        return AnswerGrammar(param, grammar="start: /" + re.sub(r"(?<!\\)/", r"\\/", value) + "/")
    if kind == "choice":
        return AnswerGrammar(param, grammar="start: " + " | ".join(json.dumps(c, ensure_ascii=False) for c in value))
    try:
        return AnswerGrammar(param, grammar=any_to_lark(value))
    except Exception as error:  # the conversion may raise anything
        raise bad(f"{param}: neither Lark nor GBNF ({str(error)[:200]})", param) from None


def _wanted(request: ChatRequest) -> Iterator[tuple[str, str, Any]]:
    """Every form that a request specifies: field, kind, value."""
    form, other = request.response_format, request.structured_outputs
    anything = {"type": "object"}
    if form is not None and form.type != "text":
        if form.json_schema is not None and form.type == "json_schema":
            yield "response_format.json_schema.schema", "json", form.json_schema.schema_
        else:
            yield "response_format" + (".schema" if form.schema_ else ""), "json", form.schema_ or anything
    if request.json_schema is not None:
        yield "json_schema", "json", request.json_schema
    if other is not None:
        if other.json_ is not None:
            yield "structured_outputs.json", "json", _object(other.json_, "structured_outputs.json")
        if other.json_object:
            yield "structured_outputs.json_object", "json", anything
        for kind in ("regex", "choice", "grammar"):
            if (value := getattr(other, kind)) is not None:
                yield f"structured_outputs.{kind}", kind, value
    if request.guided_json is not None:
        yield "guided_json", "json", _object(request.guided_json, "guided_json")
    for kind in ("regex", "choice", "grammar"):
        if (value := getattr(request, f"guided_{kind}")) is not None:
            yield f"guided_{kind}", kind, value
    if request.grammar is not None:
        yield "grammar", "grammar", request.grammar


def _object(given: Any, param: str) -> Any:
    """A schema that may be given as text."""
    if not isinstance(given, str):
        return given
    try:
        return small(json.loads(given))
    except (ValueError, RecursionError, AttributeError) as error:
        raise bad(f"{param}: not a JSON schema ({str(error)[:200]})", param) from None


def readable(schema: Any, strict: bool, param: str) -> tuple[Any, tuple[str, ...]]:
    """The schema as llguidance can enforce it, and what was dropped; ApiError 400 if that would change a `strict` schema.

    A `$ref` that only leads back to itself describes nothing, and a schema that requires itself never ends: both are refused.
    """
    notes: list[str] = []

    def walk(value: Any, at: str) -> Any:
        if not isinstance(value, dict):
            return value
        _check_reference(value, schema, at, param)
        found: dict[str, Any] = {}
        for key, inner in value.items():
            here = f"{at}/{key}"
            if key in NAMED and isinstance(inner, dict) and key not in UNKNOWN:
                found[key] = {name: walk(each, f"{here}/{name}") for name, each in inner.items()}
            elif key in LISTED and isinstance(inner, list):
                found[key] = [walk(each, f"{here}/{i}") for i, each in enumerate(inner)]
            elif key in UNKNOWN or (key == "pattern" and _LOOKAROUND.search(str(inner))):
                harmless = (key == "propertyNames" and inner == {"type": "string"}) or (
                    key == "pattern" and value.get("format") in FORMATS
                )
                if strict and not harmless and key != "uniqueItems":
                    raise bad(f"{param}: {here} cannot be enforced; leave it out, or leave out strict", param)
                notes.append(f"{here} is not enforced")
            elif key != "x-guidance" and (key != "format" or inner in FORMATS):
                found[key] = walk(inner, here) if key in ONE else inner
        return found

    made = walk(schema, "#")
    if not can_end(made):
        raise bad(f"{param}: the schema requires itself, so no answer could end", param)
    return (made | {"x-guidance": COMPACT} if isinstance(made, dict) else made), tuple(notes[:8])


def _check_reference(value: dict[str, Any], schema: Any, at: str, param: str) -> None:
    """ApiError 400 for a reference that leads back to itself through references only."""
    seen: list[str] = []
    while isinstance(value, dict) and isinstance(reference := value.get("$ref"), str):
        if reference in seen or reference == at:
            raise bad(f"{param}: the $ref at {at[:200]} refers to itself; no answer fits it", param)
        seen.append(reference)
        value = target(schema, reference)
