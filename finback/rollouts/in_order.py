"""Processes a list concurrently and yields results in order. Does not import torch."""

import threading
from collections import deque
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import Future
from typing import TypeVar

T = TypeVar("T")
R = TypeVar("R")


def in_order(work: Callable[[T], R], items: Iterable[T], most: int) -> Iterator[tuple[T, R]]:
    """Yields each item with work(item), in order. Up to `most` run at once in threads; with 1, one by one in this thread.

    A failure is raised at its item's turn. Threads whose results are no longer wanted end by themselves or with the process.
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
        except BaseException as error:  # raised when the result is taken
            future.set_exception(error)

    threading.Thread(target=run, name="ahead", daemon=True).start()
    return future
