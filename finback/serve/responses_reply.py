"""Answers in OpenAI's Responses format: items of reasoning, text and calls, whole or as events, and their storage."""

import asyncio
import secrets
import time
from typing import Any

from starlette.requests import Request
from starlette.responses import JSONResponse, Response

from finback.serve.body import read
from finback.serve.deltas import Delta
from finback.serve.errors import ApiError, bad
from finback.serve.parts_reply import PartsReply, json_object
from finback.serve.prepare import PreparedRequest
from finback.serve.reply import Dialect, event
from finback.serve.responses_form import InputTokensRequest, ResponsesRequest, translated
from finback.serve.service import Service, service_of
from finback.serve.translation import TranslatedRequest
from finback.serve.worker import OutputStream

PREFIXES = {"reasoning": "rs", "message": "msg", "function_call": "fc", "custom_tool_call": "ctc"}


class ResponsesReply(PartsReply):
    """The answer to one request."""

    def __init__(
        self, body: ResponsesRequest, service: Service, prepared: PreparedRequest, outputs: OutputStream
    ) -> None:
        super().__init__(service, prepared, outputs, f"resp_{secrets.token_hex(24)}")
        self.body = body
        self.given: list[dict[str, Any]] | None = None
        if body.store is not False:
            self.given = [raw for _, _, raw in service.responses.dialogue(outputs.owner, body)]
        self.output: list[dict[str, Any]] = []
        self._is_open = False
        self._text: list[str] = []  # text of the open item
        self._number = 0  # number of the next event
        # names as the model calls them -> (namespace, name within it); and tools with plain text input
        self._spaces = {f"{t.name}__{i.name}": (t.name, i.name) for t in body.tools or () for i in t.tools or ()}
        self._custom = {t.name for t in body.tools or () if t.type == "custom"}

    def begin(self) -> bytes:
        names = ("response.created", "response.in_progress")
        return b"".join(self._event(name, response=self._response("in_progress")) for name in names)

    def end(self) -> bytes:
        response = self.content()
        return self._event(f"response.{response['status']}", response=response)

    def content(self) -> dict[str, Any]:
        response = self._response("incomplete" if self.finish == "length" else "completed")
        if self.given is not None:
            self.service.responses.put(self.outputs.owner, response, self.given)
        return response

    def failed(self, error: ApiError) -> bytes:
        code = "server_error" if error.status >= 500 else error.code
        response = self._response("failed") | {"error": {"code": code, "message": error.message}}
        return self._event("response.failed", response=response)

    def _finished(self) -> bytes:
        start = b"" if self.output else self._open("message", {})
        return start + self._close(is_last=True)

    def _response(self, status: str) -> dict[str, Any]:
        body, is_done = self.body, status in ("completed", "incomplete")
        sampling = self.request.sampling
        return {
            "id": self.id,
            "object": "response",
            "created_at": self.created,
            "completed_at": int(time.time()) if is_done else None,
            "status": status,
            "model": self.service.options.name,
            "output": list(self.output) if is_done or status == "failed" else [],
            "error": None,
            "incomplete_details": {"reason": "max_output_tokens"} if status == "incomplete" else None,
            "instructions": body.instructions,
            "metadata": body.metadata or {},
            "temperature": sampling.temperature,
            "top_p": sampling.top_p,
            "max_output_tokens": body.max_output_tokens,
            "previous_response_id": body.previous_response_id,
            "parallel_tool_calls": body.parallel_tool_calls is not False,
            "tool_choice": _plain(body.tool_choice) or "auto",
            "tools": [_plain(tool) for tool in body.tools or ()],
            "reasoning": {"effort": body.reasoning and body.reasoning.effort, "summary": None},
            "text": {"format": _plain(body.text.format) if body.text and body.text.format else {"type": "text"}},
            "truncation": "disabled",
            "store": body.store is not False,
            "background": False,
            "user": body.user,
            "usage": self._usage() if is_done else None,
        }

    def _usage(self) -> dict[str, Any]:
        prompt, made = len(self.request.prompt), len(self.request.tokens)
        return {
            "input_tokens": prompt,
            "input_tokens_details": {"cached_tokens": self.request.cached, "cache_write_tokens": 0},
            "output_tokens": made,
            "output_tokens_details": {"reasoning_tokens": self.request.thinking_tokens},
            "total_tokens": prompt + made,
        }

    def _part(self, part: Delta) -> bytes:
        kind = {"reasoning": "reasoning", "content": "message"}.get(part.kind)
        found = b""
        if part.name is not None:
            kind = "custom_tool_call" if part.name in self._custom else "function_call"
            space, name = self._spaces.get(part.name, (None, part.name))
            written = {"input": ""} if kind == "custom_tool_call" else {"arguments": ""}
            called = {"call_id": part.call_id, "name": name, **({"namespace": space} if space else {}), **written}
            found += self._close() + self._open(kind, called)
        elif kind is not None and not (self._is_open and self.output[-1]["type"] == kind):
            found += self._close() + self._open(kind, {})
        return found + self._add(part.text)

    def _open(self, kind: str, more: dict[str, Any]) -> bytes:
        ident = f"{PREFIXES[kind]}_{secrets.token_hex(12)}"
        starts: dict[str, dict[str, Any]] = {
            "reasoning": {"summary": [], "content": [], "encrypted_content": None},
            "message": {"role": "assistant", "content": []},
        }
        self.output.append({"id": ident, "type": kind, "status": "in_progress", **starts.get(kind, {}), **more})
        self._is_open, self._text = True, []
        found = self._event("response.output_item.added", item=dict(self.output[-1]))
        if kind in starts:
            found += self._event("response.content_part.added", True, content_index=0, part=_text_part(kind, ""))
        if kind == "reasoning":
            part = {"type": "summary_text", "text": ""}
            found += self._event("response.reasoning_summary_part.added", True, summary_index=0, part=part)
        return found

    def _add(self, text: str) -> bytes:
        if not text:
            return b""
        self._text.append(text)
        match self.output[-1]["type"]:
            case "reasoning":  # some clients show one of them, others the other
                own = self._event("response.reasoning_text.delta", True, content_index=0, delta=text)
                return own + self._event("response.reasoning_summary_text.delta", True, summary_index=0, delta=text)
            case "message":
                return self._event("response.output_text.delta", True, content_index=0, delta=text, logprobs=[])
            case "function_call":
                return self._event("response.function_call_arguments.delta", True, delta=text)
        return b""

    def _close(self, is_last: bool = False) -> bytes:
        """Closes the open item, which is then complete unless the answer was cut off in it."""
        if not self._is_open:
            return b""
        self._is_open, item, text = False, self.output[-1], "".join(self._text)
        found, kind = b"", item["type"]
        if kind in ("reasoning", "message"):
            name, part = "reasoning_text" if kind == "reasoning" else "output_text", _text_part(kind, text)
            more: dict[str, Any] = {"logprobs": []} if kind == "message" else {}
            found += self._event(f"response.{name}.done", True, content_index=0, text=text, **more)
            found += self._event("response.content_part.done", True, content_index=0, part=part)
            item["content"] = [part]
        if kind == "reasoning":
            part = {"type": "summary_text", "text": text}
            found += self._event("response.reasoning_summary_text.done", True, summary_index=0, text=text)
            found += self._event("response.reasoning_summary_part.done", True, summary_index=0, part=part)
            item["summary"] = [part]
        elif kind == "function_call":
            item["arguments"] = text
            found += self._event("response.function_call_arguments.done", True, arguments=text, name=item["name"])
        elif kind == "custom_tool_call":
            item["input"] = _input(text)
            found += self._event("response.custom_tool_call_input.delta", True, delta=item["input"])
            found += self._event("response.custom_tool_call_input.done", True, input=item["input"])
        item["status"] = "incomplete" if is_last and self.finish == "length" else "completed"
        return found + self._event("response.output_item.done", item=dict(item))

    def _event(self, kind: str, is_of_item: bool = False, **more: Any) -> bytes:
        """One event; all but the response's own events carry the index of their item."""
        place = {} if "response" in more else {"output_index": len(self.output) - 1}
        own = {"item_id": self.output[-1]["id"]} if is_of_item else {}
        found = event({"type": kind, "sequence_number": self._number, **own, **place, **more}, kind)
        self._number += 1
        return found


