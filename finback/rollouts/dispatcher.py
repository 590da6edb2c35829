"""Requests divided among servers: each is answered once, by whichever server is free, and again by another where one fails.

No torch here.
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
    """How a server does within one call."""

    server: GenerationServer
    # failures and refusals in a row
    faults: int = 0
    busy: int = 0
    # asked for nothing before this time, nor blamed for what was under way when it was last blamed
    resume: float = 0.0
    blamed: float = 0.0
    # why it is asked for nothing more
    problem: str = ""
    last: str = ""


class Dispatcher(Generic[T]):
    """Has `count` requests answered by `ask(server, places)`; `results` gives each place once, as answers come.

    A server is asked for one after the other, `concurrency` at a time; or without that for its share of them at once. A request that
    fails is asked again, of any server that is left. A server is left alone for a while after a failure, and for good after
    `retries.tries` in a row (`busy_tries` where it says that it is busy).
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
        """Every place once, with its answer; UserError where a request fails for good or no server is left."""
        count, servers = len(self.waiting), len(self.healths)
        shares = [list(range(first, count, servers)) if self.concurrency is None else [] for first in range(servers)]
        if self.concurrency is None:  # the same for the same servers, however quick they are
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
            except BaseException as error:  # the user's mistake, or a defect, to be raised where somebody sees it
                self._found.put(error)
                return
            else:
                if began >= health.blamed:  # not what was under way when the server failed
                    health.faults = health.busy = 0

    def _next(self, health: _Health) -> list[int]:
        """Requests for a server, none when it is to be asked nothing more."""
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
            remedy = "See what it refuses, correct it, and give the same command again: the run goes on where it was."
            self._found.put(health.server.unfit(f"refuses a request: {error}", remedy))
            return
        self.waiting.extend(places)  # behind others, by when another server may be free
        health.last = str(error)
        if began >= health.blamed:  # what failed with it at the same time is the same failure
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
            remedy = "Start them again, then give the same command again: the run goes on where it was."
            field, urls = health.server.field, ", ".join(each.server.url for each in self.healths)
            self._found.put(UserError(field, urls, f"no server is left to answer: {said}", remedy))
        elif most >= self.retries.tries * len(self.healths):
            remedy = "See the servers' logs; a request that no server survives is a defect of theirs."
            self._found.put(health.server.unfit(f"a request failed {most} times: {error}", remedy))
