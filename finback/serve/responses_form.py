"""Requests to OpenAI's Responses API, and their translation to chat requests. Does not import torch.

Unknown fields are ignored, since clients send many unasked. Tools that a hosted service would run are left out with a note
if functions remain, else refused by name.
"""

import json
from collections.abc import Iterator, Sequence
from typing import Annotated, Any, Literal

from pydantic import AfterValidator, Field, model_validator

from finback.serve.errors import bad
from finback.serve.protocol import RequestPart, Schema, printable, text_only
from finback.serve.translation import TranslatedRequest

NAMES = {
    "messages": "input",
    "max_tokens": "max_output_tokens",
    "response_format.json_schema.schema": "text.format.schema",
    "response_format": "text.format",
    "reasoning_effort": "reasoning.effort",
    "tool_choice.function": "tool_choice",
}
ITEMS = ("message", "function_call", "function_call_output", "reasoning", "item_reference")
CUSTOM = ("custom_tool_call", "custom_tool_call_output")
INPUT = {"type": "object", "properties": {"input": {"type": "string"}}, "required": ["input"]}  # input of a custom tool
Effort = Literal["none", "minimal", "low", "medium", "high", "xhigh", "max"]
Names = Annotated[str, Field(min_length=1, max_length=128)]


class ItemPart(RequestPart):
    """A part of an item's content; only text is supported."""

    type: Annotated[str, AfterValidator(lambda kind: kind if kind.endswith(("_text", "refusal")) else text_only(kind))]
    text: str | None = None
    refusal: str | None = None

    @property
    def plain(self) -> str:
        """Its text, or its refusal."""
        return self.text or self.refusal or ""


class Item(RequestPart):
    """One item of the input; without a type it is a message."""

    type: Annotated[str, Field(max_length=64)] | None = None
    id: Annotated[str, Field(max_length=256)] | None = None
    role: Literal["user", "assistant", "system", "developer"] | None = None
    content: str | list[ItemPart] | None = None
    summary: list[ItemPart] | None = None
    call_id: Annotated[str, Field(max_length=256)] | None = None
    name: Names | None = None
    namespace: Names | None = None
    arguments: str | None = None
    input: str | None = None
    output: str | list[ItemPart] | None = None

    @model_validator(mode="after")
    def _is_whole(self) -> "Item":
        """ValueError that names an unsupported kind of item, or a missing field."""
        if self.type is None:
            self.type = "item_reference" if self.role is None and self.id is not None else "message"
        if self.type not in (*ITEMS, *CUSTOM):
            raise ValueError(f"items of the type {printable(self.type)!r} are not supported; leave it out")
        needs = {
            "message": ("role", "content"),
            "function_call": ("call_id", "name", "arguments"),
            "custom_tool_call": ("call_id", "name", "input"),
            "item_reference": ("id",),
        }
        for name in needs.get(self.type, ("call_id", "output") if self.type.endswith("_output") else ()):
            if getattr(self, name) is None:
                raise ValueError(f"{name} is missing")
        return self


class ReasoningParam(RequestPart):
    """How long the model thinks."""

    effort: Effort | None = None


class TextFormat(RequestPart):
    """The form of the answer."""

    type: Literal["text", "json_object", "json_schema"]
    name: Annotated[str, Field(max_length=64)] | None = None
    schema_: Schema | None = Field(None, alias="schema")
    strict: bool | None = None

    @model_validator(mode="after")
    def _has_schema(self) -> "TextFormat":
        if self.type == "json_schema" and self.schema_ is None:
            raise ValueError("schema is missing")
        return self


class TextParam(RequestPart):
    """How the answer is written."""

    format: TextFormat | None = None


class ResponseTool(RequestPart):
    """A function, a tool with plain text input, or a namespace of functions; other kinds are hosted."""

    type: Annotated[str, Field(max_length=64)]
    name: Annotated[str, Field(pattern=r"^[A-Za-z0-9_-]{1,64}$")] | None = None
    description: str | None = None
    parameters: dict[str, Any] | None = None
    strict: bool | None = None
    tools: "list[ResponseTool] | None" = None

    @model_validator(mode="after")
    def _has_name(self) -> "ResponseTool":
        if self.type in ("function", "custom", "namespace") and self.name is None:
            raise ValueError("name is missing")
        return self


class ChosenTool(RequestPart):
    """Which tools may be called."""

    type: Annotated[str, Field(max_length=64)]
    name: Names | None = None
    mode: Literal["auto", "required"] | None = None
    tools: list[dict[str, Any]] | None = None


class InputTokensRequest(RequestPart):
    """POST /v1/responses/input_tokens."""

    model: Annotated[str, Field(max_length=256)] | None = None
    input: str | Annotated[list[Item], Field(max_length=4096)] | None = None
    instructions: str | None = None
    previous_response_id: Annotated[str, Field(max_length=256)] | None = None
    conversation: None = Field(None, description="refused: use previous_response_id")
    reasoning: ReasoningParam | None = None
    text: TextParam | None = None
    tools: Annotated[list[ResponseTool], Field(max_length=128)] | None = None
    tool_choice: Literal["none", "auto", "required"] | ChosenTool | None = None
    parallel_tool_calls: bool | None = None

    @property
    def items(self) -> list[Item]:
        """The input; a string is one message."""
        given = self.input if self.input is not None else []
        return [Item(type="message", role="user", content=given)] if isinstance(given, str) else given


