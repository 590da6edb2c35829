"""Tokenization and detokenization, in vLLM's and llama.cpp's forms."""

import asyncio
from typing import Any

from starlette.requests import Request
from starlette.responses import JSONResponse, Response

from finback.serve.body import read
from finback.serve.errors import bad
from finback.serve.protocol import ChatRequest
from finback.serve.service import Service, service_of
from finback.serve.token_form import DetokenizeRequest, TokenizeRequest
from finback.serve.upstream import UpstreamEngine


async def tokenize(request: Request) -> Response:
    """The tokens of a text or of a prompt."""
    body = await read(request, TokenizeRequest)
    service = await service_of(request.scope).reach(body.model)
    tokens = await asyncio.to_thread(_tokens, body, service)
    if body.content is not None:
        pieces: list[Any] = [{"id": token, "piece": service.token_texts.text(token)} for token in tokens]
        return JSONResponse({"tokens": pieces if body.with_pieces else tokens})
    found = {"count": len(tokens), "max_model_len": service.engine.capacity, "tokens": tokens}
    texts = {"token_strs": [service.token_texts.label(token) for token in tokens]} if body.return_token_strs else {}
    return JSONResponse(found | texts)


def _tokens(body: TokenizeRequest, service: Service) -> list[int]:
    if body.messages is not None:
        messages = list(body.messages)
        if body.continue_final_message:
            messages[-1] = messages[-1].model_copy(update={"prefix": True})
        chat: dict[str, Any] = {"tools": body.tools, "chat_template_kwargs": body.chat_template_kwargs}
        return service.preparer.prompt(ChatRequest(messages=messages, **chat)).ids
    text = body.prompt if body.prompt is not None else body.content or ""
    tokenizer = service.tokenizer
    starts = body.add_special if body.content is not None else body.add_special_tokens is not False
    start = [tokenizer.bos] if starts and tokenizer.adds_bos else []
    return start + (tokenizer.encode_marked(text) if body.parse_special else tokenizer.encode(text))


async def detokenize(request: Request) -> Response:
    """The text of tokens; special tokens by their names."""
    body = await read(request, DetokenizeRequest)
    service = await service_of(request.scope).reach(body.model)
    engine = service.engine
    vocab = engine.vocab_size if isinstance(engine, UpstreamEngine) else engine.model_config.vocab_size
    for i, token in enumerate(body.tokens):
        if token >= vocab:
            raise bad(f"tokens[{i}]: not a token id in 0..{vocab - 1}", f"tokens[{i}]")
    text = await asyncio.to_thread(service.tokenizer.decode, body.tokens, False)
    return JSONResponse({"prompt": text, "content": text})
