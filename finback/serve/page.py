"""The web page: its files, read once, and its content security policy. Does not import torch."""

import gzip
import hashlib
import posixpath
import re
from collections.abc import Awaitable, Callable, Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path

from starlette.requests import Request
from starlette.responses import Response
from starlette.routing import Route

from finback.serve.errors import ApiError

WEB = Path(__file__).with_name("web")
CHAT, RUNS, STATIC = "/", "/runs", "/web/"
TYPES = {
    ".html": "text/html; charset=utf-8",
    ".js": "text/javascript; charset=utf-8",
    ".css": "text/css; charset=utf-8",
    ".svg": "image/svg+xml",
    ".woff2": "font/woff2",
    ".json": "application/json",
    ".txt": "text/plain; charset=utf-8",
}
POLICY = (
    "default-src 'none'; script-src 'self'; style-src 'self'; connect-src 'self'; font-src 'self'; img-src 'self'; "
    "base-uri 'none'; form-action 'none'; frame-ancestors 'none'; "
    # text becomes HTML only through the sanitizer
    "require-trusted-types-for 'script'; trusted-types dompurify"
)
HEADERS = {
    "content-security-policy": POLICY,
    "referrer-policy": "no-referrer",
    "x-frame-options": "DENY",
    "cross-origin-opener-policy": "same-origin",
    "cross-origin-resource-policy": "same-origin",
    "permissions-policy": "camera=(), geolocation=(), microphone=(), payment=(), usb=()",
}
FOREVER = "public, max-age=31536000, immutable"
_ENTRY = re.compile(r'<script type="module" src="{{web}}/([^"]+)"')
_IMPORT = re.compile(r'from ?"(\.{1,2}/[^"]+)"')
LEAST = 1024  # smallest size worth compressing, in bytes


@dataclass(frozen=True)
class File:
    """The content sent for one path."""

    content: bytes
    packed: bytes | None
    media_type: str
    tag: str


class Page:
    """All files of the page in memory: a request cannot name any other. Their digest is part of their address."""

    def __init__(self, folder: Path = WEB) -> None:
        paths = sorted(p for p in folder.rglob("*") if p.is_file() and p.suffix in TYPES)
        raw = {p.relative_to(folder).as_posix(): p.read_bytes() for p in paths}
        whole = hashlib.sha256(b"".join(f"{name}\0".encode() + content for name, content in raw.items()))
        self.digest = whole.hexdigest()[:16]
        self.files = {name: _file(name, self._addressed(name, content, raw)) for name, content in raw.items()}
        # the page of the runs with a link to the chat, and without for `watch`, which has no model
        runs = self.files["runs.html"].content
        for name, chat in (("runs.html", f' data-chat="{CHAT}"'), ("watch.html", "")):
            self.files[name] = _file(name, runs.replace(b"{{chat}}", chat.encode()))

    def routes(self, *, chat: bool) -> list[Route]:
        """`chat` False: there is no model, so only the runs are shown."""
        first, second = ("chat.html", "runs.html") if chat else ("watch.html", "watch.html")
        static = Route(STATIC + "{digest}/{name:path}", self.static)
        return [Route(CHAT, self._shell(first)), Route(RUNS, self._shell(second)), static]

    async def static(self, request: Request) -> Response:
        """One file. Under its own digest it never changes; under an older digest it is the current one."""
        name = request.path_params["name"]
        if name not in self.files or name.endswith(".html"):
            raise ApiError(404, "no such file")
        own = request.path_params["digest"] == self.digest
        return _response(request, self.files[name], FOREVER if own else "no-cache")

    def _shell(self, name: str) -> Callable[[Request], Awaitable[Response]]:
        async def shell(request: Request) -> Response:
            return _response(request, self.files[name], "no-cache")

        return shell

    def _addressed(self, name: str, content: bytes, raw: Mapping[str, bytes]) -> bytes:
        """A page with the addresses of its files, and preloads for all modules that it will import."""
        if not name.endswith(".html"):
            return content
        web = f"{STATIC}{self.digest}"
        entry = _ENTRY.search(content.decode())
        wanted = sorted(_imported(entry[1], raw)) if entry else []
        links = "\n".join(f'<link rel="modulepreload" href="{web}/{module}">' for module in wanted)
        return content.replace(b"{{modules}}", links.encode()).replace(b"{{web}}", web.encode())


def _imported(module: str, raw: Mapping[str, bytes]) -> set[str]:
    """A module and all that it imports, directly or indirectly."""
    found, waiting = set(), [module]
    while waiting:
        name = waiting.pop()
        if name not in found:
            found.add(name)
            folder = posixpath.dirname(name)
            waiting += [
                posixpath.normpath(posixpath.join(folder, path)) for path in _IMPORT.findall(raw[name].decode())
            ]
    return found


def is_public(path: str) -> bool:
    """Whether a path belongs to the page itself, which asks for the key that all other paths need."""
    return path in (CHAT, RUNS) or path.startswith(STATIC)


def _file(name: str, content: bytes) -> File:
    packed = gzip.compress(content, 6, mtime=0) if len(content) >= LEAST and not name.endswith(".woff2") else None
    return File(content, packed, TYPES[Path(name).suffix], f'"{hashlib.sha256(content).hexdigest()[:16]}"')


def _response(request: Request, file: File, caching: str) -> Response:
    headers = HEADERS | {"cache-control": caching, "etag": file.tag, "vary": "accept-encoding"}
    if file.tag in _listed(request.headers.getlist("if-none-match")):
        return Response(status_code=304, headers=headers)
    packs = any(e.split(";")[0] == "gzip" for e in _listed(request.headers.getlist("accept-encoding")))
    if packs and file.packed is not None:
        return Response(file.packed, media_type=file.media_type, headers=headers | {"content-encoding": "gzip"})
    return Response(file.content, media_type=file.media_type, headers=headers)


def _listed(values: Iterable[str]) -> list[str]:
    return [part.strip().removeprefix("W/") for value in values for part in value.split(",")]
