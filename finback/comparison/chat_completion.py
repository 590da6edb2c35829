"""One chat completion from an OpenAI-compatible server: streamed or whole, in each of the forms that servers use.

A reply counts only when it is complete: a stream that ends without saying so, a chunk that is no JSON, or an error
behind a status of 200 is no answer. No proxies, no redirects. No torch here.
"""

import email.utils
import http.client
import json
import time
import urllib.parse
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

from finback.tasks import post

_LONGEST_LINE = 16 << 20  # bytes of one event, or of a whole reply
# what a server calls its own failure, rather than an end of the answer
_BROKEN = frozenset({"error", "abort", "cancelled", "insufficient_system_resource"})


class Refused(Exception):
    """No answer this time. `final`: nor another time. `busy`: the server is overloaded and wants `wait` seconds."""

    def __init__(self, problem: str, final: bool = False, busy: bool = False, wait: float | None = None) -> None:
        super().__init__(problem)
        self.final, self.busy, self.wait = final, busy, wait


@dataclass
class Reply:
    """What came back; counts are None where the server gives none."""

    content: str = ""
    reasoning: str = ""
    finish: str = ""
    prompt_tokens: int | None = None
    tokens: int | None = None
    model: str = ""
    # the server has said that nothing more comes
    ended: bool = False

    def add(self, chunk: Any) -> None:
        """Take a whole completion or a chunk of one; Refused if it is none."""
        if not isinstance(chunk, dict):
            raise Refused(f"no chat completion but {str(chunk)[:100]}")
        if chunk.get("error"):
            said = chunk["error"]
            raise Refused(f"error in the reply: {json.dumps(said)[:200]}")
        usage = chunk.get("usage")
        if isinstance(usage, dict):
            self.prompt_tokens, self.tokens = (_count(usage, "prompt_tokens"), _count(usage, "completion_tokens"))
        self.model = str(chunk.get("model") or self.model)
        choices = chunk.get("choices")
        if not isinstance(choices, list):
            raise Refused(f"no choices in {json.dumps(chunk)[:100]}")
        for choice in choices[:1]:
            self._take(choice)

    def _take(self, choice: Any) -> None:
        message = (choice.get("delta") or choice.get("message")) if isinstance(choice, dict) else None
        if not isinstance(message, dict) and not (isinstance(choice, dict) and choice.get("finish_reason")):
            raise Refused(f"no message in {json.dumps(choice)[:100]}")
        message = message if isinstance(message, dict) else {}
        self.content += _text(message.get("content"))
        # both names may be there with the same text
        reasoning = _text(message.get("reasoning_content")) or _text(message.get("reasoning"))
        self.reasoning += reasoning or _text(message.get("reasoning_details"))
        self.finish = str(choice.get("finish_reason") or self.finish)

    def complete(self) -> "Reply":
        """Itself, if it is an answer; Refused otherwise."""
        if self.finish in _BROKEN:
            raise Refused(f"the server broke off with finish_reason {self.finish!r}")
        if not self.finish and not self.ended:
            raise Refused("the stream ended without finish_reason or [DONE]")
        self.finish = {"": "stop", "end_turn": "stop", "eos": "stop", "max_tokens": "length"}.get(
            self.finish, self.finish
        )
        return self


def address(url: str) -> urllib.parse.SplitResult:
    """The parts of an endpoint's url; UserError if it is none."""
    return post.address(url, "--endpoint", "http://127.0.0.1:8000/v1#MODEL", query=True)


def ask(url: str, body: dict[str, Any], key: str, timeout: float) -> Reply:
    """Send one request and read its reply to the end; Refused, OSError or HTTPException when there is no answer.

    `timeout` is how many seconds the server may be silent, not how long the answer may take.
    """
    with post.asked(address(url), body, key, timeout) as response:
        if response.status != 200:
            raise _refusal(response)
        reply = Reply()
        if "text/event-stream" in (response.getheader("Content-Type") or ""):
            for event in _events(response):
                if event == b"[DONE]":
                    reply.ended = True
                    break
                reply.add(_json(event))
        else:
            reply.add(_json(response.read(_LONGEST_LINE)))
            reply.ended = True
        return reply.complete()


def _events(response: http.client.HTTPResponse) -> Iterator[bytes]:
    """The data of each server-sent event; comments, by which servers keep a connection alive, are left out."""
    data: list[bytes] = []
    while line := response.readline(_LONGEST_LINE):
        line = line.rstrip(b"\r\n")
        if line.startswith(b"data:"):
            data.append(line.removeprefix(b"data:").removeprefix(b" "))
        elif not line and data:
            yield b"\n".join(data)
            data = []
    if data:  # the last event may lack its empty line; half an event is no JSON
        yield b"\n".join(data)


def _refusal(response: http.client.HTTPResponse) -> Refused:
    """What a status other than 200 means for this request and for the next ones."""
    status = response.status
    said = " ".join(response.read(2000)[:400].decode("utf-8", "replace").split())
    wait = _seconds(response.getheader("Retry-After"))
    return Refused(f"HTTP {status} {said}".strip(), post.is_final(status), busy=status in (429, 503), wait=wait)


def _seconds(header: str | None) -> float | None:
    """Retry-After, which is a number of seconds or a date."""
    if not header:
        return None
    if header.isascii() and header.replace(".", "", 1).isdigit():
        return min(float(header), 1e6)
    try:
        return max(0.0, email.utils.parsedate_to_datetime(header).timestamp() - time.time())
    except ValueError:
        return None


def _json(raw: bytes) -> Any:
    try:
        return json.loads(raw)
    except (ValueError, RecursionError):
        raise Refused(f"no JSON but {raw[:100]!r}") from None


def _count(usage: dict[str, Any], name: str) -> int | None:
    value = usage.get(name)
    return value if isinstance(value, int) and value >= 0 else None


def _text(value: Any) -> str:
    """A text, or the texts of a list of parts; null, which stands where there is nothing, is none."""
    if isinstance(value, list):
        return "".join(_text(part.get("text")) for part in value if isinstance(part, dict))
    return value if isinstance(value, str) else ""
