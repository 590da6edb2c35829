"""A chat request's settings for thinking, in their many forms, and for the form of the answer. Does not import torch."""

from typing import Any

from finback.serve.protocol import ChatRequest

# DeepSeek's and OpenAI's efforts, as the share of max_tokens that the chain may use; None: all
EFFORT = {"minimal": 1 / 8, "low": 1 / 8, "medium": 1 / 4, "high": 1 / 2, "xhigh": 1 / 2, "max": None, "ultra": None}


def thinks(request: ChatRequest) -> bool | None:
    """Whether the request wants a chain of thought; None: the model decides."""
    if request.thinking is not None:
        return {"enabled": True, "disabled": False, "adaptive": None}[request.thinking.type]
    switches = request.chat_template_kwargs
    if switches is not None:
        for value in (switches.enable_thinking, switches.thinking):
            if value is not None:
                return value
    return None if request.reasoning_effort is None else request.reasoning_effort != "none"


def thinking_budget(request: ChatRequest, limit: int, told: bool) -> int | None:
    """The longest chain of thought in tokens, for an answer of `limit` tokens; None: no other bound.

    If the prompt has `told` the model the effort, the effort does not limit the chain.
    """
    for budget in (request.thinking_budget, request.thinking.budget_tokens if request.thinking else None):
        if budget is not None:
            return budget
    share = None if told else EFFORT.get(request.reasoning_effort or "max")
    return None if share is None else max(1, int(limit * share))


def reply_schema(request: ChatRequest) -> dict[str, Any] | None:
    """The schema of `response_format` for use in prompts; {"type": "json_object"} stands for any object."""
    form = request.response_format
    if form is None or form.type == "text":
        return None
    given = form.json_schema.schema_ if form.json_schema else form.schema_
    return {"type": "json_object"} if given is None else given
