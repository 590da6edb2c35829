"""Requests as OpenAI and DeepSeek define them: types, ranges, limits. Does not import torch.

Unknown fields are ignored, as both services do. Types are strict: "1" is not a number, 1 is not a boolean.
"""

import json
from typing import Annotated, Any, Literal

from pydantic import AfterValidator, BaseModel, ConfigDict, Field, model_validator

from finback.serve.body import depth

SCHEMA_BYTES, SCHEMA_DEPTH = 64 << 10, 32

Stop = Annotated[str, Field(min_length=1, max_length=256)]
Token = Annotated[int, Field(ge=0, lt=1 << 31)]
Biases = dict[Annotated[str, Field(pattern=r"^[0-9]{1,9}$")], Annotated[float, Field(ge=-100, le=100)]]
Name = Annotated[str, Field(max_length=256)]
Unlimited = Literal[-1]  # llama.cpp's value for as many as fit


class RequestPart(BaseModel):
    """Any object in a request body."""

    model_config = ConfigDict(strict=True, extra="ignore", allow_inf_nan=False)


class StreamOptions(RequestPart):
    """Options of a stream."""

    include_usage: bool | None = None
    resumable: bool | None = Field(
        None, description="continue for a while if the connection is lost; resume at /chat/completions/{id}/stream"
    )


class GenerationRequest(RequestPart):
    """Fields that chat and text completions share."""

    model: Name | None = None
    max_tokens: Annotated[int, Field(ge=0, lt=1 << 31)] | Unlimited | None = None
    temperature: Annotated[float, Field(ge=0, le=2)] | None = None
    top_p: Annotated[float, Field(gt=0, le=1)] | None = None
    top_k: Annotated[int, Field(ge=-1, lt=1 << 31)] | None = Field(None, description="0 or -1: all tokens")
    min_p: Annotated[float, Field(ge=0, le=1)] | None = None
    frequency_penalty: Annotated[float, Field(ge=-2, le=2)] | None = None
    presence_penalty: Annotated[float, Field(ge=-2, le=2)] | None = None
    repetition_penalty: Annotated[float, Field(gt=0, le=10)] | None = None
    logit_bias: Annotated[Biases, Field(max_length=1024)] | None = None
    seed: int | None = None
    stop: Stop | Annotated[list[Stop], Field(max_length=16)] | None = None
    stop_token_ids: Annotated[list[Token], Field(max_length=64)] | None = None
    ignore_eos: bool | None = None
    n: Annotated[int, Field(ge=1, le=8)] | None = None
    stream: bool | None = None
    stream_options: StreamOptions | None = None
    user: Annotated[str, Field(max_length=512)] | None = None
    user_id: Annotated[str, Field(max_length=512)] | None = Field(
        None, description="separates the prompt cache of end users"
    )

    @property
    def stops(self) -> tuple[str, ...]:
        """The stop strings."""
        return (self.stop,) if isinstance(self.stop, str) else tuple(self.stop or ())


class FunctionParam(RequestPart):
    """A function that the model may call."""

    name: Annotated[str, Field(pattern=r"^[A-Za-z0-9_-]{1,128}$")]
    description: str | None = None
    parameters: dict[str, Any] | None = None
    strict: bool | None = None


class ToolParam(RequestPart):
    """OpenAI's wrapper of a function."""

    type: Literal["function"]
    function: FunctionParam


class CalledFunctionParam(RequestPart):
    """A function and its arguments in a call."""

    name: Annotated[str, Field(min_length=1, max_length=128)]
    arguments: str


class ToolCallParam(RequestPart):
    """A call by the assistant in an earlier turn."""

    id: str | None = None
    type: Literal["function"] | None = None
    function: CalledFunctionParam


def text_only(kind: str) -> str:
    """The kind of a text part; ValueError that names any other kind."""
    if kind not in ("text", "input_text", "output_text", "refusal"):
        raise ValueError(f"the model reads text only, and this is {printable(kind)!r}")
    return kind


def printable(text: str) -> str:
    """The beginning of client text, safe for a message."""
    return "".join(c if c.isprintable() else "?" for c in text[:64])


class TextPartParam(RequestPart):
    """A part of a message's content; only text is supported."""

    type: Annotated[str, AfterValidator(text_only)]
    text: str | None = None
    refusal: str | None = None

    @model_validator(mode="after")
    def _has_text(self) -> "TextPartParam":
        text = self.refusal if self.type == "refusal" else self.text
        if text is None:
            raise ValueError("text is missing")
        self.type, self.text, self.refusal = "text", text, None
        return self


class MessageParam(RequestPart):
    """One turn of a dialogue."""

    role: Literal["system", "developer", "user", "assistant", "tool"]
    content: str | list[TextPartParam] | None = None
    name: str | None = None
    reasoning_content: str | None = None
    reasoning: str | None = Field(None, description="the same as reasoning_content")
    tool_calls: Annotated[list[ToolCallParam], Field(max_length=128)] | None = None
    tool_call_id: str | None = None
    prefix: bool | None = Field(None, description="for a last message of the assistant: continue it")

    @model_validator(mode="after")
    def _has_content(self) -> "MessageParam":
        if self.content is None and not (self.role == "assistant" and (self.tool_calls or self.prefix)):
            raise ValueError("content is missing")
        return self


