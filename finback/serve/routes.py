"""The paths of the server, and what each does."""

import asyncio
import secrets
from collections.abc import Awaitable, Callable
from typing import Any, TypeVar

from pydantic import BaseModel, ValidationError
from starlette.requests import Request
from starlette.responses import JSONResponse, PlainTextResponse, Response
from starlette.routing import Route
from starlette.types import Receive, Scope, Send

from finback.serve import auth, body, metrics, openapi
from finback.serve.answer import Answer
from finback.serve.errors import ApiError, from_pydantic
from finback.serve.job import SEEDS
from finback.serve.protocol import ChatRequest, CompletionRequest, ControlRequest
from finback.serve.service import Running, Service

PREFIXES = ("/v1", "", "/beta")  # OpenAI's, and DeepSeek's two
SSE = [
    (b"content-type", b"text/event-stream; charset=utf-8"),
    (b"cache-control", b"no-cache"),
    (b"x-accel-buffering", b"no"),  # nginx would hold the stream back
]

Model = TypeVar("Model", bound=BaseModel)


def routes() -> list[Route]:
    """All of them; every one but /health needs a key."""
    found = [
        Route("/health", health), Route("/ready", ready), Route("/metrics", show_metrics),
        Route("/openapi.json", show_openapi),
    ]  # fmt: skip
    for prefix in PREFIXES:
        found += [
            Route(f"{prefix}/models", models),
            Route(f"{prefix}/models/{{name:path}}", model),
            Route(f"{prefix}/chat/completions", Generate(ChatRequest), methods=["POST"]),
            Route(f"{prefix}/chat/completions/{{id}}/control", control, methods=["POST"]),
            Route(f"{prefix}/completions", Generate(CompletionRequest), methods=["POST"]),
        ]
    return found


class Generate:
    """The endpoint of chat and of text completions; `form` is the kind of request it takes."""

    def __init__(self, form: type[ChatRequest] | type[CompletionRequest]) -> None:
        self.form = form

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Answer one request; whatever way it ends, nothing of it stays in the engine."""
        service, owner = _service(scope), scope["state"]["owner"]
        service.refuse_if_busy()
        asked = await _read(Request(scope, receive), self.form)
        service.check_model(asked.model)
        prompts = len(asked.prompts) if isinstance(asked, CompletionRequest) else 1
        with service.admitted(owner, prompts * (asked.n or 1)):
            await _unless_gone(receive, self._answer(service, owner, asked, send))

    async def _answer(
        self, service: Service, owner: bytes, asked: ChatRequest | CompletionRequest, send: Send
    ) -> None:  # fmt: skip
        seed = secrets.randbelow(SEEDS) if asked.seed is None else asked.seed % SEEDS
        # templates and long texts take their time; others should not wait for it
        if isinstance(asked, ChatRequest):
            job = await asyncio.to_thread(service.jobs.chat, asked, seed)
        else:
            job = await asyncio.to_thread(service.jobs.completion, asked, seed)
        await service.schemas.check(job)
        ticket = await service.worker.submit(job.orders, auth.salt(owner, asked.user_id))
        answer = Answer(service, job, ticket, isinstance(asked, ChatRequest))
        service.running[answer.id] = Running(owner, ticket)
        try:
            if asked.stream:
                include = bool(asked.stream_options and asked.stream_options.include_usage)
                await _stream(answer, include, send)
            else:
                await JSONResponse(await answer.whole())({"type": "http"}, _nothing, send)
        finally:
            del service.running[answer.id]
            service.worker.cancel(ticket)


async def control(request: Request) -> Response:
    """Close the chains of thought of a running request, for the key that has sent it."""
    service, asked = _service(request.scope), await _read(request, ControlRequest)
    ident = request.path_params["id"]
    running = service.running.get(ident)
    if running is None or running.owner != request.state.owner:
        raise ApiError(404, f"no running request {ident!r}", "id")
    service.worker.answer_now(running.ticket)
    return JSONResponse({"id": ident, "object": "chat.completion.control", "action": asked.action})


async def models(request: Request) -> Response:
    """The model, under each of its names."""
    service = _service(request.scope)
    return JSONResponse({"object": "list", "data": [_model(service, name) for name in service.names]})


async def model(request: Request) -> Response:
    """The model under one name."""
    service, name = _service(request.scope), request.path_params["name"]
    service.check_model(name)
    return JSONResponse(_model(service, name))


async def health(request: Request) -> Response:
    """The process is there."""
    return JSONResponse({"status": "ok"})


async def ready(request: Request) -> Response:
    """Requests are being answered."""
    problem = _service(request.scope).why_not_ready()
    if problem is not None:
        raise ApiError(503, problem, code="not_ready")
    return JSONResponse({"status": "ready"})


async def show_metrics(request: Request) -> Response:
    """Counters for Prometheus."""
    service = _service(request.scope)
    return PlainTextResponse(service.metrics.text(service.gauges()), media_type=metrics.CONTENT_TYPE)


async def show_openapi(request: Request) -> Response:
    """This interface, for programs."""
    return JSONResponse(openapi.document())


def _service(scope: Scope) -> Service:
    found: Service = scope["app"].state.service
    return found


def _model(service: Service, name: str) -> dict[str, Any]:
    return {
        "id": name, "object": "model", "created": service.created, "owned_by": "finback",
        "max_model_len": service.window,
    }  # fmt: skip


async def _read(request: Request, form: type[Model]) -> Model:
    raw = await request.body()
    read: Callable[[], Model] = lambda: form.model_validate(body.parse(raw))  # noqa: E731
    try:
        # a short body is read sooner than a thread is found
        return read() if len(raw) < 1 << 16 else await asyncio.to_thread(read)
    except ValidationError as error:
        raise from_pydantic(error) from None


async def _stream(answer: Answer, include_usage: bool, send: Send) -> None:
    await send({"type": "http.response.start", "status": 200, "headers": list(SSE)})
    async for event in answer.events(include_usage):
        await send({"type": "http.response.body", "body": event, "more_body": True})
    await send({"type": "http.response.body", "body": b""})


async def _unless_gone(receive: Receive, work: Awaitable[None]) -> None:
    """Do the work, but stop when the client leaves."""

    async def left() -> None:
        while (await receive())["type"] != "http.disconnect":
            pass

    tasks = asyncio.ensure_future(work), asyncio.create_task(left())
    try:
        await asyncio.wait(tasks, return_when=asyncio.FIRST_COMPLETED)
        if tasks[0].done():
            tasks[0].result()
    finally:
        for task in tasks:
            task.cancel()
        await asyncio.gather(*tasks, return_exceptions=True)


async def _nothing() -> Any:
    raise AssertionError("a JSON reply reads nothing")
