"""The server: its routes, how it is built and run, and how it shuts down."""

import asyncio
import dataclasses
import logging
import os
import socket
import sys
from collections.abc import AsyncIterator, Mapping
from concurrent.futures import ThreadPoolExecutor
from contextlib import asynccontextmanager
from datetime import UTC, datetime
from types import FrameType
from typing import Any

import uvicorn
from starlette.applications import Starlette
from starlette.requests import Request
from starlette.responses import JSONResponse, PlainTextResponse, Response
from starlette.routing import Route
from starlette.types import Receive, Scope, Send

from finback.data.tokenizer import THINK, Tokenizer
from finback.engine.engine import Engine, EngineConfig
from finback.engine.open import adapter_tokenizer, open_engine
from finback.kernels.formats import FORMATS
from finback.model.multi_lora import MultiLoraTransformer
from finback.serve import generate, metrics, openapi, programs, vllm_metrics, weights
from finback.serve.anthropic_reply import MESSAGES, count_tokens
from finback.serve.body import read
from finback.serve.completions import CHAT, TEXT
from finback.serve.errors import ApiError, bad
from finback.serve.http import Seldom, application, configuration, listen_as, secured, url
from finback.serve.models_folder import with_first
from finback.serve.options import ServeOptions
from finback.serve.page import Page
from finback.serve.protocol import ControlRequest
from finback.serve.reply import Generation
from finback.serve.responses_reply import RESPONSES, cancel, input_items, input_tokens, stored
from finback.serve.resumable import until_disconnect
from finback.serve.service import Service, service_of
from finback.serve.tokenizing import detokenize, tokenize
from finback.serve.upstream import ServedEngine
from finback.serve.watch import Planned, RunsApi

PREFIXES = ("/v1", "", "/beta")  # OpenAI's, and DeepSeek's two


def build(
    engine: ServedEngine,
    tokenizer: Tokenizer,
    options: ServeOptions,
    others: Mapping[str, tuple[Engine, Tokenizer]] | None = None,
    adapters: Mapping[str, Tokenizer] | None = None,
    planned: Planned | None = None,
) -> Starlette:
    """The ASGI application; engines run between its startup and shutdown. `others`: further models by name.

    `adapters`: tokenizers of the first model's adapters by name; the engine has the adapters. `planned` returns the planned costs of a run, for the page.
    """
    service = Service(engine, tokenizer, options)
    alone = dataclasses.replace(options, aliases=(), also=(), lora=())
    for name, its_tokenizer in (adapters or {}).items():
        Service(engine, its_tokenizer, dataclasses.replace(alone, name=name), service, adapter=name)
    for name, (its_engine, its_tokenizer) in (others or {}).items():
        Service(its_engine, its_tokenizer, dataclasses.replace(alone, name=name), service)

    @asynccontextmanager
    async def lifespan(app: Starlette) -> AsyncIterator[None]:
        for each in service.engines:
            each.worker.start()
        yield
        for stream in service.streams.values():
            stream.stop()
        for each in service.engines:
            await each.schemas.close()
            each.worker.close()

    shown = [*Page().routes(chat=True), *RunsApi(options.runs, planned).routes()] if options.page else []
    app = application([*routes(), *shown], options, service.metrics, lifespan)
    app.state.service = service
    return app


def run(options: ServeOptions, planned: Planned | None = None) -> None:
    """Serves the models that the options name until a signal ends it."""
    o = secured(with_first(options))
    assert o.model is not None, "a model is given, or is the first of the folder"
    listener = listen_as(o)  # before loading the model, so that a port in use fails at once
    if o.engine != "finback":
        with programs.opened(o) as (upstream, tokenizer):
            serve(build(upstream, tokenizer, o, planned=planned), listener)
        return
    # Load in another thread: torch keeps OpenMP threads for each thread that has used it. When there are more of them than
    # cores, OpenMP puts the engine's to sleep after every product. Measured: 45 instead of 29 ms per step.
    config = EngineConfig(o.rows, o.tokens, o.chunk, o.reuse, o.speculate, o.return_routed_experts, draft=o.draft)
    with ThreadPoolExecutor(1) as reader:
        engine, tokenizer = reader.submit(open_engine, o.model, o.dtype, config, o.adapters).result()
        adapters = {name: adapter_tokenizer(folder, tokenizer) for name, folder in o.adapters.items()}
        others = {name: reader.submit(open_engine, path, o.dtype, config).result() for name, path in o.others.items()}
    if isinstance(engine.model, MultiLoraTransformer):
        for name, form in engine.model.bases.items():
            if form in FORMATS:  # the adapter was trained to compensate the rounding of its base
                print(
                    f"warning: {name} was trained on a base in {form}; here the base is served unquantized, as its files store it",
                    file=sys.stderr,
                )
    serve(build(engine, tokenizer, o, others, adapters, planned), listener)


def serve(app: Starlette, listener: socket.socket) -> None:
    """Answers on a socket until a signal; returns when running requests have ended or timed out."""
    service: Service = app.state.service
    handler = logging.StreamHandler()
    handler.setFormatter(logging.Formatter("%(asctime)s %(levelname)s %(message)s"))
    handler.addFilter(Seldom())
    for name, level in (("finback.serve", logging.INFO), ("uvicorn", logging.WARNING), ("asyncio", logging.ERROR)):
        logger = logging.getLogger(name)
        logger.setLevel(level)
        logger.handlers, logger.propagate = [handler], False
    names = ", ".join(each.options.name for each in service.all)
    print(f"serving {names} at {url(listener, service.options)}/v1", file=sys.stderr, flush=True)
    if service.options.page:
        print(f"the page is at {url(listener, service.options)}/", file=sys.stderr, flush=True)
    Server(app).run(sockets=[listener])


