"""The body of an HTTP request: bytes to JSON, JSON to a form whose types and ranges hold. No torch here."""

import asyncio
import json
import re
from typing import Any, NoReturn, TypeVar

from pydantic import BaseModel, ValidationError
from starlette.requests import Request

from finback.serve.errors import bad, from_pydantic

DEPTH = 200  # lists in lists; Python's own recursion ends at 1000
_BROKEN = re.compile("[\0\ud800-\udfff]")  # no tokenizer takes half a surrogate pair, no C string a NUL

Form = TypeVar("Form", bound=BaseModel)


async def read(request: Request, form: type[Form]) -> Form:
    """Read and validate the body of an HTTP request; ApiError 400 names the first field that does not fit."""
    raw = await request.body()
    # a short body is read sooner than a thread is found
    return _validated(raw, form) if len(raw) < 1 << 16 else await asyncio.to_thread(_validated, raw, form)


def _validated(raw: bytes, form: type[Form]) -> Form:
    try:
        found = json.loads(raw.decode("utf-8-sig"), parse_constant=_refuse)
    except UnicodeDecodeError as error:
        raise bad(f"the body is not UTF-8 (byte {error.start})", code="invalid_json") from None
    except RecursionError:
        raise bad(f"the body nests deeper than {DEPTH}", code="invalid_json") from None
    except ValueError as error:  # not JSON, or a number of thousands of digits
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
    """How deep a JSON value nests, 0 for a plain one; ApiError for a text that no tokenizer takes."""
    deepest = 0
    todo = [(value, 0)]
    while todo:
        item, level = todo.pop()
        if isinstance(item, str):
            if not item.isprintable() and (met := _BROKEN.search(item)):
                raise bad(f"a text holds U+{ord(met[0]):04X}, which is no character", code="invalid_json")
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
