"""Parses calls with arguments written one by one instead of as one JSON object: Qwen3-Coder, GLM-4.5, DeepSeek V3.2 and V4."""

import json
import math
import re
from collections.abc import Iterable, Mapping
from typing import Any

from finback.data import dsml
from finback.serve.deltas import DeltaCollector
from finback.serve.incremental import IncrementalReader, Wait
from finback.serve.json_reader import read_value

QWEN_BEGIN, QWEN_END = "<tool_call>", "</tool_call>"
FUNCTION, FUNCTION_END = "<function=", "</function>"
PARAMETER, PARAMETER_END = "<parameter=", "</parameter>"
KEY, KEY_END = "<arg_key>", "</arg_key>"
VALUE, VALUE_END = "<arg_value>", "</arg_value>"
DSML = f"<{dsml.DSML}"
INVOKE = f"{DSML}invoke"
DSML_FORMS = {form.opener: form for form in (dsml.V32, dsml.V4, dsml.V41)}
DSML_OPENERS = (INVOKE, *DSML_FORMS, f"{DSML}toolcalls>", f"{DSML}tool>")  # the last two are mistakes that V4 makes
_NAME = re.compile(r"[\w.:-]{1,128}")
_ATTRIBUTE = re.compile(r'([a-z]+)="([^"]*)"')


def read(reader: IncrementalReader, opener: str, sink: DeltaCollector, schemas: Mapping[str, Any]) -> Wait[None]:
    """Reads what starts with <function= or one of DSML's marks, which has just been read."""
    reader.mark(len(opener))
    if opener == FUNCTION:
        is_call = yield from _function(reader, sink, schemas)
    else:
        is_call = yield from _invokes(reader, opener, sink)
    raw = reader.marked()
    if not is_call:
        sink.text(raw)


def tagged(reader: IncrementalReader, sink: DeltaCollector, schemas: Mapping[str, Any]) -> Wait[bool]:
    """Reads a call after <tool_call>, including its end mark; False if it is not a call."""
    if (yield from reader.match((FUNCTION,))):
        is_call = yield from _function(reader, sink, schemas)
    else:
        is_call = yield from _glm(reader, sink, schemas)
    if is_call:
        yield from closing(reader, QWEN_END)
    return is_call


def _function(reader: IncrementalReader, sink: DeltaCollector, schemas: Mapping[str, Any]) -> Wait[bool]:
    """Qwen3-Coder's NAME> <parameter=KEY> VALUE </parameter> … </function>, or Llama 3.1's NAME> JSON </function>."""
    name = yield from reader.before((">", "<", "\n"))
    if not _NAME.fullmatch(name.strip()) or not (yield from reader.match((">",))):
        return False
    sink.call(name.strip())
    arguments = Arguments(sink, schemas.get(name.strip()))
    yield from reader.blank()
    if (yield from reader.peek()) == "{":
        if (yield from read_value(reader, sink.arguments, (FUNCTION_END,))):
            sink.end_call()
        yield from closing(reader, FUNCTION_END)
        return True
    while True:
        yield from reader.blank()
        if not (yield from reader.match((PARAMETER,))):
            break
        key = yield from reader.before((">", "\n"))
        yield from reader.match((">",))
        value = yield from reader.before((PARAMETER_END, PARAMETER, FUNCTION_END))
        if not (yield from reader.match((PARAMETER_END,))) and (yield from reader.is_over()):
            break
        arguments.add(key.strip(), _trimmed(value))
    end = yield from reader.match((FUNCTION_END, QWEN_END))
    if end:
        arguments.close()
    if end == QWEN_END:  # the function's end mark is missing
        reader.back(len(end))
    return True


def _glm(reader: IncrementalReader, sink: DeltaCollector, schemas: Mapping[str, Any]) -> Wait[bool]:
    """GLM's NAME <arg_key>KEY</arg_key> <arg_value>VALUE</arg_value> …."""
    name = (yield from reader.before(("<", "\n"))).strip()
    yield from reader.blank()
    ends = yield from reader.match((KEY, QWEN_END))
    if not ends or not _NAME.fullmatch(name) or (schemas and name not in schemas):
        return False
    reader.back(len(ends))
    sink.call(name)
    arguments = Arguments(sink, schemas.get(name))
    while True:
        yield from reader.blank()
        if not (yield from reader.match((KEY,))):
            break
        key = yield from reader.before((KEY_END, QWEN_END))
        yield from reader.match((KEY_END,))
        yield from reader.blank()
        if not (yield from reader.match((VALUE,))):
            break
        value = yield from reader.before((VALUE_END, KEY, QWEN_END))
        if not (yield from reader.match((VALUE_END,))) and (yield from reader.is_over()):
            break
        arguments.add(key.strip(), _trimmed(value))
    if (yield from reader.match((QWEN_END,))):
        reader.back(len(QWEN_END))
        arguments.close()
    return True


