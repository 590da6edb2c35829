"""A request to an OpenAI-compatible server, tried again where that can help. No proxies, no redirects. No torch here."""

import http.client
import json
import threading
import urllib.parse
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

from finback.config import UserError

_LONGEST_REPLY = 4 << 20  # bytes
_LONGEST_WAIT = 60.0  # seconds between two tries, whatever the server asks for
_AGAIN = (408, 409, 425, 429)  # and 500 or more


class _Refused(Exception):
    """A reply that is no answer; `wait` is what the server asked for."""

    def __init__(self, problem: str, final: bool = False, wait: float | None = None) -> None:
        super().__init__(problem)
        self.final, self.wait = final, wait


def address(url: str, field: str, example: str, query: bool = False) -> urllib.parse.SplitResult:
    """The parts of a server's url; UserError if it is none, or has a query where there should be none."""
    try:
        parts = urllib.parse.urlsplit(url)
        fine = parts.scheme in ("http", "https") and parts.hostname and parts.port != 0
        if fine and (query or not parts.query):
            return parts
    except ValueError:  # a port that is no number
        pass
    raise UserError(field, url, "not the url of a server", f"Write for example {example}.")


def judge_address(url: str) -> urllib.parse.SplitResult:
    """The parts of a judge's url."""
    return address(url, "judge.url", "http://127.0.0.1:8000/v1")


@contextmanager
def asked(
    parts: urllib.parse.SplitResult, body: dict[str, Any], key: str, seconds: float
) -> Iterator[http.client.HTTPResponse]:
    """The response to a request for a chat completion, whose connection ends with the block."""
    kind = http.client.HTTPSConnection if parts.scheme == "https" else http.client.HTTPConnection
    assert parts.hostname
    connection = kind(parts.hostname, parts.port, timeout=seconds)
    headers = {"Content-Type": "application/json"} | ({"Authorization": f"Bearer {key}"} if key else {})
    path = parts.path.rstrip("/") + "/chat/completions" + (f"?{parts.query}" if parts.query else "")
    try:
        connection.request("POST", path, json.dumps(body), headers)
        yield connection.getresponse()
    finally:
        connection.close()


def is_final(status: int) -> bool:
    """Whether the same request would be refused with this status again."""
    return status < 500 and status not in _AGAIN


def post(url: str, body: dict[str, Any], key: str, seconds: float, tries: int, stop: threading.Event) -> str:
    """The text of the first choice of a chat completion; UserError when every try failed. `stop` ends the waiting."""
    problem = "was stopped"
    for attempt in range(tries):
        if stop.is_set():
            break
        try:
            return _once(url, body, key, seconds)
        except _Refused as error:
            problem, wait = str(error), error.wait
            if error.final:
                break
        except (OSError, http.client.HTTPException) as error:
            problem, wait = f"{type(error).__name__}: {error}", None
        if attempt + 1 < tries:
            stop.wait(min(_LONGEST_WAIT, 0.5 * 2**attempt if wait is None else wait))
    raise UserError(
        "judge.url",
        url,
        f"the judge did not answer, at last: {problem}",
        "Start or correct the server, then give the same command again: the run goes on where it was.",
    )


def _once(url: str, body: dict[str, Any], key: str, seconds: float) -> str:
    with asked(judge_address(url), body, key, seconds) as response:
        return _content(response, response.read(_LONGEST_REPLY))


def _content(response: http.client.HTTPResponse, raw: bytes) -> str:
    if response.status != 200:
        said = " ".join(raw[:300].decode("utf-8", "replace").split())
        raise _Refused(
            f"HTTP {response.status} {said}", is_final(response.status), _seconds(response.getheader("Retry-After"))
        )
    try:
        content = json.loads(raw)["choices"][0]["message"]["content"]
    except (ValueError, KeyError, IndexError, TypeError, RecursionError):
        raise _Refused(f"no chat completion but {raw[:100]!r}") from None
    return content if isinstance(content, str) else ""  # null where thinking took all tokens


def _seconds(header: str | None) -> float | None:
    """Retry-After in seconds; the form with a date is treated as if there were none."""
    return float(header) if header and header.isascii() and header.isdigit() and len(header) < 10 else None
