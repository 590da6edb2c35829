"""How both servers stand on the network: application, uvicorn's settings, socket, and API keys as digests. No torch here."""

import hashlib
import re
import socket
from collections.abc import Iterable, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any, TypeVar

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

SHORTEST = 16  # characters; 128 bits in hexadecimal are 32
GRACE = 5  # seconds for the last bytes, once every answer has ended


def application(routes: Sequence[Route], options: ListenOptions, metrics: Metrics, lifespan: Any = None) -> Starlette:
    """The ASGI application of these routes and /health, behind the middleware."""
    access = Middleware(AccessMiddleware, options=options, metrics=metrics)
    app = Starlette(
        routes=[Route("/health", health), *routes], middleware=[access], exception_handlers=HANDLERS, lifespan=lifespan
    )
    app.router.redirect_slashes = False  # a redirect would lose the body
    return app


async def health(request: Request) -> Response:
    return JSONResponse({"status": "ok"})


def configuration(app: Starlette) -> uvicorn.Config:
    """How uvicorn runs the application; ours is the only log."""
    quiet: dict[str, Any] = {"log_config": None, "log_level": "warning", "access_log": False, "server_header": False}
    return uvicorn.Config(app, http=HttpProtocol, ws="none", lifespan="on", timeout_graceful_shutdown=GRACE, **quiet)


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


def listen(host: str, port: int) -> socket.socket:
    """A socket at an address; UserError when it is taken or no address of this machine."""
    try:
        family, _, _, _, address = socket.getaddrinfo(host, port, type=socket.SOCK_STREAM)[0]
        return socket.create_server(address[:2], family=family, backlog=1024)  # type: ignore[arg-type]
    except (OSError, OverflowError) as error:
        raise UserError("host:port", f"{host}:{port}", str(error), "Name another, or end what uses it.") from None


def url(listener: socket.socket) -> str:
    """Where a socket is reached by HTTP."""
    host, port = listener.getsockname()[:2]
    return f"http://{f'[{host}]' if ':' in host else host}:{port}"


def digests(keys: Iterable[str], file: Path | None = None) -> tuple[bytes, ...]:
    """SHA-256 of each key given and of each line of a file (# begins a comment); the keys themselves are not stored.

    A line may also be `sha256:` and the digest in hexadecimal, so that the file need not hold the key.
    """
    found = [key.strip() for key in keys]
    if file is not None:
        try:
            lines = file.read_text(encoding="utf-8").splitlines()
        except (OSError, UnicodeDecodeError) as error:
            raise UserError("keys", str(file), f"cannot be read ({error})", "Name a text file, a key a line.") from None
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
    """The options with the digests of all keys; refuses to stand open on a network by mistake."""
    keys = (*options.keys, *digests([options.api_key] if options.api_key else [], options.key_file))
    if options.host not in LOOPBACK and not keys and not options.insecure:
        remedy = "Give --key-file or FINBACK_API_KEY, or --insecure if anybody may use it."
        raise UserError("host", options.host, "open to the network, with no API key", remedy)
    return replace(options, keys=keys, api_key="", key_file=None)
