"""Answers in Anthropic's Messages format: blocks of thinking, text and tool use, whole or as events."""

import asyncio
import base64
import hashlib
import hmac
import secrets
from typing import Any

from pydantic_core import from_json
from starlette.requests import Request
from starlette.responses import JSONResponse, Response

from finback.serve.anthropic_form import CountRequest, MessagesRequest, translated
from finback.serve.body import read
from finback.serve.deltas import Delta
from finback.serve.errors import ApiError
from finback.serve.parts_reply import PartsReply, json_object
from finback.serve.prepare import PreparedRequest
from finback.serve.reply import Dialect, event
from finback.serve.service import Service, service_of
from finback.serve.worker import OutputStream

KINDS = {"reasoning": "thinking", "content": "text", "tool": "tool_use"}
# for each kind of block: its initial content, and its delta's type and field
EMPTY: dict[str, dict[str, Any]] = {
    "thinking": {"thinking": "", "signature": ""},
    "text": {"text": ""},
    "tool_use": {"input": {}},
}
ADDS = {
    "thinking": ("thinking_delta", "thinking"),
    "text": ("text_delta", "text"),
    "tool_use": ("input_json_delta", "partial_json"),
}
# signs chains of thought: nobody checks the signature, but clients drop chains without one
_KEY = secrets.token_bytes(32)


class MessagesReply(PartsReply):
    """The answer to one request."""

    alive = event({"type": "ping"}, "ping")

    def __init__(
        self, body: MessagesRequest, service: Service, prepared: PreparedRequest, outputs: OutputStream
    ) -> None:
        super().__init__(service, prepared, outputs, f"msg_{secrets.token_hex(12)}")
        self.blocks: list[dict[str, Any]] = []
        self._kind = ""  # kind of the open block
        self._text: list[str] = []  # text of the open block
        self._input = InputGate()
        self._call = -1  # index of the current call

    def begin(self) -> bytes:
        start = self._message([], None, None) | {"usage": self._usage() | {"output_tokens": 0}}
        return _named({"type": "message_start", "message": start})

    def end(self) -> bytes:
        reason, text = self._stop()
        last = {
            "type": "message_delta",
            "delta": {"stop_reason": reason, "stop_sequence": text},
            "usage": self._usage(),
        }
        return _named(last) + _named({"type": "message_stop"})

    def content(self) -> dict[str, Any]:
        return self._message(self.blocks, *self._stop()) | {"usage": self._usage()}

    def failed(self, error: ApiError) -> bytes:
        return event(error.anthropic, "error")

    def _finished(self) -> bytes:
        start = b"" if self.blocks or self._kind else self._open("text", {})
        return start + self._close()

    def _message(self, content: list[dict[str, Any]], reason: str | None, text: str | None) -> dict[str, Any]:
        return {
            "id": self.id,
            "type": "message",
            "role": "assistant",
            "model": self.service.options.name,
            "content": content,
            "stop_reason": reason,
            "stop_sequence": text,
        }

    def _stop(self) -> tuple[str, str | None]:
        """The stop reason, and the stop string if there was one."""
        met = self.request.detokenizer.stop if self.request.detokenizer is not None else None
        if self.finish == "length":
            return "max_tokens", None
        if met is not None and not self._is_whole_call():
            return "stop_sequence", met
        return ("tool_use" if self.parser.called else "end_turn"), None

    def _is_whole_call(self) -> bool:
        """Whether the answer ends with a complete call."""
        return self.parser.called and json_object(self.parser.calls[-1].arguments) is not None

    def _usage(self) -> dict[str, int]:
        prompt, cached = len(self.request.prompt), self.request.cached
        return {
            "input_tokens": prompt - cached,
            "output_tokens": len(self.request.tokens),
            "cache_read_input_tokens": cached,
            "cache_creation_input_tokens": 0,
        }

    def _part(self, part: Delta) -> bytes:
        kind, found = KINDS[part.kind], b""
        if kind != self._kind or part.name is not None:
            found += self._close()
            found += self._open(kind, {"id": part.call_id, "name": part.name} if part.name is not None else {})
        if kind == "tool_use":
            return found + self._add(self._input.push(part.text))
        return found + self._add(part.text)

    def _open(self, kind: str, more: dict[str, Any]) -> bytes:
        self._kind, self._text, self._input = kind, [], InputGate()
        self.blocks.append({"type": kind, **more, **EMPTY[kind]})
        start = {"type": "content_block_start", "index": len(self.blocks) - 1, "content_block": self.blocks[-1]}
        return _named(start)

    def _add(self, text: str) -> bytes:
        if not text:
            return b""
        self._text.append(text)
        kind, field = ADDS[self._kind]
        return self._delta({"type": kind, field: text})

    def _close(self) -> bytes:
        """Closes the open block, which is then complete."""
        if not self._kind:
            return b""
        found, block = b"", self.blocks[-1]
        if self._kind == "tool_use":
            found += self._add(self._input.end())
            block["input"] = json_object("".join(self._text)) or {}
        else:
            block[self._kind] = text = "".join(self._text)
        if self._kind == "thinking":
            signed = hmac.digest(_KEY, text.encode(), hashlib.sha256)
            block["signature"] = base64.b64encode(signed).decode()
            found += self._delta({"type": "signature_delta", "signature": block["signature"]})
        self._kind = ""
        return found + _named({"type": "content_block_stop", "index": len(self.blocks) - 1})

    def _delta(self, delta: dict[str, str]) -> bytes:
        return _named({"type": "content_block_delta", "index": len(self.blocks) - 1, "delta": delta})


class InputGate:
    """Passes on the JSON of a call while it is a valid prefix of an object, because clients parse it as it arrives."""

    def __init__(self) -> None:
        self._text = ""
        self._sent = 0  # characters
        self._broken = False

    def push(self, text: str) -> str:
        """The unsent part of the text, or "" if it may not be sent yet."""
        self._text += text
        # wait for enough new text, so that the total work stays linear in the length
        if self._broken or (len(self._text) - self._sent) * 32 < len(self._text):
            return ""
        return self._release()

    def end(self) -> str:
        """The rest; an empty object if nothing was sent."""
        rest = "" if self._broken else self._release()
        return rest if self._sent else "{}"

    def _release(self) -> str:
        try:
            if not isinstance(from_json(self._text, allow_partial=True), dict):
                raise ValueError("no object")
        except ValueError:
            # an incomplete number or word may look invalid for a moment
            self._broken = self._sent == 0 and bool(self._text.strip()) and not self._text.lstrip().startswith("{")
            return ""
        new, self._sent = self._text[self._sent :], len(self._text)
        return new


async def count_tokens(request: Request) -> Response:
    """The number of prompt tokens of a request; nothing is generated, so it does not queue."""
    body = await read(request, CountRequest)
    service = await service_of(request.scope).reach(body.model)
    chat = translated(body)
    prompt = await asyncio.to_thread(service.preparer.prompt, chat)
    return JSONResponse({"input_tokens": len(prompt.ids)})


def _named(content: dict[str, Any]) -> bytes:
    return event(content, content["type"])


MESSAGES = Dialect(MessagesRequest, lambda body, service, owner: translated(body), MessagesReply)
