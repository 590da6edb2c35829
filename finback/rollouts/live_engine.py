"""An engine in its own thread: prompts may come from any thread, and weights may change between steps."""

import queue
import threading
from collections import deque
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import Future
from dataclasses import dataclass, field, replace

from finback.config import UserError
from finback.engine.engine import Engine
from finback.engine.request import Completion, Request, SamplingParams
from finback.model.cache import PAGE
from finback.model.transformer import Transformer

SIGNS = 1.0  # seconds between signs of life during long answers

# what comes back from a batch: an answer with its place, or the error that ended it
_Result = tuple[int, Completion] | BaseException


@dataclass(eq=False)
class _Batch:
    """Prompts submitted together, and the queue for their answers."""

    prompts: list[list[int]]
    sampling: SamplingParams
    seeds: list[int]
    results: "queue.SimpleQueue[_Result]" = field(default_factory=queue.SimpleQueue)

    @property
    def longest(self) -> int:
        """Upper bound of its longest request, in tokens."""
        return max(map(len, self.prompts)) + self.sampling.max_tokens


@dataclass(eq=False)
class _Asked:
    """A request in progress: its batch and place, and which weights have generated its tokens."""

    batch: _Batch
    place: int
    versions: list[tuple[int, int]]


class LiveEngine:
    """Runs `engine` until it is closed. New batches join those in progress."""

    def __init__(self, engine: Engine) -> None:
        self.engine, self.version = engine, -1
        # tokens of answers dropped because of new weights
        self.dropped = 0
        self._steps = 0
        self._work: queue.SimpleQueue[Callable[[], None] | None] = queue.SimpleQueue()
        self._active: dict[Request, _Asked] = {}
        # batches that exceed the cache's free space while others are in progress
        self._held: deque[_Batch] = deque()
        self._thread = threading.Thread(target=self._run, name="engine", daemon=True)
        self._thread.start()

    def answers(
        self, prompts: Sequence[Sequence[int]], sampling: SamplingParams, seeds: Sequence[int], patience: float
    ) -> Iterator[tuple[int, Completion] | None]:
        """Yields (place, answer) as each is done; None after `patience` seconds in which steps were made but no answer finished.

        In an idle engine the answers are bit-identical to those of `Engine.generate`.
        """
        batch = _Batch([list(ids) for ids in prompts], sampling, list(seeds))
        self._work.put(lambda: self._begin(batch))
        left, steps = len(prompts), self._steps
        try:
            while left:
                try:
                    result = batch.results.get(timeout=patience)
                except queue.Empty:
                    if steps != (steps := self._steps):
                        yield None
                    continue
                if isinstance(result, BaseException):
                    raise result
                left -= 1
                yield result
        finally:
            if left:
                self._work.put(lambda: self._forget(batch))

    def take(self, fill: Callable[[Transformer], None], version: int, drop: bool = False) -> None:
        """Calls `fill` to write other weights into the model before the next step, and waits for it.

        Answers in progress continue with the new weights, on cache entries of the old ones; or restart (drop).
        """
        done = Future[None]()

        def work() -> None:
            try:
                fill(self.engine.model)
                self._took(version, drop)
                done.set_result(None)
            except BaseException as error:
                done.set_exception(error)

        self._work.put(work)
        done.result()

    def close(self) -> None:
        """Ends the thread after the current step; callers that wait for answers get an error."""
        self._work.put(None)
        self._thread.join()

    # ---- in the thread ---------------------------------------------------------------------------------------------

    def _run(self) -> None:
        while True:
            try:
                work = self._work.get_nowait() if self.engine.busy else self._work.get()
                if work is None:
                    self._fail(RuntimeError("the engine was closed"))
                    return
                work()
            except queue.Empty:
                self._step()
            while self._held and not self.engine.busy:
                self._begin(self._held.popleft())

    def _begin(self, batch: _Batch) -> None:
        if self.engine.busy and batch.longest > self.engine.pages.count * PAGE:
            self._held.append(batch)
            return
        try:
            requests = self.engine.submit_all(batch.prompts, batch.sampling, batch.seeds)
        except UserError as error:
            batch.results.put(error)
            return
        self._active |= {r: _Asked(batch, place, [(self.version, 0)]) for place, r in enumerate(requests)}

    def _step(self) -> None:
        try:
            changed = self.engine.step()
        except Exception as error:  # any error of a kernel is passed on to the waiting callers
            self._fail(error)
            return
        self._steps += 1
        for request in changed:
            if request.finish_reason is not None and request in self._active:
                asked = self._active.pop(request)
                made = replace(request.completion(), versions=_spans(asked.versions, len(request.tokens)))
                asked.batch.results.put((asked.place, made))

    def _fail(self, error: Exception) -> None:
        """Ends all batches with an error."""
        for batch in {*self._held, *(asked.batch for asked in self._active.values())}:
            batch.results.put(error)
        list(map(self.engine.cancel, self._active))
        self._active.clear()
        self._held.clear()

    def _took(self, version: int, drop: bool) -> None:
        self.version = version
        self.engine.pages.forget()
        again = list(self._active.items()) if drop else []
        for request, _ in again:
            self.dropped += len(request.tokens)
            self.engine.cancel(request)
            del self._active[request]
        for request, asked in self._active.items():
            asked.versions.append((version, len(request.tokens)))
        for _, asked in again:
            batch, place = asked.batch, asked.place
            new = self.engine.submit(batch.prompts[place], batch.sampling, batch.seeds[place])
            self._active[new] = _Asked(batch, place, [(version, 0)])

    def _forget(self, batch: _Batch) -> None:
        for request in [r for r, asked in self._active.items() if asked.batch is batch]:
            self.engine.cancel(request)
            del self._active[request]
        if batch in self._held:
            self._held.remove(batch)


def _spans(versions: list[tuple[int, int]], end: int) -> tuple[tuple[int, int, int], ...]:
    """(version, start, end) of each version that has generated a token."""
    ends = [*(start for _, start in versions[1:]), end]
    return tuple((v, start, stop) for (v, start), stop in zip(versions, ends, strict=True) if stop > start)
