"""Errors in OpenAI's shape, whatever raised them: {"error": {message, type, param, code}}. No torch here."""

import logging
import traceback
from typing import Any

from pydantic import ValidationError
from starlette.exceptions import HTTPException
from starlette.requests import Request
from starlette.responses import JSONResponse, Response

from finback.config import UserError

log = logging.getLogger("finback.serve")

TYPES = {401: "authentication_error", 403: "permission_error", 429: "rate_limit_error"}
# by status: the code of an error, and what it means
STATUSES = {
    400: ("invalid_value", "The request does not fit; `param` names the field."),
    401: ("invalid_api_key", "The API key is missing or wrong."),
    403: ("forbidden", "The Host or Origin is not allowed, or the server was started without this path."),
    404: ("not_found", "No such path, model or running request."),
    405: ("method_not_allowed", "The path takes other methods."),
    413: ("request_too_large", "The body is too large."),
    429: ("rate_limit_exceeded", "Too many requests with this key; Retry-After says when to come back."),
    431: ("headers_too_large", "The headers are too large."),
    500: ("server_error", "The server failed."),
    503: ("overloaded", "Overloaded, shutting down, or the model has failed; Retry-After says when to come back."),
}
RETRYABLE = (408, 429, 503)  # clients retry after these, so each says when


class ApiError(Exception):
    """A request that fails with a status; `param` is the field that is to blame."""

    def __init__(
        self, status: int, message: str, param: str | None = None, code: str | None = None, retry_after: int = 1
    ) -> None:
        super().__init__(message)
        self.status, self.message, self.param = status, message, param
        self.code, self.retry_after = code or STATUSES.get(status, ("error",))[0], retry_after

    @property
    def body(self) -> dict[str, Any]:
        kind = TYPES.get(self.status, "invalid_request_error" if self.status < 500 else "server_error")
        return {"error": {"message": self.message, "type": kind, "param": self.param, "code": self.code}}

    @property
    def response(self) -> Response:
        headers = {"retry-after": str(self.retry_after)} if self.status in RETRYABLE else {"x-should-retry": "false"}
        if self.status == 401:
            headers["www-authenticate"] = "Bearer"
        return JSONResponse(self.body, self.status, headers)


def bad(message: str, param: str | None = None, code: str | None = None) -> ApiError:
    """A request that its sender must change."""
    return ApiError(400, message, param, code)


def from_pydantic(error: ValidationError) -> ApiError:
    """The first field that does not fit; its value is not repeated, it may be of any length."""
    first = error.errors(include_url=False, include_context=False, include_input=False)[0]
    # names in brackets are the kinds that a value might have been, not fields
    parts = [part for part in first["loc"] if not str(part).endswith("]")]
    param = "".join(f"[{p}]" if isinstance(p, int) else f".{p}" for p in parts).removeprefix(".") or None
    message = first["msg"].removeprefix("Value error, ")
    return bad(f"{param}: {message}" if param else message, param)


def log_failure(what: str, error: BaseException) -> None:
    """Log where something has failed, without the error's message: it may quote what somebody wrote."""
    log.error("%s failed: %s\n%s", what, type(error).__name__, "".join(traceback.format_tb(error.__traceback__)))


async def on_error(request: Request, error: Exception) -> Response:
    """The response to a refusal: ours, the engine's, or the framework's (no such path, wrong method)."""
    if isinstance(error, ApiError):
        return error.response
    if isinstance(error, UserError):
        return bad(str(error), error.field).response
    assert isinstance(error, HTTPException)
    response = ApiError(error.status_code, f"{request.method} {request.url.path}: {error.detail}").response
    response.headers.update(error.headers or {})
    return response


HANDLERS: Any = dict.fromkeys((ApiError, UserError, HTTPException), on_error)
