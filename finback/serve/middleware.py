"""Middleware for every request: authentication, origin, quotas; and one log line. Does not import torch."""

import hashlib
import hmac
import ipaddress
import math
import re
import secrets
import time
from collections import Counter
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from typing import TYPE_CHECKING
from urllib.parse import urlsplit

from starlette.requests import ClientDisconnect
from starlette.responses import Response
from starlette.types import ASGIApp, Message, Receive, Scope, Send

from finback.serve import page
from finback.serve.errors import ApiError, bad, log, log_failure
from finback.serve.metrics import Metrics
from finback.serve.options import LOOPBACK, ListenOptions, ServeOptions

if TYPE_CHECKING:
    from finback.serve.upstream import ServedEngine

OPEN = frozenset({"/health"})  # the only path without a key, besides the page's own if it is on
# headers allowed for other origins, unless they ask for specific ones
ALLOWED = b"authorization, content-type, x-api-key"
_NAMES = re.compile(rb"[A-Za-z0-9_-]+(, *[A-Za-z0-9_-]+){0,63}")  # header names
GONE = 499  # nginx's status for a client that disconnected before the answer


class AccessMiddleware:
    """Outermost ASGI middleware: a request that passes has an owner and a bounded body."""

    def __init__(self, app: ASGIApp, options: ListenOptions, metrics: Metrics) -> None:
        self.app, self.options, self.metrics = app, options, metrics
        self.hosts = {name.lower() for name in (*LOOPBACK, options.host, *options.hosts)}

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Checks, counts and logs a request; every failure gets a response."""
        if scope["type"] == "lifespan":
            await self.app(scope, receive, send)
            return
        if scope["type"] != "http":
            await send({"type": "websocket.close", "code": 1008})
            return
        began, status, received, sent = time.perf_counter(), 0, 0, 0
        ident = f"req-{secrets.token_hex(8)}"

        async def count_in() -> Message:
            nonlocal received
            message = await receive()
            received += len(message.get("body", b""))
            if received > self.options.body:
                raise self._too_large()
            return message

        async def count_out(message: Message) -> None:
            nonlocal status, sent
            if message["type"] == "http.response.start":
                status = message["status"]
                message["headers"] = [*message.get("headers", []), *self._headers(scope, ident)]
            sent += len(message.get("body", b""))
            await send(message)

        try:
            self._check(scope)
            # permissions were checked for the path as sent; from here a trailing slash makes no difference
            scope["path"] = scope["path"].rstrip("/") or "/"
            app = Response(status_code=204) if self._is_preflight(scope) else self.app
            await app(scope, count_in, count_out)
        except ClientDisconnect:  # while sending its request
            pass
        except Exception as error:  # nothing may escape
            refusal = error if isinstance(error, ApiError) else ApiError(500, "the server failed")
            if refusal is not error:
                log_failure(ident, error)
            if not status:
                await refusal.response(scope["path"])(scope, receive, count_out)
        finally:
            route, status = getattr(scope.get("route"), "path", "other"), status or GONE
            self.metrics.requests[route, status] += 1
            line = f"{ident} {scope['method']} {route} {status} in={received} out={sent}"
            log.info("%s %.3fs", line, time.perf_counter() - began)

    def _check(self, scope: Scope) -> None:
        headers: list[tuple[bytes, bytes]] = scope["headers"]
        if sum(len(name) + len(value) for name, value in headers) > self.options.headers:
            raise ApiError(431, f"headers of more than {self.options.headers} bytes")
        by_name = dict(headers)
        if scope["path"].startswith(("http://", "https://")):  # absolute form, as sent to a proxy
            parts = urlsplit(scope["path"])
            self._check_host(parts.netloc)
            scope["path"] = parts.path or "/"
        self._check_host(by_name.get(b"host", b"").decode("latin-1"))
        origin = by_name.get(b"origin")
        if origin is not None:
            self._check_origin(origin.decode("latin-1"), by_name.get(b"host", b"").decode("latin-1"))
        owner = owner_of(headers, self.options.keys)
        is_open = scope["path"] in OPEN or (self.options.page and page.is_public(scope["path"]))
        if owner is None and not is_open and not self._is_preflight(scope):
            raise ApiError(401, "the API key is missing or wrong: send Authorization: Bearer KEY")
        scope.setdefault("state", {})["owner"] = owner or b""
        if by_name.get(b"content-encoding", b"identity").strip().lower() not in (b"", b"identity"):
            raise ApiError(415, "compressed bodies are not supported; send the body without Content-Encoding")
        length = by_name.get(b"content-length", b"0")
        if not length.isdigit() or len(length) > 18 or int(length) > self.options.body:
            raise self._too_large()

    def _check_host(self, host: str) -> None:
        """Refuses unknown host names: a foreign name that resolves here would share the server's origin (DNS rebinding)."""
        try:
            name = (urlsplit(f"//{host}").hostname or "").lower()
        except ValueError:
            name = ""
        if name in self.hosts or "*" in self.hosts:
            return
        # a server on a network may be reached by addresses it does not know; an address cannot be rebound
        if name and self.options.host not in LOOPBACK and _is_address(name):
            return
        raise ApiError(403, "this Host is not one of the server's; allow it with --allow-host", code="host_not_allowed")

    def _check_origin(self, origin: str, host: str) -> None:
        if origin in self.options.origins or "*" in self.options.origins:
            return
        scheme, _, rest = origin.partition("://")
        if scheme not in ("http", "https") or rest.lower() != host.lower():
            problem = "pages of this Origin are not allowed; allow it with --allow-origin"
            raise ApiError(403, problem, code="origin_not_allowed")

    def _is_preflight(self, scope: Scope) -> bool:
        """Whether a browser asks if a page of another, configured origin may send the request."""
        names = {name for name, _ in scope["headers"]}
        asks = scope["method"] == "OPTIONS" and b"access-control-request-method" in names
        return asks and bool(self.options.origins)

    def _headers(self, scope: Scope, ident: str) -> list[tuple[bytes, bytes]]:
        found = [(name, ident.encode()) for name in (b"x-request-id", b"request-id")]
        found.append((b"x-content-type-options", b"nosniff"))
        by_name = dict(scope["headers"])
        origin, asked = by_name.get(b"origin"), by_name.get(b"access-control-request-headers", b"")
        allowed = self.options.origins
        if origin is not None and (origin.decode("latin-1") in allowed or "*" in allowed):
            found += [
                (b"access-control-allow-origin", origin),
                (b"vary", b"origin"),
                (b"access-control-allow-headers", asked if _NAMES.fullmatch(asked) else ALLOWED),
                (b"access-control-allow-methods", b"GET, POST, DELETE"),
                (b"access-control-expose-headers", b"request-id, x-request-id, retry-after, finback-note"),
                (b"access-control-max-age", b"600"),
            ]
        return found

    def _too_large(self) -> ApiError:
        return ApiError(413, f"a body of more than {self.options.body} bytes")


