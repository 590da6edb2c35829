"""Work on a list, some of it at once, with results in its order. No torch here."""

import threading
from collections import deque
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import Future
from typing import TypeVar

T = TypeVar("T")
R = TypeVar("R")


def in_order(work: Callable[[T], R], items: Iterable[T], most: int) -> Iterator[tuple[T, R]]:
    """Each item with work(item), in their order; `most` are worked on at once, each in a thread, or one after the other here.

    A failure is raised in its item's place. Threads whose results nobody takes any more end by themselves, or with the process.
    """
    if most == 1:
        for item in items:
            yield item, work(item)
        return
    under_way: deque[tuple[T, Future[R]]] = deque()
    for item in items:
        under_way.append((item, _started(work, item)))
        if len(under_way) == most:
            done, future = under_way.popleft()
            yield done, future.result()
    for item, future in under_way:
        yield item, future.result()


def _started(work: Callable[[T], R], item: T) -> "Future[R]":
    future: Future[R] = Future()

    def run() -> None:
        try:
            future.set_result(work(item))
        except BaseException as error:  # raised where the result is wanted
            future.set_exception(error)

    threading.Thread(target=run, name="ahead", daemon=True).start()
    return future
