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
from finback.serve.answer import CompletionResponse
from finback.serve.errors import ApiError, bad, from_pydantic
from finback.serve.prepare import SEEDS
from finback.serve.protocol import ChatRequest, CompletionRequest, ControlRequest
from finback.serve.resumable import SSE, ResumableStream
from finback.serve.service import ActiveRequest, Service

PREFIXES = ("/v1", "", "/beta")  # OpenAI's, and DeepSeek's two

Model = TypeVar("Model", bound=BaseModel)


def routes() -> list[Route]:
    """All of them; every one but /health needs a key."""
    found = [
        Route("/health", health),
        Route("/ready", ready),
        Route("/metrics", show_metrics),
        Route("/openapi.json", show_openapi),
    ]
    for prefix in PREFIXES:
        found += [
            Route(f"{prefix}/models", models),
            Route(f"{prefix}/models/{{name:path}}", model),
            Route(f"{prefix}/chat/completions", Generate(ChatRequest), methods=["POST"]),
            Route(f"{prefix}/chat/completions/{{id}}/control", control, methods=["POST"]),
            Route(f"{prefix}/chat/completions/{{id}}/stream", Resume(), methods=["GET"]),
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
        if all(each.is_full() for each in service.all) or service.draining is not None:
            service.refuse_if_busy()
        asked = await _read(Request(scope, receive), self.form)
        service = service.named(asked.model)
        prompts = len(asked.prompts) if isinstance(asked, CompletionRequest) else 1
        choices = prompts * (asked.n or 1)
        if isinstance(asked, ChatRequest) and asked.is_resumable:
            await self._hold(service, owner, asked, choices, receive, send)
            return
        with service.admitted(owner, choices):
            await _unless_gone(receive, self._answer(service, owner, asked, send))

    async def _hold(
        self, service: Service, owner: bytes, asked: ChatRequest, choices: int, receive: Receive, send: Send
    ) -> None:
        """Answer in a task of its own, which outlives this connection."""
        held = ResumableStream(owner, service.options)

        async def work() -> None:
            with service.admitted(owner, choices):
                await self._answer(service, owner, asked, held)

        held.run(work())
        await _unless_gone(receive, held.serve(0, send))

    async def _answer(
        self, service: Service, owner: bytes, asked: ChatRequest | CompletionRequest, to: Send | ResumableStream
    ) -> None:
        seed = secrets.randbelow(SEEDS) if asked.seed is None else asked.seed % SEEDS
        # templates and long texts take their time; others should not wait for it
        if isinstance(asked, ChatRequest):
            job = await asyncio.to_thread(service.jobs.chat, asked, seed)
        else:
            job = await asyncio.to_thread(service.jobs.completion, asked, seed)
        await service.schemas.check(job)
        ticket = await service.worker.submit(job.orders, auth.salt(owner, asked.user_id))
        answer = CompletionResponse(service, job, ticket, isinstance(asked, ChatRequest))
        service.running[answer.id] = ActiveRequest(owner, ticket)
        include = bool(asked.stream_options and asked.stream_options.include_usage)
        try:
            if isinstance(to, ResumableStream):
                service.hold(answer.id, to, ticket)
                async for event in answer.events(include):
                    to.put(event)
            elif asked.stream:
                await _stream(answer, include, to)
            else:
                await JSONResponse(await answer.whole())({"type": "http"}, _nothing, to)
        finally:
            del service.running[answer.id]
            service.worker.cancel(ticket)


class Resume:
    """The endpoint at which a resumable answer is read on, behind the event that its reader had last."""

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Send the rest, for the key that has asked; ApiError 404 where it is no longer kept."""
        request = Request(scope, receive)
        ident = request.path_params["id"]
        held = _service(scope).held.get(ident)
        if held is None or held.owner != scope["state"]["owner"]:
            raise ApiError(404, f"no answer {ident!r} is kept", "id")
        text = request.query_params.get("after") or request.headers.get("last-event-id") or "0"
        if not (text.isascii() and text.isdigit() and len(text) < 16):
            raise bad("not the number of an event", "after")
        await _unless_gone(receive, held.serve(int(text), send))


async def control(request: Request) -> Response:
    """Close the chains of thought of a running request, or end it, for the key that has sent it."""
    service, asked = _service(request.scope), await _read(request, ControlRequest)
    ident = request.path_params["id"]
    holder = next((each for each in service.all if ident in each.running), service)
    running = holder.running.get(ident)
    if running is None or running.owner != request.state.owner:
        raise ApiError(404, f"no running request {ident!r}", "id")
    if asked.action == "answer_now":
        holder.worker.answer_now(running.ticket)
    else:
        running.ticket.fail(ApiError(409, "it was stopped", code="stopped"))
    return JSONResponse({"id": ident, "object": "chat.completion.control", "action": asked.action})


async def models(request: Request) -> Response:
    """The models, each under each of its names."""
    served = _service(request.scope).all
    listed = [_model(service, name) for service in served for name in service.names]
    return JSONResponse({"object": "list", "data": listed})


async def model(request: Request) -> Response:
    """The model under one name."""
    name = request.path_params["name"]
    return JSONResponse(_model(_service(request.scope).named(name), name))


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
        "id": name,
        "object": "model",
        "created": service.created,
        "owned_by": "finback",
        "max_model_len": service.window,
    }


async def _read(request: Request, form: type[Model]) -> Model:
    raw = await request.body()
    read: Callable[[], Model] = lambda: form.model_validate(body.parse(raw))  # noqa: E731
    try:
        # a short body is read sooner than a thread is found
        return read() if len(raw) < 1 << 16 else await asyncio.to_thread(read)
    except ValidationError as error:
        raise from_pydantic(error) from None


async def _stream(answer: CompletionResponse, include_usage: bool, send: Send) -> None:
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
