"""Errors in OpenAI's form, {"error": {message, type, param, code}}, or in Anthropic's. Does not import torch."""

import logging
import re
import traceback
from collections.abc import Sequence
from typing import Any

from pydantic import ValidationError
from starlette.exceptions import HTTPException
from starlette.requests import Request
from starlette.responses import JSONResponse, Response

from finback.config import UserError

log = logging.getLogger("finback.serve")

TYPES = {401: "authentication_error", 403: "permission_error", 429: "rate_limit_error"}
# the same for Anthropic's API; 400 and 500 stand for all other statuses of their class
ANTHROPIC = {404: "not_found_error", 413: "request_too_large", 503: "overloaded_error"} | TYPES
ANTHROPIC_OTHERS = ("invalid_request_error", "api_error")
# by status: the default code of an error, and its meaning
STATUSES = {
    400: ("invalid_value", "The request is invalid; `param` names the field."),
    401: ("invalid_api_key", "The API key is missing or wrong."),
    403: ("forbidden", "The Host or Origin is not allowed, or the server was started without this path."),
    404: ("not_found", "No such path, model or running request."),
    405: ("method_not_allowed", "The path takes other methods."),
    408: ("timeout", "The request did not arrive in time."),
    413: ("request_too_large", "The body is too large."),
    415: ("unsupported_encoding", "The body is compressed."),
    429: ("rate_limit_exceeded", "Too many requests with this key; Retry-After says when to come back."),
    431: ("headers_too_large", "The headers are too large."),
    500: ("server_error", "The server failed."),
    503: ("overloaded", "Overloaded, shutting down, or the model has failed; Retry-After says when to come back."),
}
RETRYABLE = (408, 429, 503)  # clients retry after these, so they carry Retry-After


class ApiError(Exception):
    """A request that fails with a status; `param` is the field at fault."""

    def __init__(
        self, status: int, message: str, param: str | None = None, code: str | None = None, retry_after: int = 1
    ) -> None:
        super().__init__(message)
        self.status, self.message, self.param = status, message, param
        self.code, self.retry_after = code or STATUSES.get(status, ("error",))[0], retry_after

    @property
    def body(self) -> dict[str, Any]:
        """The error in OpenAI's form."""
        kind = TYPES.get(self.status, "invalid_request_error" if self.status < 500 else "server_error")
        return {"error": {"message": self.message, "type": kind, "param": self.param, "code": self.code}}

    @property
    def anthropic(self) -> dict[str, Any]:
        """The error in Anthropic's form."""
        kind = ANTHROPIC.get(self.status, ANTHROPIC_OTHERS[self.status >= 500])
        return {"type": "error", "error": {"type": kind, "message": self.message}}

    def response(self, path: str = "") -> Response:
        """The response to a request for `path`."""
        headers = {"retry-after": str(self.retry_after)} if self.status in RETRYABLE else {"x-should-retry": "false"}
        if self.status == 401:
            headers["www-authenticate"] = "Bearer"
        return JSONResponse(self.anthropic if is_anthropic(path) else self.body, self.status, headers)


class TooLong(ApiError):
    """Prompt and answer together exceed the context window."""

    def __init__(self, requested: str, window: int, param: str) -> None:
        message = (
            f"This model's maximum context length is {window} tokens, and the request is for {requested}. "
            "Shorten the prompt or ask for fewer tokens."
        )
        super().__init__(400, message, param, "context_length_exceeded")
        self.requested, self.window = requested, window

    @property
    def anthropic(self) -> dict[str, Any]:
        """In the wording from which clients parse both numbers."""
        found = super().anthropic
        number = re.search(r"\d+", self.requested)
        found["error"]["message"] = f"prompt is too long: {number[0] if number else 0} tokens > {self.window} maximum"
        return found


def is_anthropic(path: str) -> bool:
    """Whether a path belongs to Anthropic's API."""
    return path.rstrip("/").endswith(("/messages", "/messages/count_tokens"))


def bad(message: str, param: str | None = None, code: str | None = None) -> ApiError:
    """An error that the sender must fix."""
    return ApiError(400, message, param, code)


def from_pydantic(error: ValidationError, body: Any) -> ApiError:
    """The first invalid field of a body; its value is not repeated, since it may be long."""
    found = error.errors(include_url=False, include_context=False, include_input=False)
    places = [_place(each["loc"], body, each["type"] == "missing") for each in found]
    # if a value may have several types, the error in the best matching one is the most useful
    near = [i for i, place in enumerate(places) if place[: len(places[0])] == places[0]]
    at = max(near, key=lambda i: (len(places[i]), not found[i]["type"].endswith("_type")))
    message, param = found[at]["msg"].removeprefix("Value error, "), path_of(places[at]) or None
    return bad(f"{param}: {message}" if param else message, param)


def path_of(parts: Sequence[str | int]) -> str:
    """messages, 0, content -> messages[0].content"""
    return "".join(f"[{p}]" if isinstance(p, int) else f".{p}" for p in parts).removeprefix(".")


def _place(loc: Sequence[str | int], body: Any, is_missing: bool) -> list[str | int]:
    """Location of an error, without the names of alternative types, which are not fields."""
    found: list[str | int] = []
    for at, part in enumerate(loc):
        is_last = at == len(loc) - 1
        if isinstance(body, dict) and (part in body or (is_missing and is_last)):
            found.append(part)
            body = body.get(part)
        elif isinstance(body, list) and isinstance(part, int) and part < len(body):
            found.append(part)
            body = body[part]
    return found


def log_failure(what: str, error: BaseException) -> None:
    """Logs where something failed, without the error's message: it may quote user text."""
    log.error("%s failed: %s\n%s", what, type(error).__name__, "".join(traceback.format_tb(error.__traceback__)))


async def on_error(request: Request, error: Exception) -> Response:
    """The response to an error: ours, the engine's, or the framework's (unknown path, wrong method)."""
    path = request.url.path
    if isinstance(error, ApiError):
        return error.response(path)
    if isinstance(error, UserError):
        return bad(str(error), error.field).response(path)
    assert isinstance(error, HTTPException)
    response = ApiError(error.status_code, f"{request.method} {path}: {error.detail}").response(path)
    response.headers.update(error.headers or {})
    return response


HANDLERS: Any = dict.fromkeys((ApiError, UserError, HTTPException), on_error)
