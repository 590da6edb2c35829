"""Putting the server together, running it, and letting it end well."""

import dataclasses
import logging
import os
import socket
import sys
from collections.abc import AsyncIterator, Iterable, Mapping
from concurrent.futures import ThreadPoolExecutor
from contextlib import asynccontextmanager
from pathlib import Path
from types import FrameType

import uvicorn
from starlette.applications import Starlette
from starlette.middleware import Middleware
from uvicorn.protocols.http.h11_impl import H11Protocol

from finback.checkpoint import model as models
from finback.checkpoint.model import Answering
from finback.config import UserError
from finback.data.tokenizer import ASSISTANT, USER, Tokenizer
from finback.engine.engine import Engine, affordable
from finback.model.transformer import Transformer
from finback.serve import auth
from finback.serve.errors import HANDLERS, bad
from finback.serve.middleware import AccessMiddleware
from finback.serve.options import Options
from finback.serve.page import Page
from finback.serve.routes import routes
from finback.serve.service import Service
from finback.serve.watch import Planned, Watch

GRACE = 5.0  # seconds for the last bytes, once every answer has ended


def build(
    engine: Engine,
    tokenizer: Tokenizer,
    options: Options,
    beside: Mapping[str, tuple[Engine, Tokenizer]] | None = None,
    planned: Planned | None = None,
) -> Starlette:
    """The ASGI application; the engines run between its startup and its shutdown. `beside` are more models by name.

    `planned` says what a run of the page was planned to take.
    """
    service = Service(engine, tokenizer, options)
    for name, (other, words) in (beside or {}).items():
        Service(other, words, dataclasses.replace(options, name=name, aliases=()), first=service)

    @asynccontextmanager
    async def lifespan(app: Starlette) -> AsyncIterator[None]:
        for each in service.all:
            each.worker.start()
        yield
        for held in service.held.values():
            held.stop()
        for each in service.all:
            await each.schemas.close()
            each.worker.close()

    gate = Middleware(AccessMiddleware, options=options, metrics=service.metrics)
    shown = [*Page().routes(chat=True), *Watch(options.runs, planned).routes()] if options.page else []
    app = Starlette(routes=[*routes(), *shown], middleware=[gate], exception_handlers=HANDLERS, lifespan=lifespan)
    app.router.redirect_slashes = False  # a redirect would lose the body
    app.state.service = service
    return app


def run(
    model: Path,
    *,
    host: str = "127.0.0.1",
    port: int = 8000,
    name: str | None = None,
    aliases: Iterable[str] = (),
    keys: Iterable[str] = (),
    key_file: Path | None = None,
    insecure: bool = False,
    hosts: Iterable[str] = (),
    origins: Iterable[str] = (),
    reasoning_field: str = "both",
    rows: int = 32,
    tokens: int | None = None,
    chunk: int = 256,
    dtype: Answering = "auto",
    reuse: bool = True,
    speculate: bool = True,
    queue: int = 64,
    rate: int = 0,
    concurrent: int = 0,
    drain: float = 30.0,
    keep_alive: float = 15.0,
    also: Mapping[str, Path] | None = None,
    page: bool = True,
    runs: Path = Path("runs"),
    planned: Planned | None = None,
) -> None:
    """Serve the model in a folder until a signal ends it, and those in `also` under the names they have there.

    `rows` answers are made at a time, on a cache of `tokens` (None: what memory allows), and `queue` more may wait.
    """
    options = Options(
        name=name or model.resolve().name,
        aliases=tuple(aliases),
        host=host,
        port=port,
        keys=auth.digests(keys, key_file),
        hosts=tuple(hosts),
        origins=tuple(origins),
        reasoning_field=reasoning_field,
        queue=queue,
        rate=rate,
        concurrent=concurrent,
        drain=drain,
        keep_alive=keep_alive,
        page=page,
        runs=runs,
    )
    auth.demand_safety(options, insecure)
    listener = _listen(host, port)  # before the model is read: a port that is taken shows at once
    # Not in this thread: torch would keep threads for it as long as it lives, and OpenMP, which then counts more threads
    # than cores, lets the engine's sleep after every product. Measured: 45 instead of 29 ms a step.
    with ThreadPoolExecutor(1) as reader:
        engine, tokenizer = reader.submit(load, model, rows, tokens, chunk, reuse, speculate, dtype).result()
        beside = {
            other: reader.submit(load, path, rows, tokens, chunk, reuse, speculate, dtype).result()
            for other, path in (also or {}).items()
        }
    serve(build(engine, tokenizer, options, beside, planned), listener)


def load(
    model: Path, rows: int, tokens: int | None, chunk: int, reuse: bool, speculate: bool, dtype: Answering = "auto"
) -> tuple[Engine, Tokenizer]:
    """The engine and the tokenizer of the model in a folder."""
    tokenizer = Tokenizer(model)
    # a mark of a new turn ends this one; a small model sometimes goes on with the next
    turns = [] if tokenizer.template else [n for t in (USER, ASSISTANT) if (n := tokenizer.ids.get(t)) is not None]
    transformer = models.load_to_answer(model, dtype)
    room = tokens or _affordable(transformer, rows)
    engine = Engine(
        transformer,
        (*tokenizer.stops, *turns),
        rows,
        tokenizer=tokenizer,
        tokens=room,
        chunk=chunk,
        reuse=reuse,
        speculate=speculate,
    )
    return engine, tokenizer


def serve(app: Starlette, listener: socket.socket) -> None:
    """Answer on a socket until a signal comes; returns when running requests have ended or had their time."""
    service: Service = app.state.service
    _log_to_stderr()
    where = listener.getsockname()
    shown = f"[{where[0]}]" if ":" in where[0] else where[0]
    names = ", ".join(each.options.name for each in service.all)
    print(f"serving {names} at http://{shown}:{where[1]}/v1", file=sys.stderr, flush=True)
    if service.options.page:
        print(f"the page is at http://{shown}:{where[1]}/", file=sys.stderr, flush=True)
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
        if self.service.draining is not None:
            os._exit(128 + sig)
        self.service.drain()

    async def on_tick(self, counter: int) -> bool:
        """Ten times a second: leave once drained."""
        self.should_exit = self.should_exit or self.service.drained()
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


def _listen(host: str, port: int) -> socket.socket:
    try:
        family, _, _, _, address = socket.getaddrinfo(host, port, type=socket.SOCK_STREAM)[0]
        return socket.create_server(address[:2], family=family, backlog=1024)  # type: ignore[arg-type]
    except (OSError, OverflowError) as error:
        raise UserError("host:port", f"{host}:{port}", str(error), "Name another, or end what uses it.") from None


def _affordable(model: Transformer, rows: int) -> int:
    """Tokens of cache for `rows` full windows, or what a quarter of the free memory holds."""
    return max(1024, min(rows * model.config.max_position_embeddings, affordable(model, 4)))


def _log_to_stderr() -> None:
    handler = logging.StreamHandler()
    handler.setFormatter(logging.Formatter("%(asctime)s %(levelname)s %(message)s"))
    for name, level in (("finback.serve", logging.INFO), ("uvicorn", logging.WARNING)):
        logger = logging.getLogger(name)
        logger.setLevel(level)
        logger.handlers, logger.propagate = [handler], False
