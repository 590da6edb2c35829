"""Streams and lost connections: most requests end with their connection; a resumable stream can be continued on another.

A resumable stream (`stream_options.resumable`) stores its events for a while, so that its client can return.
"""

import asyncio
from collections import deque
from collections.abc import AsyncIterator, Awaitable, Callable, Coroutine
from typing import Any

from starlette.types import Receive, Send

from finback.serve.errors import ApiError
from finback.serve.options import ServeOptions

SSE = [
    (b"content-type", b"text/event-stream; charset=utf-8"),
    (b"cache-control", b"no-cache"),
    (b"x-accel-buffering", b"no"),  # nginx would buffer the stream
]
KEEP_ALIVE = b": keep-alive\n\n"
A_LOOK = 0.25  # seconds between checks of the queue


class ResumableStream:
    """The events of one response, numbered from 1, and the task that produces them. Used on the event loop only."""

    def __init__(self, owner: bytes, options: ServeOptions) -> None:
        self.owner, self.options = owner, options
        self.place: Callable[[], int] = lambda: 0  # position in the queue, 0 once generation has started
        self.first = 1  # number of the oldest stored event
        self.is_finished = False
        self.forget: Callable[[], object] = lambda: None  # set when the stream is registered
        self.size = 0  # stored bytes
        self._events: deque[bytes] = deque()
        self._readers = 0
        self._grown = asyncio.Event()
        self._error: BaseException | None = None
        self._task: asyncio.Task[None] | None = None
        self._leaving: asyncio.TimerHandle | None = None

    @property
    def last(self) -> int:
        """The number of the newest event, 0 before the first."""
        return self.first + len(self._events) - 1

    def run(self, work: Coroutine[Any, Any, None]) -> None:
        """Starts the task that produces events."""
        self._task = asyncio.create_task(work)
        self._task.add_done_callback(self._ended)

    def put(self, events: bytes) -> None:
        """Stores events; drops the oldest if there are too many."""
        if events.startswith(b":"):  # a comment; each reader creates its own
            return
        for event in events.removesuffix(b"\n\n").split(b"\n\n"):
            numbered = b"id: %d\n%b\n\n" % (self.last + 1, event)
            self._events.append(numbered)
            self.size += len(numbered)
        while self.size > self.options.resume_bytes and len(self._events) > 1:
            self.size -= len(self._events.popleft())
            self.first += 1
        self._wake()

    def stop(self) -> None:
        """Ends the answer."""
        if self._task is not None:
            self._task.cancel()

    async def serve(self, after: int, send: Send) -> None:
        """Sends the events after number `after`, until the stream ends or the reader disconnects."""
        if not self.first - 1 <= after <= self.last:
            raise ApiError(404, f"event {after} is not stored: there are {self.first} to {self.last}", "after")
        self._readers += 1
        if self._leaving is not None:
            self._leaving.cancel()
        at = after
        try:
            while not self.last and not self.is_finished:
                await self._more(None)
            if self._error is not None and not self.last:
                raise self._error
            await send({"type": "http.response.start", "status": 200, "headers": list(SSE)})
            async for reached, content in self._follow(after):
                await send({"type": "http.response.body", "body": content, "more_body": True})
                at = reached
            await send({"type": "http.response.body", "body": b""})
        finally:
            self._left(at)

    async def _follow(self, at: int) -> AsyncIterator[tuple[int, bytes]]:
        """The data to send, with the number of its last event."""
        sent = 0
        while True:
            if at < self.last:
                new = [self._events[i] for i in range(max(0, at + 1 - self.first), len(self._events))]
                at = self.last
                yield at, b"".join(new)
            elif self.is_finished:
                return
            elif (place := self.place()) != sent:
                sent = place
                yield at, b": queue %d\n\n" % place
            elif not await self._more(A_LOOK if sent else self.options.keep_alive) and not sent:
                yield at, KEEP_ALIVE

    async def _more(self, seconds: float | None) -> bool:
        """Waits for events; returns False if none came in time."""
        grown = self._grown
        try:
            async with asyncio.timeout(seconds):
                await grown.wait()
        except TimeoutError:
            return False
        return True

    def _wake(self) -> None:
        self._grown.set()
        self._grown = asyncio.Event()

    def _ended(self, task: asyncio.Task[None]) -> None:
        self._error = ApiError(503, "the stream was stopped") if task.cancelled() else task.exception()
        self.is_finished = True
        self._wake()

    def _left(self, at: int) -> None:
        """A reader that has everything up to event `at` has disconnected."""
        self._readers -= 1
        if self._readers:
            return
        if self.is_finished and at == self.last:
            self.forget()
        elif not at:  # without an event, the reader does not know the stream's id
            self.stop()
        else:
            self._leaving = asyncio.get_running_loop().call_later(self.options.resume_timeout, self._abandon)

    def _abandon(self) -> None:
        self.stop()
        self.forget()


async def until_disconnect(receive: Receive, work: Awaitable[None]) -> None:
    """Does the work, but stops when the client disconnects."""

    async def disconnect() -> None:
        while (await receive())["type"] != "http.disconnect":
            pass

    tasks = asyncio.ensure_future(work), asyncio.create_task(disconnect())
    try:
        await asyncio.wait(tasks, return_when=asyncio.FIRST_COMPLETED)
        if tasks[0].done():
            tasks[0].result()
    finally:
        for task in tasks:
            task.cancel()
        await asyncio.gather(*tasks, return_exceptions=True)