class ResponsesRequest(InputTokensRequest):
    """POST /v1/responses."""

    store: bool | None = Field(None, description="false: the response cannot be retrieved or referenced later")
    max_output_tokens: Annotated[int, Field(ge=1, lt=1 << 31)] | None = None
    temperature: Annotated[float, Field(ge=0, le=2)] | None = None
    top_p: Annotated[float, Field(gt=0, le=1)] | None = None
    seed: int | None = Field(None, description="finback's extension: the same seed gives the same answer")
    stream: bool | None = None
    background: Literal[False] | None = None
    prompt: None = Field(None, description="refused: there are no stored prompts")
    metadata: dict[str, str] | None = None
    user: Annotated[str, Field(max_length=512)] | None = None
    safety_identifier: Annotated[str, Field(max_length=512)] | None = None


def translated(body: InputTokensRequest, items: Sequence[tuple[Item, str]]) -> TranslatedRequest:
    """The request in chat's form; `items` are all referenced items, each with its location."""
    messages = list(_messages(items))
    if body.instructions:
        messages.insert(0, ({"role": "system", "content": body.instructions}, "instructions"))
    if not messages:
        raise bad("input is missing", "input")
    request: dict[str, Any] = {"messages": [m for m, _ in messages], **_tools(body)}
    if body.reasoning is not None:
        request["reasoning_effort"] = body.reasoning.effort
    form = body.text.format if body.text else None
    if form is not None:
        wrapped = {"name": form.name, "schema": form.schema_, "strict": form.strict}
        request["response_format"] = {"type": form.type, "json_schema": wrapped if form.schema_ is not None else None}
    if isinstance(body, ResponsesRequest):
        request |= {n: getattr(body, n) for n in ("temperature", "top_p", "seed", "stream")}
        request |= {"max_tokens": body.max_output_tokens, "user_id": body.safety_identifier or body.user}
    hosted = (tool for tool in body.tools or () if not _functions(tool))
    notes = [f"tools of the type {printable(tool.type)} were left out: a hosted kind" for tool in hosted]
    return TranslatedRequest.of(request, [place for _, place in messages], NAMES, notes)


def _messages(items: Sequence[tuple[Item, str]]) -> Iterator[tuple[dict[str, Any], str]]:
    """Chat messages; reasoning, text and calls of one assistant turn become one message."""
    turn: dict[str, Any] = {}
    at = ""
    for item, place in items:
        kind = "answer" if item.type == "message" and item.role == "assistant" else item.type
        is_own = kind in ("answer", "reasoning", "function_call", "custom_tool_call")
        has_answered = bool(turn and turn["content"] and kind == "reasoning")
        if turn and (not is_own or has_answered or ("tool_calls" in turn and kind in ("answer", "reasoning"))):
            yield turn, at
            turn = {}
        if is_own and not turn:
            turn, at = {"role": "assistant", "content": ""}, place
        if kind == "answer":
            turn["content"] = "\n".join(filter(None, (turn["content"], _plain(item.content))))
        elif kind == "reasoning":
            thought = _plain(item.content) or _plain(item.summary)
            turn["reasoning_content"] = turn.get("reasoning_content", "") + thought
        elif is_own:
            turn.setdefault("tool_calls", []).append(_call(item))
        elif kind == "message":
            yield {"role": item.role, "content": _plain(item.content)}, place
        else:
            yield {"role": "tool", "tool_call_id": item.call_id, "content": _plain(item.output)}, place
    if turn:
        yield turn, at


def _plain(content: str | Sequence[ItemPart] | None) -> str:
    return content if isinstance(content, str) else "".join(part.plain for part in content or ())


def _call(item: Item) -> dict[str, Any]:
    name = f"{item.namespace}__{item.name}" if item.namespace else item.name
    arguments = item.arguments if item.arguments is not None else json.dumps({"input": item.input}, ensure_ascii=False)
    return {"id": item.call_id, "type": "function", "function": {"name": name, "arguments": arguments}}


def _functions(tool: ResponseTool) -> list[dict[str, Any]]:
    """The functions that a tool contains; none for a hosted one."""
    if tool.type == "namespace":
        inner = [each for each in tool.tools or () if each.type in ("function", "custom")]
        return [f | {"name": f"{tool.name}__{f['name']}"} for each in inner for f in _functions(each)]
    if tool.type not in ("function", "custom"):
        return []
    parameters = INPUT if tool.type == "custom" else tool.parameters
    return [{"name": tool.name, "description": tool.description, "parameters": parameters, "strict": tool.strict}]


def _tools(body: InputTokensRequest) -> dict[str, Any]:
    """Tools and tool_choice in chat's form."""
    choice = body.tool_choice if isinstance(body.tool_choice, ChosenTool) else None
    functions = [f for tool in body.tools or () for f in _functions(tool)]
    if body.tools and not functions:
        kind = printable(body.tools[0].type)
        raise bad(f"tools[0].type: this server runs no tools of the type {kind!r}", "tools[0].type")
    wanted: Any = body.tool_choice
    if choice is not None and choice.type == "allowed_tools":
        allowed = {str(tool.get("name")) for tool in choice.tools or ()}
        functions = [f for f in functions if f["name"] in allowed]
        wanted = choice.mode
    elif choice is not None and choice.type in ("function", "custom") and choice.name is not None:
        wanted = {"type": "function", "function": {"name": choice.name}}
    elif choice is not None:
        raise bad(f"tool_choice.type: {printable(choice.type)!r} is not supported", "tool_choice.type")
    tools = [{"type": "function", "function": f} for f in functions] or None
    return {"tools": tools, "tool_choice": wanted, "parallel_tool_calls": body.parallel_tool_calls}
