"""The thread that owns the engine, and communication between it and the event loop.

Work for the thread (submit, cancel, answer now) waits in a queue and is done between steps. All outputs of a step are
delivered with one call into the event loop.
"""

import asyncio
import contextlib
import hashlib
import queue
import threading
import time
from collections import deque
from collections.abc import Callable
from concurrent.futures import Future
from dataclasses import dataclass, field
from typing import TypeVar

from finback.engine.request import FinishReason, Request, SamplingParams
from finback.model.transformer import Transformer
from finback.serve.errors import ApiError, log, log_failure
from finback.serve.metrics import Metrics
from finback.serve.upstream import ServedEngine

T = TypeVar("T")
DEFAULT_VERSION = "default"  # vLLM's version name for the initial weights


@dataclass(frozen=True)
class ChoiceInput:
    """One choice to generate; `leader` is the index of an earlier choice with the same prompt."""

    prompt: list[int]
    sampling: SamplingParams
    seed: int
    thinking: bool = False
    leader: int | None = None
    adapter: str = ""


@dataclass(frozen=True)
class OutputDelta:
    """The new output of one choice since its last delta."""

    text: str
    # totals: all tokens, and tokens of the chain of thought
    tokens: int
    thinking_tokens: int
    # new tokens since the last delta, and seconds since then (None for the first tokens)
    new: int
    gap: float | None
    finish: FinishReason | None


@dataclass(eq=False)
class OutputStream:
    """The engine's requests behind one HTTP request, and their deltas in order of arrival, each with its choice."""

    # digest of the key of the request
    owner: bytes
    requests: list[Request] = field(default_factory=list)
    # versions of the weights that generated the first choice, each with the position of its first token
    versions: list[tuple[str, int]] = field(default_factory=list)
    error: ApiError | None = None
    _deltas: deque[tuple[int, OutputDelta]] = field(default_factory=deque)
    _arrived: asyncio.Event = field(default_factory=asyncio.Event)

    @property
    def started(self) -> bool:
        """Whether any of it has entered the batch."""
        return any(request.started for request in self.requests)

    async def next(self) -> list[tuple[int, OutputDelta]]:
        """All deltas since the last call, at least one; ApiError if the engine has failed."""
        await self._arrived.wait()
        found = list(self._deltas)
        self._deltas.clear()
        if self.error is None:
            self._arrived.clear()
        elif not found:
            raise self.error
        return found

    def put(self, index: int, delta: OutputDelta) -> None:
        """Delivers a delta; on the event loop only."""
        self._deltas.append((index, delta))
        self._arrived.set()

    def fail(self, error: ApiError) -> None:
        """Ends the request with an error; on the event loop only."""
        self.error = self.error or error
        self._arrived.set()


@dataclass
class _Delivered:
    """How much of a request's output has been delivered."""

    stream: OutputStream
    index: int
    pieces: int = 0
    tokens: int = 0
    # time of the last delta with tokens (perf_counter)
    time: float | None = None


