"""Requests to Anthropic's Messages API, and their translation to chat requests. Does not import torch.

Unknown fields, block caching, betas and the like are ignored, since clients send them unasked. What the model cannot do is
left out with a note if the answer makes sense without it, and refused by name otherwise.
"""

import json
from collections.abc import Iterator, Sequence
from typing import Annotated, Any, Literal

from pydantic import Field, model_validator

from finback.serve.errors import bad
from finback.serve.protocol import RequestPart, Schema, Stop, printable
from finback.serve.translation import TranslatedRequest

BILLING = "x-anthropic-billing-header"  # Claude Code's first system block; it may change with each request
NAMES = {"response_format": "output_config.format", "tool_choice.function.name": "tool_choice.name"}
# kinds of blocks without anything that a text model could read
DROPPED = ("redacted_thinking", "tool_reference", "server_tool_use", "tool_addition", "tool_removal", "fallback")


class ContentBlock(RequestPart):
    """A content block."""

    type: str
    text: str | None = None
    thinking: str | None = None
    id: str | None = None
    name: Annotated[str, Field(min_length=1, max_length=128)] | None = None
    input: dict[str, Any] | None = None
    tool_use_id: str | None = None
    content: "str | list[ContentBlock] | dict[str, Any] | None" = None

    @model_validator(mode="after")
    def _is_whole(self) -> "ContentBlock":
        """ValueError that names an unsupported kind of block, or a missing field."""
        is_left_out = self.type in DROPPED or self.type.endswith("_tool_result")
        needs = {"text": "text", "thinking": "thinking", "tool_use": "name", "tool_result": "tool_use_id"}
        if self.type not in needs and self.type != "search_result" and not is_left_out:
            raise ValueError(f"the model reads text only, and this is {printable(self.type)!r}")
        if (name := needs.get(self.type)) and getattr(self, name) is None:
            raise ValueError(f"{name} is missing")
        if self.type == "tool_use" and self.id is None:
            raise ValueError("id is missing")
        return self

    @property
    def plain(self) -> str:
        """Its text; for a result or a search, the parts on separate lines."""
        if self.type == "text":
            return self.text or ""
        if isinstance(self.content, list):
            return "\n".join(block.plain for block in self.content if block.type not in DROPPED)
        return self.content if isinstance(self.content, str) else ""


class TurnParam(RequestPart):
    """One turn of a dialogue; system messages may occur among them."""

    role: Literal["user", "assistant", "system"]
    content: str | list[ContentBlock]

    @property
    def blocks(self) -> list[ContentBlock]:
        """The content as blocks; a plain string is one text block."""
        return [ContentBlock(type="text", text=self.content)] if isinstance(self.content, str) else self.content


class ThinkingSwitch(RequestPart):
    """Whether the model thinks before it answers; adaptive and between_tools leave that to the model."""

    type: Literal["enabled", "disabled", "adaptive", "between_tools"]
    budget_tokens: Annotated[int, Field(ge=1, lt=1 << 31)] | None = None


class OutputFormat(RequestPart):
    """A schema for the answer."""

    type: Literal["json_schema"]
    schema_: Schema = Field(alias="schema")


class OutputConfig(RequestPart):
    """The effort of thinking, and the form of the answer."""

    effort: Literal["low", "medium", "high", "xhigh", "max"] | None = None
    format: OutputFormat | None = None


class ClientTool(RequestPart):
    """A function that the model may call; kinds that a hosted service runs have no schema."""

    name: Annotated[str, Field(pattern=r"^[A-Za-z0-9_-]{1,128}$")]
    type: Annotated[str, Field(max_length=64)] | None = None
    description: str | None = None
    input_schema: dict[str, Any] | None = None
    strict: bool | None = None

    @property
    def is_function(self) -> bool:
        """Whether the client runs it, rather than a hosted service."""
        return self.type in (None, "custom")


class ToolChoice(RequestPart):
    """Which tools may be called."""

    type: Literal["auto", "any", "tool", "none"]
    name: Annotated[str, Field(max_length=128)] | None = None
    disable_parallel_tool_use: bool | None = None

    @model_validator(mode="after")
    def _names_its_tool(self) -> "ToolChoice":
        if self.type == "tool" and self.name is None:
            raise ValueError("name is missing")
        return self


class EndUser(RequestPart):
    """The end user, identified by the client."""

    user_id: Annotated[str, Field(max_length=2048)] | None = None


class CountRequest(RequestPart):
    """POST /v1/messages/count_tokens."""

    model: Annotated[str, Field(max_length=256)]
    messages: Annotated[list[TurnParam], Field(min_length=1, max_length=4096)]
    system: str | list[ContentBlock] | None = None
    tools: Annotated[list[ClientTool], Field(max_length=128)] | None = None
    tool_choice: ToolChoice | None = None
    thinking: ThinkingSwitch | None = None
    output_config: OutputConfig | None = None


