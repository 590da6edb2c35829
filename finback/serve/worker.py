"""The thread that owns the engine, and the way from the event loop to it and back.

Orders (submit, cancel, answer now) go to the thread through a queue and are taken between two steps. What a step has made
comes back with one call into the event loop, however many requests had a part in it.
"""

import asyncio
import contextlib
import logging
import queue
import threading
import time
import traceback
from collections import deque
from collections.abc import Callable
from dataclasses import dataclass, field

from finback.engine.engine import Engine
from finback.engine.request import FinishReason, Request, SamplingParams
from finback.serve.errors import ApiError
from finback.serve.metrics import Metrics

log = logging.getLogger("finback.serve")


@dataclass(frozen=True)
class OutputDelta:
    """What a request has got since the last news. `made` and `thought` are tokens since its start."""

    text: str
    made: int
    thought: int
    finish: FinishReason | None
    at: float  # when, in perf_counter's time


@dataclass(frozen=True)
class ChoiceInput:
    """One choice to generate; `leader` is the place in the request of a choice with the same prompt."""

    prompt: list[int]
    sampling: SamplingParams
    seed: int
    thinking: bool = False
    leader: int | None = None


@dataclass(eq=False)
class OutputStream:
    """One job's engine requests, and its news in order of arrival, each with the number of its choice."""

    requests: list[Request] = field(default_factory=list)
    error: ApiError | None = None
    inbox: deque[tuple[int, OutputDelta]] = field(default_factory=deque)
    _arrived: asyncio.Event = field(default_factory=asyncio.Event)

    @property
    def started(self) -> bool:
        """Whether any of it has entered the batch."""
        return any(s.started for s in self.requests)

    async def next(self) -> list[tuple[int, OutputDelta]]:
        """All that has come since the last call, at least one; ApiError when the engine has failed."""
        await self._arrived.wait()
        self._arrived.clear()
        found = list(self.inbox)
        self.inbox.clear()
        if not found and self.error is not None:
            self._arrived.set()
            raise self.error
        if self.error is not None:
            self._arrived.set()  # the next call raises
        return found

    def put(self, index: int, news: OutputDelta) -> None:
        """Deliver news; on the event loop only."""
        self.inbox.append((index, news))
        self._arrived.set()

    def fail(self, error: ApiError) -> None:
        """End the request with an error; on the event loop only."""
        self.error = self.error or error
        self._arrived.set()


@dataclass
class _Watched:
    ticket: OutputStream
    index: int
    pieces: int = 0  # of the text, that are out