class Worker:
    """Runs `engine` in its own thread between `start` and `close`. Its methods belong to the event loop."""

    def __init__(self, engine: ServedEngine, metrics: Metrics) -> None:
        self.engine, self.metrics = engine, metrics
        self.failure: str | None = None  # error of the last step, None once one succeeds
        self.stepped = time.monotonic()  # end of the last step, or arrival of work after a pause
        self.version = DEFAULT_VERSION  # version of the weights
        self._work: queue.SimpleQueue[Callable[[], object] | None] = queue.SimpleQueue()
        self._active: dict[Request, _Delivered] = {}
        self._loop: asyncio.AbstractEventLoop | None = None
        self._thread: threading.Thread | None = None
        self._stuck = False  # the engine cannot even be cleared after a failure: no more steps

    def start(self) -> None:
        """Starts the thread; outputs go to the running event loop."""
        self._loop = asyncio.get_running_loop()
        self._thread = threading.Thread(target=self._run, name="engine", daemon=True)
        self._thread.start()

    def close(self) -> None:
        """Ends the thread after the current step."""
        self._work.put(None)
        if self._thread is not None:
            self._thread.join(timeout=10)

    @property
    def active(self) -> int:
        """Number of choices that were submitted and have not ended."""
        return len(self._active)

    @property
    def alive(self) -> bool:
        """Whether the thread runs and its engine is usable."""
        return self._thread is not None and self._thread.is_alive() and not self._stuck

    def stalled(self, limit: float) -> bool:
        """Whether there is work but no step has ended for `limit` seconds."""
        return self.active > 0 and time.monotonic() - self.stepped > limit

    async def submit(self, choices: list[ChoiceInput], owner: bytes, salt: bytes) -> OutputStream:
        """Queues the choices of one request, all or none; UserError if one could never be served."""
        outputs, accepted = OutputStream(owner), Future[None]()
        self._work.put(lambda: self._submit(outputs, choices, salt, accepted))
        try:
            await asyncio.wrap_future(accepted)
        except asyncio.CancelledError:
            self.cancel(outputs)
            raise
        return outputs

    async def use(self, model: Transformer, version: str) -> None:
        """Switches to other weights before the next step."""
        done = Future[None]()
        self._work.put(lambda: self._use(model, version, done))
        await asyncio.wrap_future(done)

    def cancel(self, outputs: OutputStream) -> None:
        """Cancels a request's unfinished choices and frees their pages."""
        self._work.put(lambda: self._cancel(outputs))

    def answer_now(self, outputs: OutputStream) -> None:
        """Closes a request's open chains of thought."""
        self._work.put(lambda: list(map(self.engine.close_thinking, outputs.requests)))

    # ---- in the thread ---------------------------------------------------------------------------------------------

    def _run(self) -> None:
        while True:
            try:
                idle = self._stuck or not self.engine.busy
                work = self._work.get() if idle else self._work.get_nowait()
                if work is None:
                    return
                if idle:
                    self.stepped = time.monotonic()
                self._try(work)
            except queue.Empty:
                self._try(self._step)

    def _try(self, work: Callable[[], object]) -> None:
        try:
            work()
        except Exception as error:  # a kernel may raise anything; the server must survive it
            self._fail(error)

    def _step(self) -> None:
        changed = self.engine.step()
        outputs = [self._output(request) for request in changed if request in self._active]
        self.stepped, self.failure = time.monotonic(), None
        if outputs:
            self._call(_deliver, outputs)

    def _output(self, request: Request) -> tuple[OutputStream, int, OutputDelta]:
        delivered, now = self._active[request], time.perf_counter()
        assert request.detokenizer is not None, "the engine has no tokenizer"
        pieces, tokens = request.detokenizer.pieces, len(request.tokens)
        text, new = "".join(pieces[delivered.pieces :]), tokens - delivered.tokens
        gap = None if delivered.time is None else now - delivered.time
        delivered.pieces, delivered.tokens, delivered.time = len(pieces), tokens, now if tokens else None
        if request.finish_reason is not None:
            del self._active[request]
        delta = OutputDelta(text, tokens, request.thinking_tokens, new, gap, request.finish_reason)
        return delivered.stream, delivered.index, delta

    def _submit(self, outputs: OutputStream, choices: list[ChoiceInput], salt: bytes, accepted: Future[None]) -> None:
        if not accepted.set_running_or_notify_cancel():  # the client has disconnected
            return
        try:
            if self._stuck:
                raise ApiError(503, "the engine has failed; the server must be restarted", retry_after=30)
            outputs.versions.append((self.version, 0))
            if self.version != DEFAULT_VERSION:  # versions of the weights must not share cached prompts
                salt += hashlib.blake2b(self.version.encode(), digest_size=16).digest()
            for c in choices:
                leader = None if c.leader is None else outputs.requests[c.leader]
                outputs.requests.append(
                    self.engine.submit(
                        c.prompt, c.sampling, c.seed, salt=salt, leader=leader, thinking=c.thinking, adapter=c.adapter
                    )
                )
        except Exception as error:  # goes to the client
            for request in outputs.requests:
                self.engine.cancel(request)
            accepted.set_exception(error)
            return
        self._active |= {request: _Delivered(outputs, i) for i, request in enumerate(outputs.requests)}
        accepted.set_result(None)

    def _use(self, model: Transformer, version: str, done: Future[None]) -> None:
        if not done.set_running_or_notify_cancel():
            return
        self.engine.use(model)
        self.version = version
        for stream in {delivered.stream for delivered in self._active.values()}:
            stream.versions.append((version, len(stream.requests[0].tokens)))
        done.set_result(None)

    def _cancel(self, outputs: OutputStream) -> None:
        unfinished = [r for r in outputs.requests if self._active.pop(r, None) is not None]
        for request in unfinished:
            self.engine.cancel(request)
        self._call(self.metrics.totals.update, {"cancelled": len(unfinished)})

    def _fail(self, error: Exception) -> None:
        """Ends all running requests; the next one finds an empty engine."""
        self.failure = type(error).__name__
        log_failure("a step", error)
        self._call(self.metrics.totals.update, {"failed_steps": 1})
        streams = {delivered.stream for delivered in self._active.values()}
        try:
            for request in self._active:
                self.engine.cancel(request)
        except Exception as another:
            log.error("cannot clear the engine: %s", type(another).__name__)
        self._active.clear()
        self._stuck = self.engine.busy
        problem = ApiError(503, "the engine failed while generating this answer", code="engine_failed")
        for stream in streams:
            self._call(stream.fail, problem)

    def _call(self, function: Callable[[T], None], argument: T) -> None:
        assert self._loop is not None, "not started"
        with contextlib.suppress(RuntimeError):  # the loop is closed: nobody is waiting
            self._loop.call_soon_threadsafe(function, argument)


def _deliver(outputs: list[tuple[OutputStream, int, OutputDelta]]) -> None:
    for stream, index, delta in outputs:
        stream.put(index, delta)