class MessagesRequest(CountRequest):
    """POST /v1/messages."""

    max_tokens: Annotated[int, Field(ge=1, lt=1 << 31)] = Field(description="may exceed the rest of the window")
    stop_sequences: Annotated[list[Stop], Field(max_length=16)] | None = None
    stream: bool | None = None
    temperature: Annotated[float, Field(ge=0, le=2)] | None = None
    top_p: Annotated[float, Field(gt=0, le=1)] | None = None
    top_k: Annotated[int, Field(ge=-1, lt=1 << 31)] | None = None
    seed: int | None = Field(None, description="finback's extension: the same seed gives the same answer")
    metadata: EndUser | None = None
    mcp_servers: list[Any] | None = Field(None, description="refused unless empty")


def translated(body: CountRequest) -> TranslatedRequest:
    """The request in chat's form; ApiError 400 for what is not supported."""
    messages: list[dict[str, Any]] = []
    places: list[str] = []
    for message, place in (*_system(body.system), *_turns(body.messages)):
        messages.append(message)
        places.append(place)
    if not messages or all(m["role"] == "system" for m in messages):
        raise bad("messages: all turns are empty", "messages")
    request: dict[str, Any] = {"messages": messages, **_tools(body)}
    thinking, config = body.thinking, body.output_config or OutputConfig()
    if thinking is not None:
        kind = "adaptive" if thinking.type == "between_tools" else thinking.type
        request["thinking"] = {"type": kind, "budget_tokens": thinking.budget_tokens}
    if config.effort is not None:
        # effort sets how long to think, not whether to think
        request |= {"thinking": request.get("thinking") or {"type": "adaptive"}, "reasoning_effort": config.effort}
    if config.format is not None:
        request["response_format"] = {"type": "json_schema", "json_schema": {"schema": config.format.schema_}}
    if isinstance(body, MessagesRequest):
        if body.mcp_servers:
            raise bad("mcp_servers: this server does not call other servers; leave it out", "mcp_servers")
        request |= {n: getattr(body, n) for n in ("max_tokens", "stream", "temperature", "top_p", "top_k", "seed")}
        request |= {"stop": body.stop_sequences, "user_id": body.metadata and _short(body.metadata.user_id)}
    return TranslatedRequest.of(request, places, NAMES, _notes(body))


def _short(user: str | None) -> str | None:
    return user and user[:512]


def _system(given: str | list[ContentBlock] | None) -> Iterator[tuple[dict[str, Any], str]]:
    blocks = [ContentBlock(type="text", text=given)] if isinstance(given, str) else given or []
    texts = [block.plain for block in blocks if not block.plain.startswith(BILLING)]
    if text := "\n\n".join(texts):
        yield {"role": "system", "content": text}, "system"


def _turns(turns: Sequence[TurnParam]) -> Iterator[tuple[dict[str, Any], str]]:
    """Chat messages with their location in the request; turns without content are dropped."""
    for i, turn in enumerate(turns):
        place, blocks = f"messages[{i}]", turn.blocks
        text = "".join(block.plain for block in blocks if block.type in ("text", "search_result"))
        if turn.role == "assistant":
            thought = "".join(block.thinking or "" for block in blocks if block.type == "thinking")
            calls = [_call(block) for block in blocks if block.type == "tool_use"]
            is_begun = i == len(turns) - 1 and not calls
            message = {"role": "assistant", "content": text, "reasoning_content": thought or None}
            if text or thought or calls:
                yield message | ({"tool_calls": calls} if calls else {"prefix": True} if is_begun else {}), place
            continue
        for block in blocks:
            if block.type == "tool_result":
                yield {"role": "tool", "tool_call_id": block.tool_use_id, "content": block.plain}, place
        if text or not any(block.type == "tool_result" for block in blocks):
            yield {"role": turn.role, "content": text}, place


def _call(block: ContentBlock) -> dict[str, Any]:
    arguments = json.dumps(block.input or {}, ensure_ascii=False)
    return {"id": block.id, "type": "function", "function": {"name": block.name, "arguments": arguments}}


def _tools(body: CountRequest) -> dict[str, Any]:
    """Tools and tool_choice in chat's form."""
    choice = body.tool_choice or ToolChoice(type="auto")
    functions = [tool for tool in body.tools or () if tool.is_function]
    hosted = next((tool for tool in body.tools or () if not tool.is_function), None)
    if hosted is not None and (not functions or choice.name == hosted.name):
        raise bad(f"tools: this server runs no tools of the type {printable(hosted.type or '')!r}", "tools")
    found: dict[str, Any] = {
        "tools": [
            {
                "type": "function",
                "function": {
                    "name": tool.name,
                    "description": tool.description,
                    "parameters": tool.input_schema,
                    "strict": tool.strict,
                },
            }
            for tool in functions
        ]
        or None
    }
    named = {"type": "function", "function": {"name": choice.name}}
    wanted = {"auto": None, "none": "none", "any": "required", "tool": named}[choice.type]
    return found | {"tool_choice": wanted, "parallel_tool_calls": False if choice.disable_parallel_tool_use else None}


def _notes(body: CountRequest) -> list[str]:
    return [f"tool {tool.name} was left out: a hosted kind" for tool in body.tools or () if not tool.is_function]