def _text_part(kind: str, text: str) -> dict[str, Any]:
    if kind == "reasoning":
        return {"type": "reasoning_text", "text": text}
    return {"type": "output_text", "text": text, "annotations": [], "logprobs": []}


def _input(arguments: str) -> str:
    """The plain text that a custom tool was called with."""
    given = (json_object(arguments) or {}).get("input")
    return given if isinstance(given, str) else arguments


def _plain(value: Any) -> Any:
    return value.model_dump(exclude_none=True, by_alias=True) if hasattr(value, "model_dump") else value


def _translated(body: InputTokensRequest, service: Service, owner: bytes) -> TranslatedRequest:
    return translated(body, [(item, place) for item, place, _ in service.responses.dialogue(owner, body)])


async def input_tokens(request: Request) -> Response:
    """The number of prompt tokens of a request."""
    body = await read(request, InputTokensRequest)
    service = await service_of(request.scope).reach(body.model)
    chat = _translated(body, service, request.state.owner)
    prompt = await asyncio.to_thread(service.preparer.prompt, chat)
    return JSONResponse({"object": "response.input_tokens", "input_tokens": len(prompt.ids)})


async def stored(request: Request) -> Response:
    """A stored response; DELETE removes it."""
    store, ident = service_of(request.scope).responses, request.path_params["id"]
    if request.method == "DELETE":
        store.delete(request.state.owner, ident)
        return JSONResponse({"id": ident, "object": "response", "deleted": True})
    if request.query_params.get("stream") == "true":
        raise bad("stream: a stored response is complete; only new ones are streamed", "stream")
    return JSONResponse(store.get(request.state.owner, ident, "id").response)


async def cancel(request: Request) -> Response:
    """ApiError 400: nothing runs in the background."""
    service_of(request.scope).responses.get(request.state.owner, request.path_params["id"], "id")
    raise bad("only background responses can be cancelled; close the connection instead", "id")


async def input_items(request: Request) -> Response:
    """The input of a stored response, latest item first unless order=asc."""
    found = service_of(request.scope).responses.get(request.state.owner, request.path_params["id"], "id")
    items = found.input if request.query_params.get("order") == "asc" else found.input[::-1]
    ends = (
        {"first_id": items[0].get("id"), "last_id": items[-1].get("id")} if items else {"first_id": "", "last_id": ""}
    )
    return JSONResponse({"object": "list", "data": items, "has_more": False, **ends})


RESPONSES = Dialect(ResponsesRequest, _translated, ResponsesReply)
