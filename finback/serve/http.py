"""The network side of both servers: application, uvicorn's settings, socket, and API keys as digests. Does not import torch."""

import asyncio
import errno
import functools
import hashlib
import logging
import os
import re
import resource
import socket
import ssl
from collections.abc import Iterable, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any, TypeVar

import h11
import uvicorn
from starlette.applications import Starlette
from starlette.middleware import Middleware
from starlette.requests import Request
from starlette.responses import JSONResponse, Response
from starlette.routing import Route
from uvicorn.protocols.http.h11_impl import H11Protocol

from finback.config import UserError
from finback.serve.errors import HANDLERS, bad
from finback.serve.metrics import Metrics
from finback.serve.middleware import AccessMiddleware
from finback.serve.options import LOOPBACK, ListenOptions

Listen = TypeVar("Listen", bound=ListenOptions)

SHORTEST = 16  # minimum length of a key; 128 bits in hexadecimal are 32 characters
GRACE = 5  # seconds for the last bytes after every answer has ended


def application(routes: Sequence[Route], options: ListenOptions, metrics: Metrics, lifespan: Any = None) -> Starlette:
    """The ASGI application with these routes and /health, wrapped in the middleware."""
    access = Middleware(AccessMiddleware, options=options, metrics=metrics)
    app = Starlette(
        routes=[Route("/health", health), *routes], middleware=[access], exception_handlers=HANDLERS, lifespan=lifespan
    )
    app.router.redirect_slashes = False  # a redirect would lose the body
    return app


async def health(request: Request) -> Response:
    """Liveness: answers as long as the process does."""
    return JSONResponse({"status": "ok"})


def configuration(app: Starlette, options: ListenOptions) -> uvicorn.Config:
    """uvicorn's configuration; its own logs are off."""
    quiet: dict[str, Any] = {"log_config": None, "log_level": "warning", "access_log": False, "server_header": False}
    if options.ssl_certfile is not None:
        quiet |= {
            "ssl_certfile": str(options.ssl_certfile),
            "ssl_keyfile": options.ssl_keyfile and str(options.ssl_keyfile),
        }
    protocol = type("Protocol", (HttpProtocol,), {"patience": (options.head_timeout, options.body_timeout)})
    return uvicorn.Config(app, http=protocol, ws="none", lifespan="on", timeout_graceful_shutdown=GRACE, **quiet)


class Seldom(logging.Filter):
    """Lets one error with a traceback through per second, so that an error in a loop does not fill the disk."""

    _last = float("-inf")

    def filter(self, record: logging.LogRecord) -> bool:
        if record.exc_info is None:
            return True
        is_first = record.created - self._last >= 1
        self._last = record.created if is_first else self._last
        return is_first


class HttpProtocol(H11Protocol):
    """uvicorn's protocol, with its own error reply in our form, and timeouts for incomplete requests.

    A connection with a half-sent request would stay open forever, and a thousand of them would exhaust the server.
    """

    # seconds for the headers, and for a pause in the body
    patience = (10.0, 30.0)
    _timer: asyncio.TimerHandle | None = None

    def connection_made(self, transport: Any) -> None:  # uvicorn annotates it with its own class
        """Closes a connection beyond the limit before it costs anything."""
        super().connection_made(transport)
        if len(self.connections) > most_connections():
            transport.abort()
        self._watch()

    def data_received(self, data: bytes) -> None:
        is_head = self._waits_for_head
        super().data_received(data)
        if not (is_head and self._waits_for_head):  # the timeout of headers covers them as a whole
            self._watch()

    def on_response_complete(self) -> None:
        """Begins to watch the pause before the next request."""
        super().on_response_complete()
        self._watch()

    def connection_lost(self, exc: Exception | None) -> None:
        super().connection_lost(exc)
        self._unwatch()

    @property
    def _waits_for_head(self) -> bool:
        return self.conn.their_state is h11.IDLE

    def _watch(self) -> None:
        """Starts the timeout if part of the request is missing."""
        self._unwatch()
        head, body = self.patience
        wait = head if self._waits_for_head else body if self.conn.their_state is h11.SEND_BODY else None
        if wait is not None:
            self._timer = self.loop.call_later(wait, self._give_up)

    def _unwatch(self) -> None:
        if self._timer is not None:
            self._timer.cancel()
            self._timer = None

    def _give_up(self) -> None:
        # if the application has begun to read, it sees a closed connection
        if not self.transport.is_closing():
            self.transport.abort()

    def send_400_response(self, msg: str) -> None:
        """Replies to a request that is not HTTP, and closes the connection."""
        content = bad(msg, code="invalid_http").response().body
        head = (
            "HTTP/1.1 400 Bad Request\r\ncontent-type: application/json\r\nx-should-retry: false\r\n"
            f"connection: close\r\ncontent-length: {len(content)}\r\n\r\n"
        )
        self.transport.write(head.encode() + bytes(content))
        self.transport.close()


