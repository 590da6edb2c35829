"""Reads the body of an HTTP request: bytes to JSON, JSON to a validated form. Does not import torch."""

import asyncio
import json
import re
from typing import Any, NoReturn, TypeVar

from pydantic import BaseModel, ValidationError
from starlette.requests import Request

from finback.serve.errors import bad, from_pydantic

DEPTH = 200  # nesting depth; Python's recursion limit is 1000
_BROKEN = re.compile("[\0\ud800-\udfff]")  # tokenizers reject lone surrogates, C strings reject NUL

Form = TypeVar("Form", bound=BaseModel)


async def read(request: Request, form: type[Form]) -> Form:
    """Reads and validates the body of an HTTP request; ApiError 400 names the first invalid field."""
    raw = await request.body()
    # a short body is parsed faster than a thread is started
    return _validated(raw, form) if len(raw) < 1 << 16 else await asyncio.to_thread(_validated, raw, form)


def _validated(raw: bytes, form: type[Form]) -> Form:
    try:
        found = json.loads(raw.decode("utf-8-sig"), parse_constant=_refuse)
    except UnicodeDecodeError as error:
        raise bad(f"the body is not UTF-8 (byte {error.start})", code="invalid_json") from None
    except RecursionError:
        raise bad(f"the body nests deeper than {DEPTH}", code="invalid_json") from None
    except ValueError as error:  # not JSON, or a number with thousands of digits
        raise bad(f"the body is not JSON ({error})", code="invalid_json") from None
    if not isinstance(found, dict):
        raise bad("the body is not a JSON object", code="invalid_json")
    if depth(found) > DEPTH:
        raise bad(f"the body nests deeper than {DEPTH}", code="invalid_json")
    try:
        return form.model_validate(found)
    except ValidationError as error:
        raise from_pydantic(error, found) from None


def depth(value: Any) -> int:
    """Nesting depth of a JSON value, 0 for a scalar; ApiError for text that no tokenizer accepts."""
    deepest = 0
    todo = [(value, 0)]
    while todo:
        item, level = todo.pop()
        if isinstance(item, str):
            if not item.isprintable() and (met := _BROKEN.search(item)):
                raise bad(f"a text holds U+{ord(met[0]):04X}, which is not a character", code="invalid_json")
            continue
        if isinstance(item, dict):
            todo += [(key, level) for key in item]
            inside: Any = item.values()
        elif isinstance(item, list):
            inside = item
        else:
            continue
        deepest = max(deepest, level + 1)
        if deepest > DEPTH:
            break
        todo += [(each, level + 1) for each in inside if isinstance(each, str | dict | list)]
    return deepest


def _refuse(constant: str) -> NoReturn:
    raise ValueError(f"{constant} is not valid JSON: NaN or infinite")