def _is_address(name: str) -> bool:
    try:
        ipaddress.ip_address(name.partition("%")[0])
    except ValueError:
        return False
    return True


def owner_of(headers: Iterable[tuple[bytes, bytes]], keys: tuple[bytes, ...]) -> bytes | None:
    """The digest of a request's key, b"" if none is needed, None if it is missing or wrong."""
    if not keys:
        return b""
    given = b""
    for name, value in headers:
        if name == b"authorization" and value[:7].lower() == b"bearer ":
            given = value[7:].strip()
        elif name == b"x-api-key" and not given:
            given = value.strip()
    digest, found = hashlib.sha256(given).digest(), None
    for key in keys:  # compare with all, for constant time
        if hmac.compare_digest(digest, key):
            found = key
    return found


def salt(owner: bytes, user: str | None) -> bytes:
    """Separates the prompt cache of each key, and of each end user of a key; b"" without either."""
    if not owner and not user:
        return b""
    return hashlib.sha256(owner + b"\0" + (user or "").encode()).digest()


class Quota:
    """Limits for each key: `rate` requests per minute, `concurrent` at a time; 0: unlimited."""

    def __init__(self, rate: int, concurrent: int) -> None:
        self.rate, self.concurrent = rate, concurrent
        self._running: Counter[bytes] = Counter()
        self._bucket: dict[bytes, tuple[float, float]] = {}  # requests left, and the time of that count

    @contextmanager
    def use(self, owner: bytes) -> Iterator[None]:
        """Counts a request while it runs; ApiError 429 if it exceeds the limit."""
        if self.concurrent and self._running[owner] >= self.concurrent:
            raise ApiError(429, f"more than {self.concurrent} requests at a time", code="concurrency_limit_exceeded")
        if self.rate:
            self._take(owner)
        self._running[owner] += 1
        try:
            yield
        finally:
            self._running[owner] -= 1

    def _take(self, owner: bytes) -> None:
        now = time.monotonic()
        left, then = self._bucket.get(owner, (float(self.rate), now))
        left = min(self.rate, left + (now - then) * self.rate / 60)
        if left < 1:
            wait = int((1 - left) * 60 / self.rate) + 1
            raise ApiError(429, f"more than {self.rate} requests a minute", retry_after=wait)
        self._bucket[owner] = (left - 1, now)


class Admission:
    """Limits the choices of one model: those that run, and up to `options.queue` that wait."""

    def __init__(self, engine: "ServedEngine", options: ServeOptions, quota: Quota) -> None:
        self.engine, self.quota = engine, quota
        self.room = math.inf if options.queue is None else engine.config.rows + options.queue
        # choices beyond this could never all be admitted
        self.most_choices = int(min(options.choices, self.room))
        # number of admitted choices and requests
        self.choices = self.requests = 0
        # monotonic time since which the server is draining
        self.draining: float | None = None

    @property
    def queued(self) -> int:
        """Number of choices that wait for the engine."""
        return max(0, self.choices - self.engine.running)

    def is_full(self, choices: int = 1) -> bool:
        """Whether this many more choices exceed the limit."""
        return self.choices + choices > self.room

    def refuse_if_busy(self, choices: int = 1) -> None:
        """ApiError 503 if nothing more can be admitted; cheap, so that overload is refused at once."""
        if self.draining is not None:
            raise ApiError(503, "the server is shutting down", code="shutting_down", retry_after=5)
        if self.is_full(choices):
            raise ApiError(503, f"{self.queued} answers are waiting already", retry_after=2)

    @contextmanager
    def admitted(self, owner: bytes, choices: int) -> Iterator[None]:
        """Reserves capacity for a request's choices; ApiError 429 or 503 if there is none."""
        if choices > self.most_choices:
            raise bad(f"{choices} choices (prompts x n), more than the {self.most_choices} allowed", "n")
        self.refuse_if_busy(choices)
        with self.quota.use(owner):
            self.choices += choices
            self.requests += 1
            try:
                yield
            finally:
                self.choices -= choices
                self.requests -= 1
