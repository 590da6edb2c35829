"""What every request passes first: who asks, from where, how much; and the one line that is logged of it."""

import ipaddress
import logging
import secrets
import time
import traceback
from urllib.parse import urlsplit

from starlette.requests import ClientDisconnect
from starlette.types import ASGIApp, Message, Receive, Scope, Send

from finback.serve import auth, page
from finback.serve.errors import ApiError
from finback.serve.metrics import Metrics
from finback.serve.options import LOOPBACK, ListenOptions

log = logging.getLogger("finback.serve")

OPEN = frozenset({"/health"})  # the only paths that need no key; beside the page's, where it is on
GONE = 499  # nginx's number for a client that left before the answer


class AccessMiddleware:
    """ASGI middleware around everything: a request that it lets through has an owner and a bounded body."""

    def __init__(self, app: ASGIApp, options: ListenOptions, metrics: Metrics) -> None:
        self.app, self.options, self.metrics = app, options, metrics
        self.hosts = {name.lower() for name in (*LOOPBACK, options.host, *options.hosts)}

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Check, count, log, and keep a failure from leaving without an answer."""
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
            await self._enter(scope, count_in, count_out)
        except ClientDisconnect:  # in the middle of its request
            pass
        except Exception as error:  # the last line: no message is logged, it may quote what somebody wrote
            trace = "".join(traceback.format_tb(error.__traceback__))
            log.error("%s failed: %s\n%s", ident, type(error).__name__, trace)
            if not status:
                await ApiError(500, "the server failed").response(scope, receive, count_out)
        finally:
            route = getattr(scope.get("route"), "path", "other")
            self.metrics.requests[route, status or GONE] += 1
            log.info(
                "%s %s %s %d in=%d out=%d %.3fs",
                ident,
                scope["method"],
                route,
                status or GONE,
                received,
                sent,
                time.perf_counter() - began,
            )

    async def _enter(self, scope: Scope, receive: Receive, send: Send) -> None:
        try:
            self._check(scope)
        except ApiError as error:
            await error.response(scope, receive, send)
            return
        if self._is_preflight(scope):
            await send({"type": "http.response.start", "status": 204, "headers": []})
            await send({"type": "http.response.body", "body": b""})
            return
        await self.app(scope, receive, send)

    def _check(self, scope: Scope) -> None:
        headers: list[tuple[bytes, bytes]] = scope["headers"]
        if sum(len(name) + len(value) for name, value in headers) > self.options.headers:
            raise ApiError(431, f"headers of more than {self.options.headers} bytes")
        by_name = dict(headers)
        self._check_host(by_name.get(b"host", b"").decode("latin-1"))
        origin = by_name.get(b"origin")
        if origin is not None:
            self._check_origin(origin.decode("latin-1"), by_name.get(b"host", b"").decode("latin-1"))
        owner = auth.owner_of(headers, self.options.keys)
        if owner is None and not self._is_open(scope["path"]) and not self._is_preflight(scope):
            raise ApiError(401, "the API key is missing or wrong: send Authorization: Bearer KEY")
        scope.setdefault("state", {})["owner"] = owner or b""
        length = by_name.get(b"content-length", b"0")
        if not length.isdigit() or len(length) > 18 or int(length) > self.options.body:
            raise self._too_large()

    def _is_open(self, path: str) -> bool:
        return path in OPEN or (self.options.page and page.is_public(path))

    def _check_host(self, host: str) -> None:
        """Another name that leads here would let a stranger's page talk to the server as if it were its own."""
        try:
            name = (urlsplit(f"//{host}").hostname or "").lower()
        except ValueError:
            name = ""
        if name in self.hosts or "*" in self.hosts:
            return
        # a server on a network is reached by addresses it does not know of; an address cannot be rebound
        if name and self.options.host not in LOOPBACK and _is_address(name):
            return
        raise ApiError(403, "this Host is not one of the server's; allow it with --allow-host", code="host_not_allowed")

    def _check_origin(self, origin: str, host: str) -> None:
        if origin in self.options.origins or "*" in self.options.origins:
            return
        scheme, _, rest = origin.partition("://")
        if scheme not in ("http", "https") or rest.lower() != host.lower():
            raise ApiError(
                403, "pages of this Origin may not ask; allow it with --allow-origin", code="origin_not_allowed"
            )

    def _is_preflight(self, scope: Scope) -> bool:
        """A browser's question whether a page of another, configured, origin may ask."""
        names = {name for name, _ in scope["headers"]}
        asks = scope["method"] == "OPTIONS" and b"access-control-request-method" in names
        return asks and bool(self.options.origins)

    def _headers(self, scope: Scope, ident: str) -> list[tuple[bytes, bytes]]:
        found = [(b"x-request-id", ident.encode()), (b"x-content-type-options", b"nosniff")]
        origin = dict(scope["headers"]).get(b"origin")
        allowed = self.options.origins
        if origin is not None and (origin.decode("latin-1") in allowed or "*" in allowed):
            found += [
                (b"access-control-allow-origin", origin),
                (b"vary", b"origin"),
                (b"access-control-allow-headers", b"authorization, content-type, x-api-key"),
                (b"access-control-allow-methods", b"GET, POST"),
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
