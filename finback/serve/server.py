"""Builds the server, runs it, and drains it at the end."""

import dataclasses
import logging
import os
import socket
import sys
from collections.abc import AsyncIterator, Mapping
from concurrent.futures import ThreadPoolExecutor
from contextlib import asynccontextmanager
from types import FrameType

import uvicorn
from starlette.applications import Starlette
from starlette.middleware import Middleware
from uvicorn.protocols.http.h11_impl import H11Protocol

from finback.data.tokenizer import Tokenizer
from finback.engine.engine import Engine, EngineConfig
from finback.engine.open import open_engine
from finback.serve import auth
from finback.serve.errors import HANDLERS, bad
from finback.serve.middleware import AccessMiddleware
from finback.serve.options import ServeOptions
from finback.serve.page import Page
from finback.serve.routes import routes
from finback.serve.service import Service
from finback.serve.watch import Planned, Watch, listen, url

GRACE = 5.0  # seconds for the last bytes, once every answer has ended


def build(
    engine: Engine,
    tokenizer: Tokenizer,
    options: ServeOptions,
    others: Mapping[str, tuple[Engine, Tokenizer]] | None = None,
    planned: Planned | None = None,
) -> Starlette:
    """The ASGI application; the engines run between its startup and its shutdown. `others` are more models by name.

    `planned` says what a run of the page was planned to take.
    """
    service = Service(engine, tokenizer, options)
    for name, (its_engine, its_tokenizer) in (others or {}).items():
        Service(its_engine, its_tokenizer, dataclasses.replace(options, name=name, aliases=(), also=()), first=service)

    @asynccontextmanager
    async def lifespan(app: Starlette) -> AsyncIterator[None]:
        for each in service.all:
            each.worker.start()
        yield
        for stream in service.streams.values():
            stream.stop()
        for each in service.all:
            await each.schemas.close()
            each.worker.close()

    access = Middleware(AccessMiddleware, options=options, metrics=service.metrics)
    shown = [*Page().routes(chat=True), *Watch(options.runs, planned).routes()] if options.page else []
    app = Starlette(routes=[*routes(), *shown], middleware=[access], exception_handlers=HANDLERS, lifespan=lifespan)
    app.router.redirect_slashes = False  # a redirect would lose the body
    app.state.service = service
    return app


def run(options: ServeOptions, planned: Planned | None = None) -> None:
    """Serve the models that the options name until a signal ends it."""
    o = auth.secured(options)
    listener = listen(o.host, o.port)  # before the model is read: a port that is taken shows at once
    # Not in this thread: torch keeps threads for each that has used it, and OpenMP, which then counts more threads
    # than cores, lets the engine's sleep after every product. Measured: 45 instead of 29 ms a step.
    config = EngineConfig(o.rows, o.tokens, o.chunk, o.reuse, o.speculate)
    with ThreadPoolExecutor(1) as reader:
        engine, tokenizer = reader.submit(open_engine, o.model, o.dtype, config).result()
        others = {name: reader.submit(open_engine, path, o.dtype, config).result() for name, path in o.others.items()}
    serve(build(engine, tokenizer, o, others, planned), listener)


def serve(app: Starlette, listener: socket.socket) -> None:
    """Answer on a socket until a signal comes; returns when running requests have ended or had their time."""
    service: Service = app.state.service
    _log_to_stderr()
    names = ", ".join(each.options.name for each in service.all)
    print(f"serving {names} at {url(listener)}/v1", file=sys.stderr, flush=True)
    if service.options.page:
        print(f"the page is at {url(listener)}/", file=sys.stderr, flush=True)
    Server(service, configuration(app)).run(sockets=[listener])


def configuration(app: Starlette) -> uvicorn.Config:
    """How uvicorn runs the application; ours is the only log."""
    return uvicorn.Config(
        app,
        http=HttpProtocol,
        ws="none",
        lifespan="on",
        log_config=None,
        log_level="warning",
        access_log=False,
        server_header=False,
        timeout_graceful_shutdown=int(GRACE),
        backlog=1024,
    )


class Server(uvicorn.Server):
    """uvicorn, but it goes on answering (with 503) while running requests end."""

    def __init__(self, service: Service, config: uvicorn.Config) -> None:
        super().__init__(config)
        self.service = service

    def handle_exit(self, sig: int, frame: FrameType | None) -> None:
        """The first signal drains, the second ends the process on the spot."""
        if self.service.admission.draining is not None:
            os._exit(128 + sig)
        self.service.drain()

    async def on_tick(self, counter: int) -> bool:
        """Ten times a second: leave once drained."""
        self.should_exit = self.should_exit or self.service.is_drained()
        return await super().on_tick(counter)


class HttpProtocol(H11Protocol):
    """uvicorn's, with its one reply of its own in the shape of all others."""

    def send_400_response(self, msg: str) -> None:
        """Refuse what is not HTTP."""
        content = bad(msg, code="invalid_http").response.body
        head = (
            "HTTP/1.1 400 Bad Request\r\ncontent-type: application/json\r\nx-should-retry: false\r\n"
            f"connection: close\r\ncontent-length: {len(content)}\r\n\r\n"
        )
        self.transport.write(head.encode() + bytes(content))
        self.transport.close()


def _log_to_stderr() -> None:
    handler = logging.StreamHandler()
    handler.setFormatter(logging.Formatter("%(asctime)s %(levelname)s %(message)s"))
    for name, level in (("finback.serve", logging.INFO), ("uvicorn", logging.WARNING)):
        logger = logging.getLogger(name)
        logger.setLevel(level)
        logger.handlers, logger.propagate = [handler], False
