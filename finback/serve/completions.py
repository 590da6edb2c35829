"""The endpoint of chat and of text completions: from the body of an HTTP request to the last event of its response.

A chat request passes middleware -> completions -> protocol -> prepare -> data/messages -> worker -> engine/engine ->
scheduler -> runner -> model/transformer -> sampler, and comes back by worker -> chat_output -> completions.
"""

import asyncio
import json
import secrets
import time
from collections.abc import AsyncIterator
from typing import Any

from starlette.requests import Request
from starlette.responses import JSONResponse
from starlette.types import Receive, Scope, Send

from finback.engine.request import Request as EngineRequest
from finback.engine.request import TokenLogprobs
from finback.serve.chat_output import ChatChoice
from finback.serve.errors import ApiError, log_failure
from finback.serve.logprobs import TokenTexts
from finback.serve.metrics import timings, usage
from finback.serve.middleware import salt
from finback.serve.prepare import SEEDS, PreparedRequest
from finback.serve.protocol import ChatRequest, CompletionRequest, read
from finback.serve.resumable import KEEP_ALIVE, SSE, ResumableStream, until_disconnect
from finback.serve.service import Service, service_of
from finback.serve.worker import OutputDelta, OutputStream

DONE = b"data: [DONE]\n\n"


class Completions:
    """The endpoint itself; `form` is the kind of request it takes."""

    def __init__(self, form: type[ChatRequest] | type[CompletionRequest]) -> None:
        self.form = form

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Answer one request; however it ends, the engine keeps nothing of it."""
        service, owner = service_of(scope), scope["state"]["owner"]
        service.refuse_if_all_busy()
        body = await read(Request(scope, receive), self.form)
        service = service.named(body.model)
        prompts = len(body.prompts) if isinstance(body, CompletionRequest) else 1
        choices = prompts * (body.n or 1)
        if isinstance(body, ChatRequest) and body.stream and body.stream_options and body.stream_options.resumable:
            stream = ResumableStream(owner, service.options)

            async def detached() -> None:
                with service.admission.admitted(owner, choices):
                    await self._respond(service, owner, body, stream)

            stream.run(detached())  # in a task of its own, which outlives this connection
            await until_disconnect(receive, stream.serve(0, send))
            return
        with service.admission.admitted(owner, choices):
            await until_disconnect(receive, self._respond(service, owner, body, send))

    async def _respond(
        self, service: Service, owner: bytes, body: ChatRequest | CompletionRequest, to: Send | ResumableStream
    ) -> None:
        seed = secrets.randbelow(SEEDS) if body.seed is None else body.seed % SEEDS
        # templates and long texts take their time; others should not wait for it
        prepared = await asyncio.to_thread(service.preparer.prepare, body, seed)
        if prepared.is_constrained:
            await service.schemas.check(prepared)
        outputs = await service.worker.submit(prepared.choices, owner, salt(owner, body.user_id))
        response = CompletionResponse(service, prepared, outputs, isinstance(body, ChatRequest))
        service.active[response.id] = outputs
        include_usage = bool(body.stream_options and body.stream_options.include_usage)
        try:
            if isinstance(to, ResumableStream):
                service.store(response.id, to, outputs)
                async for events in response.events(include_usage):
                    to.put(events)
            elif body.stream:
                await to({"type": "http.response.start", "status": 200, "headers": list(SSE)})
                async for events in response.events(include_usage):
                    await to({"type": "http.response.body", "body": events, "more_body": True})
                await to({"type": "http.response.body", "body": b""})
            else:
                await JSONResponse(await response.whole())({"type": "http"}, _no_body, to)
        finally:
            del service.active[response.id]
            service.worker.cancel(outputs)


class CompletionResponse:
    """The response to one request, in OpenAI's envelope of chat or of text completions."""

    def __init__(self, service: Service, prepared: PreparedRequest, outputs: OutputStream, is_chat: bool) -> None:
        self.service, self.prepared, self.outputs, self.is_chat = service, prepared, outputs, is_chat
        self.id = ("chatcmpl-" if is_chat else "cmpl-") + secrets.token_hex(12)
        self.created = int(time.time())
        texts = service.token_texts if prepared.logprobs else None
        self.choices: list[ChatChoice | TextChoice] = [
            ChatChoice(i, request, prepared.parser(), service.options.reasoning, texts)
            if is_chat
            else TextChoice(i, request, prepared.echo[i] if prepared.echo else None, texts)
            for i, request in enumerate(outputs.requests)
        ]

    @property
    def is_finished(self) -> bool:
        return all(choice.finish is not None for choice in self.choices)

    async def whole(self) -> dict[str, Any]:
        """The response as one object, once all of it is generated."""
        while not self.is_finished:
            await self._next()
        cost = {"usage": usage(self.outputs.requests), "timings": timings(self.outputs.requests)}
        choices = [choice.whole() for choice in self.choices]
        return self._envelope("chat.completion") | {"choices": choices} | cost

    async def events(self, include_usage: bool) -> AsyncIterator[bytes]:
        """The response as server-sent events; an error is one of them, since the headers are out by then."""
        try:
            if starts := [choice.start() for choice in self.choices if isinstance(choice, ChatChoice)]:
                yield b"".join(self._chunk([delta], include_usage) for delta in starts)
            sent = time.monotonic()
            while not self.is_finished:
                try:
                    async with asyncio.timeout(sent + self.service.options.keep_alive - time.monotonic()):
                        deltas = await self._next()
                except TimeoutError:
                    chunks = KEEP_ALIVE
                else:
                    chunks = b"".join(self._chunk([d], include_usage, d is deltas[-1]) for d in deltas)
                if chunks:
                    yield chunks
                    sent = time.monotonic()
            if include_usage:
                final = {"choices": [], "usage": usage(self.outputs.requests)}
                yield _event(self._envelope("chat.completion.chunk") | final)
            yield DONE
        except ApiError as error:
            yield _event(error.body)
        except Exception as error:  # a stream never ends without a word
            log_failure(self.id, error)
            yield _event(ApiError(500, "the server failed").body)

    async def _next(self) -> list[dict[str, Any]]:
        """The choices of the next chunks."""
        found = []
        for index, delta in await self.outputs.next():
            self.service.metrics.observe(self.outputs.requests[index], delta.new, delta.gap, delta.finish)
            found += self.choices[index].take(delta)
        return found

    def _envelope(self, kind: str) -> dict[str, Any]:
        return {
            "id": self.id,
            "object": kind if self.is_chat else "text_completion",
            "created": self.created,
            "model": self.service.options.name,
            "system_fingerprint": f"finback-{self.service.created}",
        }

    def _chunk(self, choices: list[dict[str, Any]], include_usage: bool, newest: bool = False) -> bytes:
        """One event; `newest`: nothing later is known, so it may be the last."""
        chunk = self._envelope("chat.completion.chunk") | {"choices": choices}
        if include_usage:
            chunk["usage"] = None
        if newest and self.is_finished:
            chunk["timings"] = timings(self.outputs.requests)
        return _event(chunk)