def listen_as(options: ListenOptions) -> socket.socket:
    """The socket that the options describe."""
    return listen(options.host, options.port) if options.uds is None else listen_at(options.uds)


def listen(host: str, port: int) -> socket.socket:
    """A socket at an address; UserError if it is in use or not an address of this machine."""
    try:
        family, _, _, _, address = socket.getaddrinfo(host, port, type=socket.SOCK_STREAM)[0]
        return socket.create_server(address[:2], family=family, backlog=1024)  # type: ignore[arg-type]
    except (OSError, OverflowError) as error:
        raise UserError(
            "host:port", f"{host}:{port}", str(error), "Use another address, or stop the program that uses it."
        ) from None


def listen_at(path: Path) -> socket.socket:
    """A Unix socket that only this user may open; replaces one that nobody listens on."""
    listener = socket.socket(socket.AF_UNIX)
    try:
        if path.is_socket():
            with socket.socket(socket.AF_UNIX) as probe:
                if probe.connect_ex(str(path)) == errno.ECONNREFUSED:
                    path.unlink()
        before = os.umask(0o177)
        try:
            listener.bind(str(path))
        finally:
            os.umask(before)
        listener.listen(1024)
    except OSError as error:
        listener.close()
        raise UserError("--uds", str(path), error.strerror or str(error), "Use another path.") from None
    return listener


@functools.cache
def most_connections() -> int:
    """Number of connections that fit into the process's limit of open files."""
    soft, _ = resource.getrlimit(resource.RLIMIT_NOFILE)
    return max(16, soft * 3 // 4)


def url(listener: socket.socket, options: ListenOptions) -> str:
    """The URL of a socket."""
    if listener.family == socket.AF_UNIX:
        return f"http+unix://{listener.getsockname()}"
    host, port = listener.getsockname()[:2]
    return f"http{'s' if options.ssl_certfile else ''}://{f'[{host}]' if ':' in host else host}:{port}"


def digests(keys: Iterable[str], file: Path | None = None) -> tuple[bytes, ...]:
    """SHA-256 of each given key and of each line of a file (# starts a comment); the keys themselves are not stored.

    A line may also be `sha256:` and the hexadecimal digest, so that the file need not contain the key.
    """
    found = [key.strip() for key in keys]
    if file is not None:
        try:
            lines = file.read_text(encoding="utf-8").splitlines()
        except (OSError, UnicodeDecodeError) as error:
            raise UserError(
                "keys", str(file), f"cannot be read ({error})", "Give a text file with one key per line."
            ) from None
        found += [line.strip() for line in lines if line.strip() and not line.startswith("#")]
    for key in found:
        if len(key) < SHORTEST:
            remedy = 'Make one: python -c "import secrets; print(secrets.token_urlsafe(32))".'
            raise UserError("keys", f"{len(key)} characters", "too short to be safe", remedy)
    return tuple(map(_digest, found))


def _digest(key: str) -> bytes:
    met = re.fullmatch("sha256:([0-9a-fA-F]{64})", key)
    return bytes.fromhex(met[1]) if met else hashlib.sha256(key.encode()).digest()


def secured(options: Listen) -> Listen:
    """The options with digests of all keys; refuses to open an unprotected server to the network by mistake.

    Also raises UserError for a certificate that cannot be used.
    """
    if options.ssl_certfile is not None:
        try:
            context = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
            context.load_cert_chain(options.ssl_certfile, options.ssl_keyfile, lambda: "")
        except OSError as error:  # also for a key with a password, which nobody could type
            problem = f"cannot be used ({error.strerror or error})"
            remedy = "Give a PEM file with the chain, and --ssl-keyfile with its key, without a password."
            raise UserError("--ssl-certfile", str(options.ssl_certfile), problem, remedy) from None
    keys = (*options.keys, *digests([options.api_key] if options.api_key else [], options.key_file))
    if options.uds is None and options.host not in LOOPBACK and not keys and not options.insecure:
        remedy = "Give --key-file or FINBACK_API_KEY, or --insecure if anyone may use it."
        raise UserError("host", options.host, "open to the network, with no API key", remedy)
    return replace(options, keys=keys, api_key="", key_file=None)
