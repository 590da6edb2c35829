"""This server's interface as an OpenAPI document: requests from protocol.py, everything else by hand. No torch here."""

import functools
from typing import Any

from pydantic.json_schema import models_json_schema

from finback import __version__
from finback.serve.protocol import ChatRequest, CompletionRequest, ControlRequest

REF = "#/components/schemas/"

COUNT: dict[str, Any] = {"type": "integer", "minimum": 0}
TEXT: dict[str, Any] = {"type": "string"}
MAYBE_TEXT: dict[str, Any] = {"type": ["string", "null"]}
TABLE: dict[str, Any] = {"type": ["object", "null"]}


def _object(**properties: Any) -> dict[str, Any]:
    """An object with these fields, all of them always there, and perhaps more."""
    return {"type": "object", "properties": properties, "required": list(properties)}


def _list(items: dict[str, Any]) -> dict[str, Any]:
    return {"type": "array", "items": items}


def _ref(name: str) -> dict[str, Any]:
    return {"$ref": REF + name}


_HEAD: dict[str, Any] = {"id": TEXT, "created": COUNT, "model": TEXT}
_USAGE = _object(
    prompt_tokens=COUNT,
    completion_tokens=COUNT,
    total_tokens=COUNT,
    prompt_cache_hit_tokens=COUNT,
    prompt_cache_miss_tokens=COUNT,
    prompt_tokens_details=_object(cached_tokens=COUNT),
    completion_tokens_details=_object(reasoning_tokens=COUNT),
)
_TIMES = (
    "cache_n queue_ms prompt_n prompt_ms prompt_per_second predicted_n predicted_ms predicted_per_second draft_n "
    "draft_n_accepted"
)
_COST: dict[str, Any] = {
    "usage": _ref("Usage"),
    "timings": _object(**{name: {"type": "number", "minimum": 0} for name in _TIMES.split()}),
}
_CALL = _object(id=TEXT, type={"const": "function"}, function=_object(name=TEXT, arguments=TEXT))
_MESSAGE = _object(role={"const": "assistant"}, content=MAYBE_TEXT)
_MESSAGE["properties"] |= {"reasoning_content": TEXT, "reasoning": TEXT, "tool_calls": _list(_CALL)}
_ENDS: dict[str, Any] = {"enum": ["stop", "length", "tool_calls"]}
_MODEL = _object(id=TEXT, object={"const": "model"}, created=COUNT, owned_by=TEXT, max_model_len=COUNT)

SCHEMAS: dict[str, Any] = {
    "Error": _object(error=_object(message=TEXT, type=TEXT, param=MAYBE_TEXT, code=MAYBE_TEXT)),
    "Usage": _USAGE,
    "Chat": _object(
        **_HEAD,
        object={"const": "chat.completion"},
        **_COST,
        choices=_list(_object(index=COUNT, message=_MESSAGE, logprobs=TABLE, finish_reason=_ENDS)),
    ),
    "Completion": _object(
        **_HEAD,
        object={"const": "text_completion"},
        **_COST,
        choices=_list(_object(index=COUNT, text=TEXT, logprobs=TABLE, finish_reason=_ENDS)),
    ),
    "Model": _MODEL,
    "Models": _object(object={"const": "list"}, data=_list(_ref("Model"))),
    "Status": _object(status=TEXT),
    "Control": _object(id=TEXT, object={"const": "chat.completion.control"}, action=TEXT),
}

ERRORS = {
    400: "The request does not fit; `param` names the field.",
    401: "The API key is missing or wrong.",
    403: "The Host or Origin is not allowed.",
    404: "No such path, model or running request.",
    405: "The path takes other methods.",
    413: "The body is too large.",
    429: "Too many requests with this key; Retry-After says when to come back.",
    431: "The headers are too large.",
    503: "Overloaded, shutting down, or the model has failed; Retry-After says when to come back.",
}


@functools.cache
def document() -> dict[str, Any]:
    """The whole document."""
    forms = (ChatRequest, CompletionRequest, ControlRequest)
    _, definitions = models_json_schema([(form, "validation") for form in forms], ref_template=REF + "{model}")
    ident = {"name": "id", "in": "path", "required": True, "schema": TEXT}
    name = {"name": "name", "in": "path", "required": True, "schema": {"type": "string", "minLength": 1}}
    after = {"name": "after", "in": "query", "schema": {"type": "integer", "minimum": 0, "maximum": 10**15 - 1}}
    plain = {"text/plain": {"schema": TEXT}}
    return {
        "openapi": "3.1.0",
        "info": {
            "title": "finback",
            "version": __version__,
            "license": {"name": "MIT"},
            "description": "OpenAI's and DeepSeek's interface. The same paths answer without /v1 and under /beta.",
        },
        "servers": [{"url": "/"}],
        "security": [{"key": []}],
        "paths": {
            "/v1/chat/completions": {"post": _generate("chat", "ChatRequest", "Chat")},
            "/v1/chat/completions/{id}/control": {
                "post": _operation("control", _json("Control"), "ControlRequest", [ident])
            },
            "/v1/chat/completions/{id}/stream": {
                "get": _operation("resume", {"text/event-stream": {}}, parameters=[ident, after])
            },
            "/v1/completions": {"post": _generate("complete", "CompletionRequest", "Completion")},
            "/v1/models": {"get": _operation("models", _json("Models"))},
            "/v1/models/{name}": {"get": _operation("model", _json("Model"), parameters=[name])},
            "/health": {"get": _operation("health", _json("Status")) | {"security": []}},
            "/ready": {"get": _operation("ready", _json("Status"))},
            "/metrics": {"get": _operation("metrics", plain)},
            "/openapi.json": {"get": _operation("openapi", {"application/json": {"schema": {"type": "object"}}})},
        },
        "components": {
            "schemas": SCHEMAS | definitions["$defs"],
            "securitySchemes": {"key": {"type": "http", "scheme": "bearer"}},
        },
    }


def _json(name: str) -> dict[str, Any]:
    return {"application/json": {"schema": _ref(name)}}


def _generate(ident: str, request: str, reply: str) -> dict[str, Any]:
    stream: dict[str, Any] = {"text/event-stream": {}}  # OpenAPI 3.1 cannot describe events
    return _operation(ident, _json(reply) | stream, request)


def _operation(
    ident: str, content: dict[str, Any], request: str | None = None, parameters: list[dict[str, Any]] | None = None
) -> dict[str, Any]:
    responses: dict[str, Any] = {"200": {"description": "Done.", "content": content}}
    responses |= {str(s): {"description": text, "content": _json("Error")} for s, text in ERRORS.items()}
    found: dict[str, Any] = {"operationId": ident, "responses": responses}
    if request is not None:
        found["requestBody"] = {"required": True, "content": _json(request)}
    if parameters:
        found["parameters"] = parameters
    return found