class Worker:
    """Runs `engine` in a thread of its own between `start` and `close`. Its methods belong to the event loop."""

    def __init__(self, engine: Engine, metrics: Metrics) -> None:
        self.engine, self.metrics = engine, metrics
        self.failure: str | None = None  # why the last step failed, until one succeeds
        self.stepped = time.monotonic()  # when the last step ended, or work came after a pause
        self._orders: queue.SimpleQueue[Callable[[], None] | None] = queue.SimpleQueue()
        self._watched: dict[Request, _Watched] = {}
        self._loop: asyncio.AbstractEventLoop | None = None
        self._thread: threading.Thread | None = None
        self._stuck = False  # the engine cannot even let go of what has failed: no more steps

    def start(self) -> None:
        """Begin to take orders; news go to the running event loop."""
        self._loop = asyncio.get_running_loop()
        self._thread = threading.Thread(target=self._run, name="engine", daemon=True)
        self._thread.start()

    def close(self) -> None:
        """Take no more orders; waits for the step that is under way."""
        self._orders.put(None)
        if self._thread is not None:
            self._thread.join(timeout=10)

    @property
    def alive(self) -> bool:
        """Whether the thread runs and its engine is sound."""
        return self._thread is not None and self._thread.is_alive() and not self._stuck

    def stalled(self, limit: float) -> bool:
        """Whether there is work and no step has ended for `limit` seconds."""
        return bool(self._watched) and time.monotonic() - self.stepped > limit

    async def submit(self, orders: list[ChoiceInput], salt: bytes) -> OutputStream:
        """Queue the choices of one request, all or none; UserError when one can never be served."""
        assert self._loop is not None, "not started"
        ticket, accepted = OutputStream(), self._loop.create_future()
        self._orders.put(lambda: self._submit(ticket, orders, salt, accepted))
        try:
            await accepted
        except asyncio.CancelledError:
            self.cancel(ticket)
            raise
        return ticket

    def cancel(self, ticket: OutputStream) -> None:
        """Free whatever a request still holds."""
        self._orders.put(lambda: self._cancel(ticket))

    def answer_now(self, ticket: OutputStream) -> None:
        """Have a request's open chains of thought closed."""
        self._orders.put(lambda: self._close_thinking(ticket))

    # ---- in the thread ---------------------------------------------------------------------------------------------

    def _run(self) -> None:
        while True:
            try:
                idle = self._stuck or not self.engine.busy
                order = self._orders.get() if idle else self._orders.get_nowait()
                if order is None:
                    return
                if idle:
                    self.stepped = time.monotonic()
                self._try(order)
            except queue.Empty:
                self._try(self._step)

    def _try(self, work: Callable[[], None]) -> None:
        try:
            work()
        except Exception as error:  # whatever a kernel may raise; the server outlives it
            self._fail(error)

    def _step(self) -> None:
        changed = self.engine.step()
        news = [self._news(s) for s in changed if s in self._watched]
        self.stepped, self.failure = time.monotonic(), None
        if news:
            self._call(lambda: _deliver(news))

    def _news(self, request: Request) -> tuple[OutputStream, int, OutputDelta]:
        watched = self._watched[request]
        assert request.detokenizer is not None, "the engine has no tokenizer"
        pieces = request.detokenizer.pieces
        text = "".join(pieces[watched.pieces :])
        watched.pieces = len(pieces)
        if request.finish_reason is not None:
            del self._watched[request]
        news = OutputDelta(
            text, len(request.tokens), request.thinking_tokens, request.finish_reason, time.perf_counter()
        )
        return watched.ticket, watched.index, news

    def _submit(
        self, ticket: OutputStream, orders: list[ChoiceInput], salt: bytes, accepted: asyncio.Future[None]
    ) -> None:
        try:
            if self._stuck:
                raise ApiError(503, "the engine has failed; the server must be restarted", retry_after=30)
            for order in orders:
                leader = None if order.leader is None else ticket.requests[order.leader]
                request = self.engine.submit(
                    order.prompt, order.sampling, order.seed, salt=salt, leader=leader, thinking=order.thinking
                )
                ticket.requests.append(request)
        except Exception as error:  # for the one who asked
            problem = error
            self._call(lambda: _settle(accepted, problem))
            for request in ticket.requests:
                self.engine.cancel(request)
            return
        self._watched |= {s: _Watched(ticket, i) for i, s in enumerate(ticket.requests)}
        self._call(lambda: _settle(accepted, None))

    def _close_thinking(self, ticket: OutputStream) -> None:
        for request in ticket.requests:
            self.engine.close_thinking(request)

    def _cancel(self, ticket: OutputStream) -> None:
        open_ = [s for s in ticket.requests if self._watched.pop(s, None) is not None]
        for request in open_:
            self.engine.cancel(request)
        if open_:
            self._call(lambda: self._count_cancelled(len(open_)))

    def _count_cancelled(self, number: int) -> None:
        self.metrics.cancelled += number

    def _fail(self, error: Exception) -> None:
        """End everything that was under way; the next request finds an empty engine."""
        self.failure = type(error).__name__
        # where it failed, without the message: it may quote what somebody wrote
        log.error("a step failed: %s\n%s", self.failure, "".join(traceback.format_tb(error.__traceback__)))
        tickets = {watched.ticket for watched in self._watched.values()}
        try:
            for request in self._watched:
                self.engine.cancel(request)
        except Exception as another:
            log.error("cannot clear the engine: %s", type(another).__name__)
        self._watched.clear()
        self._stuck = self.engine.busy
        problem = ApiError(503, "the model failed while it made this answer", code="engine_failed")
        self._call(lambda: self._report(tickets, problem))

    def _report(self, tickets: set[OutputStream], problem: ApiError) -> None:
        self.metrics.failures += 1
        for ticket in tickets:
            ticket.fail(problem)

    def _call(self, function: Callable[[], None]) -> None:
        assert self._loop is not None
        with contextlib.suppress(RuntimeError):  # the loop has been closed: nobody is left to tell
            self._loop.call_soon_threadsafe(function)


def _deliver(news: list[tuple[OutputStream, int, OutputDelta]]) -> None:
    for ticket, index, one in news:
        ticket.put(index, one)


def _settle(accepted: asyncio.Future[None], problem: Exception | None) -> None:
    if accepted.done():  # the one who asked has left
        return
    if problem is None:
        accepted.set_result(None)
    else:
        accepted.set_exception(problem)
