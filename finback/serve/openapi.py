"""This server's OpenAPI document: requests from protocol.py and trainer_protocol.py, the rest from openapi.json. Does not import torch."""

import functools
import json
from pathlib import Path
from typing import Any

from pydantic.json_schema import models_json_schema

from finback import __version__
from finback.serve.anthropic_form import CountRequest, MessagesRequest
from finback.serve.errors import STATUSES, is_anthropic
from finback.serve.protocol import ChatRequest, CompletionRequest, ControlRequest
from finback.serve.responses_form import InputTokensRequest, ResponsesRequest
from finback.serve.token_form import DetokenizeRequest, TokenizeRequest
from finback.serve.trainer_protocol import TokensRequest, UpdateWeightsRequest

REF = "#/components/schemas/"


@functools.cache
def document() -> dict[str, Any]:
    """The whole document; every operation may also return each of the errors."""
    document: dict[str, Any] = json.loads(Path(__file__).with_suffix(".json").read_text(encoding="utf-8"))
    document["info"]["version"] = __version__
    openai = (ChatRequest, CompletionRequest, ControlRequest, ResponsesRequest, InputTokensRequest)
    others = (TokenizeRequest, DetokenizeRequest, TokensRequest, UpdateWeightsRequest)
    forms = (*openai, MessagesRequest, CountRequest, *others)
    _, definitions = models_json_schema([(form, "validation") for form in forms], ref_template=REF + "{model}")
    document["components"]["schemas"] |= definitions["$defs"]
    for path, operations in document["paths"].items():
        name = "AnthropicError" if is_anthropic(path) else "Error"
        content = {"application/json": {"schema": {"$ref": REF + name}}}
        errors = {str(s): {"description": text, "content": content} for s, (_, text) in STATUSES.items() if s != 500}
        for operation in operations.values():
            operation["responses"] |= errors
    return document