class TextChoice:
    """One choice of a text completion; `echo` is the text of a prompt that its text begins with."""

    def __init__(self, index: int, request: EngineRequest, echo: str | None, texts: TokenTexts | None) -> None:
        self.index, self.request, self.echo, self.texts = index, request, echo, texts
        self.finish: str | None = None
        self._chunks: list[dict[str, Any]] = []
        self._tokens = 0  # whose log-probabilities are sent
        self._characters = 0  # where the next token begins in the text

    def take(self, delta: OutputDelta) -> list[dict[str, Any]]:
        """The choices of the chunks that this output makes."""
        text, logprobs = delta.text, None
        is_echo = not self._chunks and self.echo is not None
        if is_echo:
            text = f"{self.echo}{text}"
        if not text and delta.finish is None:
            return []
        if self.texts is not None:
            tokens = self.request.tokens[self._tokens : delta.tokens]
            found: list[TokenLogprobs | None] = [*self.request.top_logprobs[self._tokens : delta.tokens]]
            if is_echo:  # the first token has nothing before it that could predict it
                tokens, found = [*self.request.prompt, *tokens], [None, *self.request.prompt_logprobs, *found]
            logprobs, self._characters = self.texts.table(tokens, found, self._characters)
            self._tokens = delta.tokens
        self.finish = delta.finish
        self._chunks.append({"index": self.index, "text": text, "logprobs": logprobs, "finish_reason": delta.finish})
        return self._chunks[-1:]

    def whole(self) -> dict[str, Any]:
        """The choice of a response that is not streamed."""
        tables = [chunk["logprobs"] for chunk in self._chunks if chunk["logprobs"]]
        logprobs = {name: [x for t in tables for x in t[name]] for name in tables[0]} if tables else None
        text = "".join(chunk["text"] for chunk in self._chunks)
        return {"index": self.index, "text": text, "logprobs": logprobs, "finish_reason": self.finish}


def _event(content: dict[str, Any]) -> bytes:
    return b"data: " + json.dumps(content, ensure_ascii=False, separators=(",", ":")).encode() + b"\n\n"


async def _no_body() -> Any:
    raise AssertionError("a JSON response reads nothing")
