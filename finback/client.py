"""The one HTTP client: sends JSON and returns the reply whole or as a stream of events. Does not import torch.

It uses no proxies and follows no redirects, so a request and its key go only to the given address. No error shows the
key. httpx is imported when the first client is made, because that import is slower than the rest of a command's start.
"""

import email.utils
import json
import threading
import time
import urllib.parse
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, TypeVar

from finback.config import UserError

if TYPE_CHECKING:
    import httpx

T = TypeVar("T")
DONE = b"[DONE]"  # the last event of a stream
_TRANSIENT = (408, 409, 425, 429)  # statuses below 500 after which the same request may succeed
_BUSY = (429, 503)
_LONGEST_RETRY_AFTER = 1e6  # seconds


class RequestFailed(Exception):
    """No usable reply. `final`: the same request fails again; `busy`: the server is overloaded; `retry_after`: seconds;
    `silent`: the server sent nothing within the timeout."""

    def __init__(
        self,
        problem: str,
        final: bool = False,
        busy: bool = False,
        retry_after: float | None = None,
        silent: bool = False,
    ) -> None:
        super().__init__(problem)
        self.final, self.busy, self.retry_after, self.silent = final, busy, retry_after, silent


def check_url(url: str, field: str, example: str, query: bool = False) -> urllib.parse.SplitResult:
    """The parts of a server's url; UserError if it is not one, or has a query and `query` is False."""
    try:
        parts = urllib.parse.urlsplit(url)
        if parts.scheme in ("http", "https") and parts.hostname and parts.port != 0 and (query or not parts.query):
            return parts
    except ValueError:  # a port that is not a number
        pass
    raise UserError(field, url, "not the url of a server", f"Write for example {example}.")


def read_key(file: str | None, field: str) -> str:
    """The key that a file holds, "" without a file; UserError names the field."""
    if file is None:
        return ""
    try:
        key = Path(file).expanduser().read_text(encoding="ascii").strip()
    except (OSError, UnicodeDecodeError) as error:
        raise UserError(field, file, f"cannot be read ({error})", "Correct the path.") from None
    if not key or len(key.split()) > 1:
        raise UserError(field, file, "does not contain one key", "Write the key and nothing else into it.")
    return key


class Client(AbstractContextManager["Client"]):
    """Connections to one server, shared by threads. The paths of requests are relative to `url`.

    `timeout` is the longest silence of the server in seconds. `deadline` limits the seconds of a whole request; it is
    checked when a piece of the reply arrives. A reply of more than `max_bytes` is refused.
    """

    def __init__(
        self, url: str, key: str = "", timeout: float = 60.0, deadline: float | None = None, max_bytes: int = 64 << 20
    ) -> None:
        import ssl

        import httpx

        self._parts = check_url(url, "url", "http://127.0.0.1:8000/v1", query=True)
        # a file's last line break is not part of a key
        self._key, self._deadline, self._max_bytes = key.strip(), deadline, max_bytes
        self._http = httpx.Client(
            headers={"Accept-Encoding": "identity"},
            timeout=timeout if deadline is None else min(timeout, deadline),
            trust_env=False,
            limits=httpx.Limits(max_connections=None),
            # the system's certificates, and SSL_CERT_FILE
            verify=ssl.create_default_context() if self._parts.scheme == "https" else False,
        )

    def __exit__(self, *_: object) -> None:
        self.close()

    def close(self) -> None:
        """Close its connections."""
        self._http.close()

    def reply(self, path: str, body: Any = None) -> Any:
        """The JSON value of the reply to a POST of `body`, or to a GET without one; RequestFailed if there is none."""
        with self._open(path, body) as (_, chunks):
            # remove the key first: an error message may cut the reply in the middle of it
            return parse_json(self._bytes_without_key(b"".join(chunks)))

    def has(self, path: str) -> bool:
        """Whether a GET of the path succeeds."""
        try:
            with self._open(path, None):
                return True
        except RequestFailed:
            return False

    def stream(self, path: str, body: Any) -> Iterator[bytes]:
        """The data of each server-sent event as it arrives; a reply that is not a stream is one event, followed by DONE."""
        with self._open(path, body) as (response, chunks):
            if "text/event-stream" in response.headers.get("Content-Type", ""):
                yield from _events(chunks)
            else:
                yield b"".join(chunks)
                yield DONE

    def without_key(self, text: str) -> str:
        """The text with [key] in place of the key, which some servers repeat."""
        return text.replace(self._key, "[key]") if self._key else text

    def _bytes_without_key(self, body: bytes) -> bytes:
        return body.replace(self._key.encode(), b"[key]") if self._key else body

    @contextmanager
    def _open(self, path: str, body: Any) -> Iterator[tuple["httpx.Response", Iterator[bytes]]]:
        """A response with status 200 and its body in pieces; every fault of the connection becomes RequestFailed."""
        import httpx

        until = time.monotonic() + self._deadline if self._deadline is not None else None
        base, query = self._parts.path.rstrip("/"), f"?{self._parts.query}" if self._parts.query else ""
        url = f"{self._parts.scheme}://{self._parts.netloc.rpartition('@')[2]}{base}{path}{query}"
        headers = {"Content-Type": "application/json"} if body is not None else {}
        if not (self._key.isascii() and (self._key.isprintable() or not self._key)):
            # the message of httpx would show the key
            raise RequestFailed("the key has characters that a header cannot carry", final=True)
        if self._key:
            headers["Authorization"] = f"Bearer {self._key}"
        try:
            method, content = ("GET", None) if body is None else ("POST", json.dumps(body))
            with self._http.stream(method, url, content=content, headers=headers) as response:
                chunks = self._chunks(response, until)
                if response.status_code != 200:
                    raise self._refusal(response, chunks)
                yield response, chunks
        except RequestFailed as error:
            shown = self.without_key(str(error))
            raise RequestFailed(shown, error.final, error.busy, error.retry_after, error.silent) from None
        except UnicodeError:
            raise RequestFailed(f"InvalidURL: {self._parts.hostname!r} is not the name of a host", final=True) from None
        except (httpx.HTTPError, httpx.InvalidURL) as error:
            cause = _cause(error)
            silent = isinstance(error, httpx.TimeoutException)
            raise RequestFailed(self.without_key(f"{type(cause).__name__}: {cause}"), silent=silent) from None

    def _refusal(self, response: "httpx.Response", chunks: Iterator[bytes]) -> RequestFailed:
        """The error for a status other than 200. The key is removed from the reply before the reply is shortened."""
        status, start = response.status_code, b""
        while len(start) < 400 + len(self._key) and (chunk := next(chunks, b"")):
            start += chunk
        text = " ".join(self._bytes_without_key(start)[:400].decode("utf-8", "replace").split())
        final, wait = status < 500 and status not in _TRANSIENT, retry_after(response.headers.get("Retry-After"))
        return RequestFailed(f"HTTP {status} {text}".strip(), final, status in _BUSY, wait)

    def _chunks(self, response: "httpx.Response", until: float | None) -> Iterator[bytes]:
        size = 0
        for chunk in response.iter_raw():
            size += len(chunk)
            if size > self._max_bytes:
                raise RequestFailed(f"a reply of more than {self._max_bytes:,} bytes")
            if until is not None and time.monotonic() > until:
                raise RequestFailed(f"TimeoutError: no complete reply within {self._deadline:g} seconds")
            yield chunk


