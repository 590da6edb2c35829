"""Tokenization requests, in vLLM's and llama.cpp's forms. Does not import torch."""

from typing import Annotated

from pydantic import Field, model_validator

from finback.serve.protocol import MessageParam, Name, RequestPart, TemplateSwitches, Token, ToolParam

Text = Annotated[str, Field(max_length=1 << 20)]


class TokenizeRequest(RequestPart):
    """POST /tokenize: a text (`prompt`, or llama.cpp's `content`) or a dialogue."""

    model: Name | None = None
    prompt: Text | None = None
    content: Text | None = None
    messages: Annotated[list[MessageParam], Field(min_length=1, max_length=4096)] | None = None
    tools: Annotated[list[ToolParam], Field(max_length=128)] | None = None
    chat_template_kwargs: TemplateSwitches | None = None
    continue_final_message: bool | None = None
    add_special_tokens: bool | None = Field(None, description="add bos before a prompt; default: true")
    add_special: bool | None = Field(None, description="add bos before llama.cpp's content; default: false")
    parse_special: bool | None = Field(None, description="parse special tokens in the text")
    return_token_strs: bool | None = None
    with_pieces: bool | None = None

    @model_validator(mode="after")
    def _is_one(self) -> "TokenizeRequest":
        if sum(given is not None for given in (self.prompt, self.content, self.messages)) != 1:
            raise ValueError("send one of prompt, content and messages")
        return self


class DetokenizeRequest(RequestPart):
    """POST /detokenize."""

    model: Name | None = None
    tokens: Annotated[list[Token], Field(max_length=1 << 20)]
