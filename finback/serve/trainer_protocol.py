"""Requests of trainers: prompts as token ids in vLLM's form, and weight updates in SGLang's. Does not import torch."""

from typing import Annotated, Literal

from pydantic import Field, field_validator

from finback.serve.protocol import Ids, Name, RequestPart, Token


class TokenSamplingParam(RequestPart):
    """vLLM's sampling parameters, as far as finback supports them."""

    temperature: Annotated[float, Field(ge=0, le=100)] = 1.0
    top_p: Annotated[float, Field(gt=0, le=1)] = 1.0
    top_k: Annotated[int, Field(ge=-1, lt=1 << 31)] = Field(0, description="0 or -1: all tokens")
    min_p: Annotated[float, Field(ge=0, le=1)] = 0.0
    max_tokens: Annotated[int, Field(ge=1, lt=1 << 31)] | None = Field(
        None, description="absent: as many as the window holds"
    )
    seed: int | None = None
    stop_token_ids: Annotated[list[Token], Field(max_length=64)] | None = None
    ignore_eos: bool = False
    logprobs: Annotated[int, Field(ge=0, le=1)] | None = Field(None, description="0 or 1: only the sampled token")
    n: Literal[1] = 1


class TokensRequest(RequestPart):
    """POST /inference/v1/generate."""

    token_ids: Ids
    sampling_params: TokenSamplingParam
    model: Name | None = None
    request_id: Annotated[str, Field(max_length=256)] | None = None
    cache_salt: Annotated[str, Field(min_length=1, max_length=1024)] | None = Field(
        None, description="separates cached prompts of requests with different values"
    )
    output_mode: Literal["tokens"] = "tokens"
    return_token_ids: bool | None = None
    stream: bool | None = None

    @field_validator("stream")
    @classmethod
    def _whole(cls, value: bool | None) -> bool | None:
        if value:
            raise ValueError("answers with token ids are not streamed; leave out stream")
        return value


class UpdateWeightsRequest(RequestPart):
    """POST /update_weights_from_disk."""

    model_path: Annotated[str, Field(min_length=1, max_length=4096)] = Field(
        description="a folder that `finback serve` accepts, inside that of --allow-weight-updates"
    )
    weight_version: Annotated[str, Field(min_length=1, max_length=256)] | None = Field(
        None, description="the name of these weights in answers; absent: the folder's name"
    )
    model: Name | None = None