def parse_json(raw: bytes) -> Any:
    """The JSON value of a reply; RequestFailed if it is not JSON."""
    try:
        return json.loads(raw)
    except (ValueError, RecursionError):
        raise RequestFailed(f"not JSON: {raw[:100]!r}") from None


def retry_after(header: str | None) -> float | None:
    """Seconds to wait according to a Retry-After header, a number of seconds or a date; None for anything else."""
    if not header:
        return None
    if header.isascii() and header.replace(".", "", 1).isdigit():
        return min(float(header), _LONGEST_RETRY_AFTER)
    try:
        return max(0.0, email.utils.parsedate_to_datetime(header).timestamp() - time.time())
    except ValueError:
        return None


class RateLimit:
    """Limits the requests of several threads to one server: `rate` requests a minute, 0 for no limit."""

    def __init__(self, stop: threading.Event, rate: float = 0.0) -> None:
        self.stop = stop
        self._gap = 60 / rate if rate else 0.0
        self._lock = threading.Lock()
        self._next = 0.0  # when the next request may go, in monotonic time
        self._resume = 0.0

    def wait(self) -> bool:
        """Wait for this request's turn; False if `stop` is set."""
        with self._lock:
            turn = max(time.monotonic(), self._next)
            self._next = turn + self._gap
        while (left := max(turn, self._resume) - time.monotonic()) > 0:
            if self.stop.wait(left):
                break
        return not self.stop.is_set()

    def pause(self, seconds: float) -> None:
        """Hold back the requests of all threads: a server that is busy for one is busy for all."""
        self._resume = max(self._resume, time.monotonic() + seconds)


@dataclass(frozen=True)
class Retries:
    """How often a request is sent. The wait between two tries doubles, unless the server names its length."""

    tries: int = 6
    # after 429 and 503, which say "later"
    busy_tries: int = 40
    # seconds before the second try
    backoff: float = 1.0
    # seconds, whatever the server asks for
    longest_wait: float = 300.0

    def wait(self, error: RequestFailed, failures: int) -> float:
        """Seconds before the next try, after so many failures; `error` is the last one."""
        asked = error.retry_after
        return min(self.longest_wait, self.backoff * 2 ** min(failures - 1, 6) if asked is None else asked)

    def send(self, request: Callable[[], T], limit: RateLimit) -> tuple[T, int]:
        """What `request` returns, and the number of tries; the RequestFailed of the last try when none succeeded."""
        faults = busy = 0
        last = RequestFailed("was stopped")
        while limit.wait():
            try:
                return request(), faults + busy + 1
            except RequestFailed as error:
                last, busy, faults = error, busy + error.busy, faults + (not error.busy)
            wait = self.wait(last, faults + busy)
            if last.busy:
                limit.pause(wait)
            if last.final or faults >= self.tries or busy >= self.busy_tries:
                break
            limit.stop.wait(wait)
        raise last


def _events(chunks: Iterator[bytes]) -> Iterator[bytes]:
    """The data of each server-sent event; comments, which servers send to keep a connection open, are left out."""
    data: list[bytes] = []
    for line in _lines(chunks):
        if line.startswith(b"data:"):
            data.append(line.removeprefix(b"data:").removeprefix(b" "))
        elif not line and data:
            yield b"\n".join(data)
            data = []
    if data:  # the last event may lack its empty line; half an event is not JSON
        yield b"\n".join(data)


def _lines(chunks: Iterator[bytes]) -> Iterator[bytes]:
    rest = bytearray()
    for chunk in chunks:
        rest += chunk
        if b"\n" in chunk:
            *lines, last = bytes(rest).split(b"\n")
            rest = bytearray(last)
            yield from (line.rstrip(b"\r") for line in lines)
    if rest:
        yield bytes(rest)


def _cause(error: BaseException) -> BaseException:
    """The system's error if there is one: it is more specific than the httpx errors around it."""
    cause: BaseException | None = error
    while cause is not None and not isinstance(cause, OSError):
        cause = cause.__cause__ or cause.__context__
    return cause or error