def _invokes(reader: IncrementalReader, opener: str, sink: DeltaCollector) -> Wait[bool]:
    """DeepSeek's <｜DSML｜invoke name="F"> <｜DSML｜parameter name="K" string="true">V</｜DSML｜parameter> … </｜DSML｜invoke>."""
    space = " " if opener.startswith(f"{DSML} ") else ""
    end = f"</{opener[1:]}"
    if opener == INVOKE:  # without the mark around all calls
        reader.back(len(opener))
    found = False
    while True:
        yield from reader.blank()
        if not (yield from reader.match((f"{DSML}{space}invoke",))):
            break
        head = yield from reader.before((">",))
        name = dict(_ATTRIBUTE.findall(head)).get("name", "").strip()
        if not name or not (yield from reader.match((">",))):
            return found
        found = True
        sink.call(name)
        arguments = Arguments(sink, None)
        if head.rstrip().endswith("/"):
            arguments.close()
            continue
        yield from _dsml_parameters(reader, f"{DSML}{space}parameter", f"</{DSML[1:]}{space}", arguments)
    if found and opener != INVOKE:
        yield from reader.match((end,))
    return found


def _dsml_parameters(reader: IncrementalReader, mark: str, closing: str, arguments: "Arguments") -> Wait[None]:
    while True:
        yield from reader.blank()
        if not (yield from reader.match((mark,))):
            break
        attributes = dict(_ATTRIBUTE.findall((yield from reader.before((">",)))))
        yield from reader.match((">",))
        end = f"{closing}parameter>"
        value = yield from reader.before((end,))
        if not (yield from reader.match((end,))):
            return
        is_text = attributes.get("string") == "true" or not is_json(value)
        arguments.put(attributes.get("name", ""), json.dumps(value, ensure_ascii=False) if is_text else value.strip())
    if (yield from reader.match((f"{closing}invoke>",))):
        arguments.close()


def closing(reader: IncrementalReader, end: str) -> Wait[None]:
    """Reads an optional end mark, and the whitespace before it."""
    blank = yield from reader.blank()
    if not (yield from reader.match((end,))):
        reader.back(len(blank))


def _trimmed(value: str) -> str:
    """Removes the newline that the form adds at both ends."""
    return value.removeprefix("\n").removesuffix("\n")


class Arguments:
    """Writes arguments that arrive one by one as a JSON object; `schema` tells the type of a text."""

    def __init__(self, sink: DeltaCollector, schema: Any) -> None:
        self._sink, self._properties, self._count = sink, {}, 0
        if isinstance(schema, dict) and isinstance(properties := schema.get("properties"), dict):
            self._properties = properties

    def add(self, name: str, text: str) -> None:
        """Adds an argument given as text."""
        self.put(name, coerced(text, self._properties.get(name)))

    def put(self, name: str, value: str) -> None:
        """Adds an argument given as JSON."""
        mark = ", " if self._count else "{"
        self._count += 1
        self._sink.arguments(f"{mark}{json.dumps(name, ensure_ascii=False)}: {value}")

    def close(self) -> None:
        """Ends the object and the call."""
        self._sink.arguments("}" if self._count else "{}")
        self._sink.end_call()


def coerced(text: str, schema: Any) -> str:
    """A plain text as JSON of a type that the schema allows; otherwise as a string."""
    kinds, plain = set(_kinds(schema)), text.strip()
    for kind in ("null", "integer", "number", "boolean", "object", "array"):
        if kind not in kinds:
            continue
        if (
            kind in ("null", "boolean")
            and plain.lower() in {"null": ("null", "none"), "boolean": ("true", "false")}[kind]
        ):
            return "null" if kind == "null" else plain.lower()
        if kind in ("integer", "number") and re.fullmatch(r"[-+]?\d{1,300}", plain):
            return str(int(plain))
        if kind == "number" and (number := _number(plain)) is not None:
            return number
        opener = {"object": "{", "array": "["}.get(kind)
        if opener and plain.startswith(opener) and is_json(plain):
            return plain
    return json.dumps(text, ensure_ascii=False)


def _number(text: str) -> str | None:
    try:
        number = float(text)
    except ValueError:
        return None
    return json.dumps(number) if math.isfinite(number) else None


def _kinds(schema: Any) -> Iterable[str]:
    """The types that a schema names, including its branches."""
    if not isinstance(schema, dict):
        return
    named = schema.get("type", [])
    yield from [named] if isinstance(named, str) else [n for n in named if isinstance(n, str)]
    for value in (*(schema.get("enum") or ()), *([schema["const"]] if "const" in schema else [])):
        kinds = {bool: "boolean", int: "integer", float: "number", type(None): "null", dict: "object", list: "array"}
        yield kinds.get(type(value), "string")
    for name in ("anyOf", "oneOf", "allOf"):
        for branch in schema.get(name) or ():
            yield from _kinds(branch)


def is_json(text: str) -> bool:
    """Whether a text is JSON."""
    try:
        json.loads(text)
    except (ValueError, RecursionError):
        return False
    return True
