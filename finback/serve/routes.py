"""The paths of the server, and what each does."""

from typing import Any

from starlette.requests import Request
from starlette.responses import JSONResponse, PlainTextResponse, Response
from starlette.routing import Route
from starlette.types import Receive, Scope, Send

from finback.serve import metrics, openapi
from finback.serve.completions import Completions
from finback.serve.errors import ApiError, bad
from finback.serve.protocol import ChatRequest, CompletionRequest, ControlRequest, read
from finback.serve.resumable import until_disconnect
from finback.serve.service import Service, service_of

PREFIXES = ("/v1", "", "/beta")  # OpenAI's, and DeepSeek's two


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
            Route(f"{prefix}/chat/completions", Completions(ChatRequest), methods=["POST"]),
            Route(f"{prefix}/chat/completions/{{id}}/control", control, methods=["POST"]),
            Route(f"{prefix}/chat/completions/{{id}}/stream", Resume(), methods=["GET"]),
            Route(f"{prefix}/completions", Completions(CompletionRequest), methods=["POST"]),
        ]
    return found


class Resume:
    """The endpoint that goes on with a resumable stream, behind the last event that its reader has."""

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Send the rest, for the key that sent the request; ApiError 404 where there is no such stream any more."""
        request = Request(scope, receive)
        ident = request.path_params["id"]
        stream = service_of(scope).streams.get(ident)
        if stream is None or stream.owner != scope["state"]["owner"]:
            raise ApiError(404, f"no answer {ident!r} is stored", "id")
        text = request.query_params.get("after") or request.headers.get("last-event-id") or "0"
        if not (text.isascii() and text.isdigit() and len(text) < 16):
            raise bad("not the number of an event", "after")
        await until_disconnect(receive, stream.serve(int(text), send))


async def control(request: Request) -> Response:
    """Close the chains of thought of an active request, or end it, for the key that has sent it."""
    service, body = service_of(request.scope), await read(request, ControlRequest)
    ident = request.path_params["id"]
    service = next((each for each in service.all if ident in each.active), service)
    active = service.active.get(ident)
    if active is None or active.owner != request.state.owner:
        raise ApiError(404, f"no running request {ident!r}", "id")
    if body.action == "answer_now":
        service.worker.answer_now(active.outputs)
    else:
        active.outputs.fail(ApiError(409, "it was stopped", code="stopped"))
    return JSONResponse({"id": ident, "object": "chat.completion.control", "action": body.action})


async def models(request: Request) -> Response:
    """The models, each under each of its names."""
    served = service_of(request.scope).all
    listed = [_model(service, name) for service in served for name in service.names]
    return JSONResponse({"object": "list", "data": listed})


async def model(request: Request) -> Response:
    """The model under one name."""
    name = request.path_params["name"]
    return JSONResponse(_model(service_of(request.scope).named(name), name))


async def health(request: Request) -> Response:
    """The process is there."""
    return JSONResponse({"status": "ok"})


async def ready(request: Request) -> Response:
    """Requests are being answered."""
    problem = service_of(request.scope).why_not_ready()
    if problem is not None:
        raise ApiError(503, problem, code="not_ready")
    return JSONResponse({"status": "ready"})


async def show_metrics(request: Request) -> Response:
    """Counters for Prometheus."""
    service = service_of(request.scope)
    return PlainTextResponse(service.metrics.text(service.gauges()), media_type=metrics.CONTENT_TYPE)


async def show_openapi(request: Request) -> Response:
    """This interface, for programs."""
    return JSONResponse(openapi.document())


def _model(service: Service, name: str) -> dict[str, Any]:
    return {
        "id": name,
        "object": "model",
        "created": service.created,
        "owned_by": "finback",
        "max_model_len": service.window,
    }