class Server(uvicorn.Server):
    """uvicorn's server, but it keeps answering (with 503) while running requests end."""

    def __init__(self, app: Starlette) -> None:
        self.service: Service = app.state.service
        super().__init__(configuration(app, self.service.options))

    def handle_exit(self, sig: int, frame: FrameType | None) -> None:
        """The first signal drains, the second ends the process at once."""
        if self.service.admission.draining is not None:
            os._exit(128 + sig)
        self.service.drain()

    async def on_tick(self, counter: int) -> bool:
        """Called ten times a second: exits once drained."""
        self.should_exit = self.should_exit or self.service.is_drained()
        return await super().on_tick(counter)


def routes() -> list[Route]:
    """All routes but /health; each needs a key."""
    found = [Route("/ready", ready), Route("/metrics", show_metrics), Route("/openapi.json", show_openapi)]
    found += [*generate.routes(), *weights.routes()]
    for prefix in PREFIXES:
        found += [
            *messages(prefix),
            *responses(prefix),
            Route(f"{prefix}/tokenize", tokenize, methods=["POST"]),
            Route(f"{prefix}/detokenize", detokenize, methods=["POST"]),
            Route(f"{prefix}/models", models),
            Route(f"{prefix}/models/{{name:path}}", model),
            Route(f"{prefix}/chat/completions", Generation(CHAT), methods=["POST"]),
            Route(f"{prefix}/chat/completions/{{id}}/control", control, methods=["POST"]),
            Route(f"{prefix}/chat/completions/{{id}}/stream", Resume(), methods=["GET"]),
            Route(f"{prefix}/completions", Generation(TEXT), methods=["POST"]),
        ]
    return found + [route for prefix in ("/anthropic/v1", "/anthropic") for route in messages(prefix)]


def messages(prefix: str) -> list[Route]:
    """Anthropic's API; DeepSeek has it under /anthropic."""
    return [
        Route(f"{prefix}/messages", Generation(MESSAGES), methods=["POST"]),
        Route(f"{prefix}/messages/count_tokens", count_tokens, methods=["POST"]),
    ]


def responses(prefix: str) -> list[Route]:
    """OpenAI's newer API."""
    return [
        Route(f"{prefix}/responses", Generation(RESPONSES), methods=["POST"]),
        Route(f"{prefix}/responses/input_tokens", input_tokens, methods=["POST"]),
        Route(f"{prefix}/responses/{{id}}", stored, methods=["GET", "DELETE"]),
        Route(f"{prefix}/responses/{{id}}/cancel", cancel, methods=["POST"]),
        Route(f"{prefix}/responses/{{id}}/input_items", input_items, methods=["GET"]),
    ]


class Resume:
    """The endpoint that continues a resumable stream after the last event that its reader has."""

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Sends the rest, for the key that sent the request; ApiError 404 if there is no such stream any more."""
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
    """Closes the chains of thought of a running request, or stops it, for the key that sent it."""
    service, body = service_of(request.scope), await read(request, ControlRequest)
    ident = request.path_params["id"]
    service = next((each for each in service.all if ident in each.active), service)
    outputs = service.active.get(ident)
    if outputs is None or outputs.owner != request.state.owner:
        raise ApiError(404, f"no running request {ident!r}", "id")
    if body.action == "answer_now":
        service.worker.answer_now(outputs)
    else:
        outputs.fail(ApiError(409, "the request was stopped", code="stopped"))
    return JSONResponse({"id": ident, "object": "chat.completion.control", "action": body.action})


async def models(request: Request) -> Response:
    """The models, each under each of its names."""
    served = service_of(request.scope).all
    listed = [_model(service, name) for service in served for name in service.names]
    folder = served[0].folder
    if folder is not None:
        known = {each["id"] for each in listed}
        waiting = [name for name in await asyncio.to_thread(folder.paths) if name not in known]
        listed = [each | {"status": {"value": "loaded"}} for each in listed]
        listed += [
            {"id": name, "object": "model", **_named(name, served[0]), "status": {"value": "unloaded"}}
            for name in waiting
        ]
    ends = {"has_more": False, "first_id": listed[0]["id"], "last_id": listed[-1]["id"]}
    return JSONResponse({"object": "list", "data": listed, **ends})


async def model(request: Request) -> Response:
    """One model by any of its names."""
    name = request.path_params["name"]
    return JSONResponse(_model(service_of(request.scope).named(name), name))


async def ready(request: Request) -> Response:
    """Readiness; 503 with the reason if the server cannot answer."""
    problem = service_of(request.scope).why_not_ready()
    if problem is not None:
        raise ApiError(503, problem, code="not_ready")
    return JSONResponse({"status": "ready"})


async def show_metrics(request: Request) -> Response:
    """Metrics in Prometheus's text format."""
    service = service_of(request.scope)
    now = {each.options.name: each.vllm_gauges() for each in service.engines}
    text = service.metrics.text(service.gauges()) + vllm_metrics.text(service.metrics.models, now)
    return PlainTextResponse(text, media_type=metrics.CONTENT_TYPE)


async def show_openapi(request: Request) -> Response:
    """The OpenAPI description of all routes."""
    return JSONResponse(openapi.document())


def _model(service: Service, name: str) -> dict[str, Any]:
    base = {"parent": service.all[0].options.name} if service.adapter else {}
    can = {"max_model_len": service.engine.capacity, "thinking": THINK in service.tokenizer.ids}
    return {"id": name, "object": "model", **_named(name, service), **base, **can}


def _named(name: str, service: Service) -> dict[str, Any]:
    at = datetime.fromtimestamp(service.created, UTC).isoformat().replace("+00:00", "Z")
    anthropic = {"type": "model", "display_name": name, "created_at": at}
    return {"created": service.created, "owned_by": "finback", **anthropic}
