"""An answer on its way to the client: OpenAI's envelope around the replies, as one object or as a stream of events."""

import asyncio
import json
import logging
import secrets
import time
import traceback
from collections.abc import AsyncIterator
from typing import Any

from finback.serve.errors import ApiError
from finback.serve.parse import Parser
from finback.serve.prepare import PreparedRequest
from finback.serve.reply import ChatChoice, TextChoice
from finback.serve.service import Service
from finback.serve.usage import timings, usage
from finback.serve.worker import OutputDelta, OutputStream

log = logging.getLogger("finback.serve")

DONE = b"data: [DONE]\n\n"
KEEP_ALIVE = b": keep-alive\n\n"


class CompletionResponse:
    """What comes of one job; `chat` says in whose envelope."""

    def __init__(self, service: Service, job: PreparedRequest, ticket: OutputStream, chat: bool) -> None:
        self.service, self.job, self.ticket, self.chat = service, job, ticket, chat
        self.id = ("chatcmpl-" if chat else "cmpl-") + secrets.token_hex(12)
        self.created = int(time.time())
        spelling = service.spelling if job.logprobs else None
        self.replies: list[ChatChoice | TextChoice] = []
        for i, request in enumerate(ticket.requests):
            if chat:
                parser = Parser(
                    job.opened,
                    job.tools,
                    job.forced.form if job.forced else None,
                    held=job.forced is not None or job.schema is not None,
                    single=job.single,
                )
                self.replies.append(ChatChoice(i, request, parser, service.options.reasoning_field, spelling))
            else:
                self.replies.append(TextChoice(i, request, job.echo[i] if job.echo else None, spelling))
        self._heard: dict[int, tuple[float, int]] = {}  # by choice: when its last token came, and which it was

    @property
    def over(self) -> bool:
        """Whether every choice has ended."""
        return all(reply.finish is not None for reply in self.replies)

    async def whole(self) -> dict[str, Any]:
        """The reply as one object, when everything has been said."""
        while not self.over:
            await self._next()
        choices = [reply.whole() for reply in self.replies]
        return self._envelope("chat.completion" if self.chat else "text_completion") | {
            "choices": choices,
            "usage": self.usage,
            "timings": self.timings,
        }

    async def events(self, include_usage: bool) -> AsyncIterator[bytes]:
        """The reply as server-sent events; a failure is one of them, since the headers are out by then."""
        try:
            if starts := [c for reply in self.replies if (c := reply.start())]:
                yield b"".join(self._chunk([choice], include_usage) for choice in starts)
            sent = time.monotonic()
            while not self.over:
                try:
                    async with asyncio.timeout(sent + self.service.options.keep_alive - time.monotonic()):
                        choices = await self._next()
                except TimeoutError:
                    choices, made = [], KEEP_ALIVE
                else:
                    made = b"".join(self._chunk([c], include_usage, c is choices[-1]) for c in choices)
                if made:
                    yield made
                    sent = time.monotonic()
            if include_usage:
                yield _event(self._envelope("chat.completion.chunk") | {"choices": [], "usage": self.usage})
            yield DONE
        except ApiError as error:
            yield _event(error.body)
        except Exception as error:  # a stream never ends in silence
            trace = "".join(traceback.format_tb(error.__traceback__))
            log.error("%s failed: %s\n%s", self.id, type(error).__name__, trace)
            yield _event(ApiError(500, "the server failed").body)

    @property
    def usage(self) -> dict[str, Any]:
        """Tokens so far."""
        return usage(self.ticket.requests, self.job.orders)

    @property
    def timings(self) -> dict[str, Any]:
        """Times so far."""
        return timings(self.ticket.requests, self.job.orders)

    async def _next(self) -> list[dict[str, Any]]:
        """The choices of the next chunks."""
        found = []
        for index, news in await self.ticket.next():
            self._measure(index, news)
            found += self.replies[index].take(news)
        return found

    def _measure(self, index: int, news: OutputDelta) -> None:
        metrics, request = self.service.metrics, self.ticket.requests[index]
        if news.made:
            if index not in self._heard:
                metrics.first_token.observe(request.first - request.submitted)
                metrics.generated_tokens += news.made
            else:
                then, made = self._heard[index]
                if new := news.made - made:
                    metrics.gap.observe((news.at - then) / new, new)
                    metrics.generated_tokens += new
            self._heard[index] = (news.at, news.made)
        if news.finish is not None:
            metrics.drafted += request.drafted
            metrics.accepted += request.accepted
            if self.job.orders[index].leader is None:
                metrics.prompt_tokens += len(request.prompt)
                metrics.cached_tokens += request.cached

    def _envelope(self, kind: str) -> dict[str, Any]:
        kind = kind if self.chat else "text_completion"
        return {
            "id": self.id,
            "object": kind,
            "created": self.created,
            "model": self.service.options.name,
            "system_fingerprint": f"finback-{self.service.created}",
        }

    def _chunk(self, choices: list[dict[str, Any]], include_usage: bool, newest: bool = False) -> bytes:
        """One event; `newest`: nothing is known beyond it, so it may be the last."""
        chunk = self._envelope("chat.completion.chunk") | {"choices": choices}
        if include_usage:
            chunk["usage"] = None
        if newest and self.over:
            chunk["timings"] = self.timings
        return _event(chunk)


def _event(content: dict[str, Any]) -> bytes:
    return b"data: " + json.dumps(content, ensure_ascii=False, separators=(",", ":")).encode() + b"\n\n"
