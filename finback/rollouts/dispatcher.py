"""Distributes requests among servers: each is answered once, by any free server, and retried elsewhere after a failure.

Does not import torch.
"""

import queue
import threading
import time
from collections import deque
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass
from typing import Generic, TypeVar

from finback.client import RequestFailed, Retries
from finback.config import UserError
from finback.rollouts.generation_server import GenerationServer

T = TypeVar("T")


@dataclass
class _Health:
    """The state of a server during one call."""

    server: GenerationServer
    # consecutive failures, and consecutive "busy" replies
    faults: int = 0
    busy: int = 0
    # not asked before this time; requests that were running when it last failed are not counted again
    resume: float = 0.0
    blamed: float = 0.0
    # why it is no longer used
    problem: str = ""
    last: str = ""


class Dispatcher(Generic[T]):
    """Sends `count` requests with `ask(server, places)`; `results` yields each place once, as answers arrive.

    Each server gets up to `concurrency` requests at a time; if it is None, each gets an equal share of all requests at once. A failed
    request is sent again, to any remaining server. After a failure a server pauses; after `retries.tries` consecutive failures
    (`busy_tries` if it reports that it is busy) it is no longer used.
    """

    def __init__(
        self,
        servers: Sequence[GenerationServer],
        ask: Callable[[GenerationServer, Sequence[int]], Iterable[tuple[int, T]]],
        count: int,
        concurrency: int | None,
        retries: Retries,
    ) -> None:
        self.ask, self.retries, self.concurrency = ask, retries, concurrency
        self.healths = [_Health(server) for server in servers]
        self.waiting, self.tries = deque(range(count)), [0] * count
        self._found: queue.SimpleQueue[tuple[int, T] | BaseException] = queue.SimpleQueue()
        self._changed = threading.Condition()
        self._stop = False

    def results(self) -> Iterator[tuple[int, T]]:
        """Yields every place once with its answer; UserError if a request fails for good or no server is left."""
        count, servers = len(self.waiting), len(self.healths)
        shares = [list(range(first, count, servers)) if self.concurrency is None else [] for first in range(servers)]
        if self.concurrency is None:  # a fixed assignment, regardless of their speed
            self.waiting.clear()
        for health, share in zip(self.healths, shares, strict=True):
            for _ in range(min(self.concurrency or 1, count)):
                threading.Thread(target=self._work, args=(health, share), daemon=True).start()
        try:
            for _ in range(count):
                found = self._found.get()
                if isinstance(found, BaseException):
                    raise found
                yield found
        finally:
            with self._changed:
                self._stop = True
                self._changed.notify_all()

    def _work(self, health: _Health, places: list[int]) -> None:
        while places := places or self._next(health):
            began = time.monotonic()
            try:
                for place, answer in self.ask(health.server, tuple(places)):
                    places.remove(place)
                    self._found.put((place, answer))
            except RequestFailed as error:
                with self._changed:
                    self._failed(health, places, error, began)
                    self._changed.notify_all()
                places = []
            except BaseException as error:  # a user error or a bug, raised again in the caller's thread
                self._found.put(error)
                return
            else:
                if began >= health.blamed:  # ignores requests that were running when the server failed
                    health.faults = health.busy = 0

    def _next(self, health: _Health) -> list[int]:
        """The next requests for a server; none if it is no longer used."""
        with self._changed:
            while not self._stop and not health.problem:
                wait = health.resume - time.monotonic()
                if self.waiting and wait <= 0:
                    left = sum(not each.problem for each in self.healths)
                    share = 1 if self.concurrency is not None else -(-len(self.waiting) // left)
                    return [self.waiting.popleft() for _ in range(share)]
                self._changed.wait(wait if wait > 0 else None)
            return []

    def _failed(self, health: _Health, places: Sequence[int], error: RequestFailed, began: float) -> None:
        if error.final:
            remedy = "Fix what it refuses, then run the same command: the run continues where it stopped."
            self._found.put(health.server.unfit(f"refuses a request: {error}", remedy))
            return
        self.waiting.extend(places)  # at the end, when another server may be free
        health.last = str(error)
        if began >= health.blamed:  # concurrent failures count as one
            health.blamed = time.monotonic()
            health.busy, health.faults = health.busy + error.busy, health.faults + (not error.busy)
            health.resume = time.monotonic() + self.retries.wait(error, health.faults + health.busy)
        for place in places:
            self.tries[place] += not error.busy
        most = max(self.tries)
        if health.faults >= self.retries.tries or health.busy >= self.retries.busy_tries:
            health.problem = health.last
        if all(each.problem for each in self.healths):
            said = "; ".join(f"{each.server.url}: {each.problem}" for each in self.healths)
            remedy = "Start them again, then run the same command: the run continues where it stopped."
            field, urls = health.server.field, ", ".join(each.server.url for each in self.healths)
            self._found.put(UserError(field, urls, f"no server is left: {said}", remedy))
        elif most >= self.retries.tries * len(self.healths):
            remedy = "See the servers' logs; a request that fails on every server is a bug there."
            self._found.put(health.server.unfit(f"a request failed {most} times: {error}", remedy))
