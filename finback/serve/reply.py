"""From the body of an HTTP request to the last event of its answer, independent of their format.

A request passes middleware -> Generation -> protocol, or a translation to it -> prepare -> data/messages -> worker ->
engine/engine -> scheduler -> runner -> model/transformer -> sampler, and returns through worker -> Reply.
"""

import asyncio
import json
import secrets
import time
from abc import ABC, abstractmethod
from collections.abc import AsyncIterator, Callable, Sequence
from dataclasses import dataclass
from typing import Any

from pydantic import BaseModel
from starlette.requests import Request
from starlette.responses import JSONResponse
from starlette.types import Receive, Scope, Send

from finback.serve.body import read
from finback.serve.errors import ApiError, bad, log_failure
from finback.serve.middleware import salt
from finback.serve.prepare import SEEDS, PreparedRequest
from finback.serve.protocol import ChatRequest, CompletionRequest
from finback.serve.resumable import KEEP_ALIVE, SSE, ResumableStream, until_disconnect
from finback.serve.service import Service, service_of
from finback.serve.worker import OutputDelta, OutputStream

NOTE = b"finback-note"  # response header for what was left out of a request


class Reply(ABC):
    """The answer to one request; subclasses implement the formats."""

    # sent in a stream that would otherwise be silent for too long
    alive = KEEP_ALIVE

    def __init__(self, service: Service, prepared: PreparedRequest, outputs: OutputStream, ident: str) -> None:
        self.service, self.prepared, self.outputs, self.id = service, prepared, outputs, ident
        self.created = int(time.time())

    @property
    @abstractmethod
    def is_finished(self) -> bool:
        """Whether everything has been generated."""

    def begin(self) -> bytes:
        """The events before anything is generated."""
        return b""

    @abstractmethod
    def take(self, deltas: Sequence[tuple[int, OutputDelta]]) -> bytes:
        """The events for these outputs, each with the index of its choice."""

    @abstractmethod
    def end(self) -> bytes:
        """The events after everything has been generated."""

    @abstractmethod
    def content(self) -> dict[str, Any]:
        """The complete answer as one object."""

    def failed(self, error: ApiError) -> bytes:
        """The event for a failure; the headers have already been sent."""
        return event(error.body)

    async def whole(self) -> dict[str, Any]:
        """Waits for the answer and returns it as one object."""
        while not self.is_finished:
            self.take(await self._next())
        return self.content()

    async def events(self) -> AsyncIterator[bytes]:
        """The answer as server-sent events; errors are events too."""
        try:
            if start := self.begin():
                yield start
            sent = time.monotonic()
            while not self.is_finished:
                try:
                    async with asyncio.timeout(sent + self.service.options.keep_alive - time.monotonic()):
                        chunks = self.take(await self._next())
                except TimeoutError:
                    chunks = self.alive
                if chunks:
                    yield chunks
                    sent = time.monotonic()
            yield self.end()
        except ApiError as error:
            yield self.failed(error)
        except Exception as error:  # a stream must not end without an error event
            log_failure(self.id, error)
            yield self.failed(ApiError(500, "the server failed"))

    async def _next(self) -> list[tuple[int, OutputDelta]]:
        found = await self.outputs.next()
        for index, delta in found:
            request, name = self.outputs.requests[index], self.service.options.name
            self.service.metrics.observe(request, delta.new, delta.gap, delta.finish, name)
            if delta.finish == "error" and request.problem:
                raise ApiError(500, request.problem)
            if delta.finish == "error":
                grammar = self.prepared.grammar
                problem = "no token of the model can continue this answer according to its schema or grammar"
                raise bad(problem, grammar.param if grammar else None, "grammar_dead_end")
        return found


@dataclass(frozen=True)
class Dialect:
    """A format of requests and answers."""

    form: type[BaseModel]
    # converts the request to chat or text completions; ApiError for what is not supported
    translated: Callable[[Any, Service, bytes], ChatRequest | CompletionRequest]
    # creates the answer to the original request
    reply: Callable[[Any, Service, PreparedRequest, OutputStream], Reply]


class Generation:
    """The endpoint of one dialect."""

    def __init__(self, dialect: Dialect) -> None:
        self.dialect = dialect

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Answers one request; the engine drops it in the end, even after an error."""
        service, owner = service_of(scope), scope["state"]["owner"]
        service.refuse_if_all_busy()
        body: Any = await read(Request(scope, receive), self.dialect.form)
        service = await service.reach(body.model)
        request = self.dialect.translated(body, service, owner)
        prompts = len(request.prompts) if isinstance(request, CompletionRequest) else 1
        choices = prompts * (request.n or 1)
        is_resumable = bool(request.stream and request.stream_options and request.stream_options.resumable)
        if is_resumable and isinstance(request, ChatRequest):
            stream = ResumableStream(owner, service.options)

            async def detached() -> None:
                with service.admission.admitted(owner, choices):
                    await self._respond(service, owner, body, request, stream)

            stream.run(detached())  # in a separate task, which outlives this connection
            await until_disconnect(receive, stream.serve(0, send))
            return
        with service.admission.admitted(owner, choices):
            await until_disconnect(receive, self._respond(service, owner, body, request, send))

    async def _respond(
        self,
        service: Service,
        owner: bytes,
        body: Any,
        request: ChatRequest | CompletionRequest,
        to: Send | ResumableStream,
    ) -> None:
        seed = secrets.randbelow(SEEDS) if request.seed is None else request.seed % SEEDS
        # templates and long texts take time; do not block the event loop
        prepared = await asyncio.to_thread(service.preparer.prepare, request, seed)
        if prepared.is_constrained:
            await service.schemas.check(prepared)
        outputs = await service.worker.submit(prepared.choices, owner, salt(owner, request.user_id))
        reply = self.dialect.reply(body, service, prepared, outputs)
        service.active[reply.id] = outputs
        try:
            if isinstance(to, ResumableStream):
                service.store(reply.id, to, outputs)
                async for events in reply.events():
                    to.put(events)
            elif request.stream:
                headers = [*SSE, *_note(prepared)]
                await to({"type": "http.response.start", "status": 200, "headers": headers})
                async for events in reply.events():
                    await to({"type": "http.response.body", "body": events, "more_body": True})
                await to({"type": "http.response.body", "body": b""})
            else:
                response = JSONResponse(await reply.whole())
                response.raw_headers += _note(prepared)
                await response({"type": "http"}, _no_body, to)
        finally:
            del service.active[reply.id]
            service.worker.cancel(outputs)


def event(content: dict[str, Any], name: str = "") -> bytes:
    """One server-sent event."""
    head = f"event: {name}\n".encode() if name else b""
    return head + b"data: " + json.dumps(content, ensure_ascii=False, separators=(",", ":")).encode() + b"\n\n"


def _note(prepared: PreparedRequest) -> list[tuple[bytes, bytes]]:
    text = " ".join("; ".join(prepared.notes).split())
    return [(NOTE, text.encode("ascii", "replace"))] if text else []


async def _no_body() -> Any:
    raise AssertionError("a JSON response reads nothing")