class ThinkingParam(RequestPart):
    """DeepSeek's switch."""

    type: Literal["enabled", "disabled", "adaptive"] = Field(description="adaptive: the model decides")
    budget_tokens: Annotated[int, Field(ge=0, lt=1 << 31)] | None = None


class TemplateSwitches(RequestPart):
    """vLLM's and SGLang's names for the same switch."""

    enable_thinking: bool | None = None
    thinking: bool | None = None
    chat_template: None = Field(None, description="refused: templates are code and come from the model")


def small(schema: dict[str, Any]) -> dict[str, Any]:
    """The schema unchanged; ValueError if it is too large to constrain an answer."""
    if depth(schema) > SCHEMA_DEPTH:
        raise ValueError(f"nests deeper than {SCHEMA_DEPTH}")
    if len(json.dumps(schema, ensure_ascii=False).encode()) > SCHEMA_BYTES:
        raise ValueError(f"longer than {SCHEMA_BYTES} bytes")
    return schema


Schema = Annotated[dict[str, Any], AfterValidator(small)]
LongText = Annotated[str, Field(max_length=SCHEMA_BYTES)]
Pattern = Annotated[str, Field(max_length=4096)]
Choices = Annotated[list[Annotated[str, Field(max_length=1024)]], Field(min_length=1, max_length=256)]


class JsonSchema(RequestPart):
    """OpenAI's wrapper of a schema."""

    name: Annotated[str, Field(max_length=64)] | None = None
    schema_: Schema = Field(alias="schema")
    strict: bool | None = None


class NamedFunction(RequestPart):
    """The name of a function."""

    name: Annotated[str, Field(max_length=128)]


class NamedToolParam(RequestPart):
    """The one function that must be called, in OpenAI's wrapper."""

    type: Literal["function"]
    function: NamedFunction


class ResponseFormat(RequestPart):
    """The form of the answer."""

    type: Literal["text", "json_object", "json_schema"]
    json_schema: JsonSchema | None = None
    schema_: Schema | None = Field(None, alias="schema", description="llama.cpp's field for the schema")

    @model_validator(mode="after")
    def _has_its_schema(self) -> "ResponseFormat":
        if self.type == "json_schema" and self.json_schema is None and self.schema_ is None:
            raise ValueError("json_schema is missing")
        return self


class StructuredOutputs(RequestPart):
    """vLLM's ways to specify the form of an answer; at most one."""

    json_: Schema | bool | LongText | None = Field(None, alias="json")
    json_object: bool | None = None
    regex: Pattern | None = None
    choice: Choices | None = None
    grammar: LongText | None = Field(None, description="Lark or GBNF")
    structural_tag: None = None


class ChatRequest(GenerationRequest):
    """POST /v1/chat/completions."""

    messages: Annotated[list[MessageParam], Field(min_length=1, max_length=4096)]
    max_tokens: Annotated[int, Field(ge=1, lt=1 << 31)] | Unlimited | None = None
    max_completion_tokens: Annotated[int, Field(ge=1, lt=1 << 31)] | Unlimited | None = None
    logprobs: bool | None = None
    top_logprobs: Annotated[int, Field(ge=0, le=20)] | None = None
    tools: Annotated[list[ToolParam], Field(max_length=128)] | None = None
    tool_choice: Literal["none", "auto", "required"] | NamedToolParam | None = Field(
        None, description="required: at least one call; a function: exactly one call of it"
    )
    parallel_tool_calls: bool | None = Field(None, description="false: at most one call")
    response_format: ResponseFormat | None = None
    structured_outputs: StructuredOutputs | None = None
    guided_json: Schema | LongText | None = Field(None, description="vLLM's older names for the same")
    guided_regex: Pattern | None = None
    guided_choice: Choices | None = None
    guided_grammar: LongText | None = None
    grammar: LongText | None = Field(None, description="llama.cpp's GBNF")
    json_schema: Schema | None = Field(None, description="llama.cpp's field for a schema")
    chat_template: None = Field(None, description="refused: templates are code and come from the model")
    thinking: ThinkingParam | None = None
    chat_template_kwargs: TemplateSwitches | None = None
    reasoning_effort: Literal["none", "minimal", "low", "medium", "high", "xhigh", "max", "ultra"] | None = None
    thinking_budget: Annotated[int, Field(ge=0, lt=1 << 31)] | None = Field(
        None, description="longest chain of thought in tokens; then it is closed"
    )


Ids = Annotated[list[Token], Field(min_length=1)]


class CompletionRequest(GenerationRequest):
    """POST /v1/completions."""

    prompt: str | Ids | Annotated[list[str], Field(min_length=1)] | Annotated[list[Ids], Field(min_length=1)]
    suffix: str | None = Field(None, description="text after the gap that the model fills")
    echo: bool | None = None
    logprobs: Annotated[int, Field(ge=0, le=20)] | None = None
    prompt_logprobs: Annotated[int, Field(ge=0, le=20)] | None = Field(
        None, description="vLLM's: for each prompt token and this many of the likeliest, by id; not with stream"
    )
    best_of: Annotated[int, Field(ge=1, le=8)] | None = Field(None, description="equal to n, or absent")

    @property
    def prompts(self) -> list[str | list[int]]:
        """One text or list of ids for each prompt."""
        given: Any = self.prompt
        return [given] if isinstance(given, str) or isinstance(given[0], int) else given


class ControlRequest(RequestPart):
    """POST /v1/chat/completions/{id}/control."""

    action: Literal["answer_now", "stop"]
