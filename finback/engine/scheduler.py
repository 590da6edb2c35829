"""Scheduling: admission in order of arrival, pages for the next tokens, and preemption if none are left."""

from collections import deque
from collections.abc import Callable

import torch
from torch import Tensor

from finback.engine.pages import Line, Pages, digest
from finback.engine.request import FinishReason, Prefix, Request


class Scheduler:
    """Waiting and running requests (at most `rows`) on the pages of one pool.

    `table` (rows, pages) holds the pages of each running request, in the row of its slot. With `reuse`, pages are published,
    and a new request starts after the prefix that others with the same salt have read. `patience` rows must be free before new
    requests enter a running batch, so that many are read at once. With `lined`, pages are not enough to continue from: a
    request starts where the state of a row is stored as well.
    """

    def __init__(
        self, pages: Pages, rows: int, longest: int, reuse: bool, patience: int = 1, lined: bool = False
    ) -> None:
        self.pages, self.rows, self.reuse, self.patience = pages, rows, reuse, patience
        self.lined = reuse and lined
        self.waiting: deque[Request] = deque()
        self.running: list[Request] = []  # oldest first
        self.table: Tensor = torch.zeros(rows, -(-longest // pages.size), dtype=torch.long)
        self._lines = self.table.numpy()
        self._slots = list(range(rows - 1, -1, -1))
        # requests that need not read their prompt because another has, with the prefix they start from
        self.forked: list[tuple[Request, Prefix]] = []
        self._leaders: list[Request] = []  # requests whose prefixes are held
        # called with a request before it is preempted and loses its pages
        self.on_preempt: Callable[[Request], None] = lambda request: None
        # called with a request that starts after cached pages, and the row state stored there
        self.on_continue: Callable[[Request, Line], None] = lambda request, line: None
        # the request that lacked pages, and the state at that time
        self._refused: tuple[Request, int, int] | None = None

    def admit(self) -> None:
        """Admits waiting requests while rows and pages last; no request overtakes one that lacks pages."""
        if self.running and len(self._slots) < self.patience:
            return
        held_back: list[Request] = []
        while self.waiting and self._slots:
            request = self.waiting.popleft()
            leader = request.leader
            if leader is not None and leader.finish_reason is None and leader.computed < len(leader.prompt):
                held_back.append(request)
                continue
            # searching for its prefix again is only worthwhile if pages have been released
            state = (request, self.pages.free, len(self.running))
            if state == self._refused or not self._enter(request):
                self._refused = state
                self.waiting.appendleft(request)
                if not self.running and self._drop_prefixes():
                    continue
                break
        self.waiting.extendleft(reversed(held_back))

    def _enter(self, request: Request) -> bool:
        size = self.pages.size
        prefix = request.leader.prefix if request.leader is not None and request.follows else None
        if prefix is not None:
            found = prefix.pages[:-1]
            self.pages.hold(found)
        else:
            found = self._find(request) if self.reuse and request.sampling.prompt_logprobs is None else []
        needed = self._pages_for(min(request.length + 1, request.end)) - len(found)
        # every running request will soon need a page; taking the last ones would only cause a preemption
        if needed > self.pages.free - len(self.running):
            self.pages.release(found)
            return False
        request.pages = found + [self.pages.take() for _ in range(needed)]
        request.computed, request.published = len(found) * size, len(found)
        if prefix is not None:
            self.forked.append((request, prefix))
            request.computed, request.published = len(request.prompt), 0
        self.stop_following(request)
        if not request.preempted:
            request.cached = min(request.computed, len(request.prompt))
        request.slot = self._slots.pop()
        self._lines[request.slot, : len(request.pages)] = request.pages
        self.running.append(request)
        line = self.pages.line(request.digest) if self.lined and found and prefix is None else None
        if line is not None:
            self.on_continue(request, line)
        return True

    def _find(self, request: Request) -> list[int]:
        """Cached pages of this request's prefix; the last token is always left to read."""
        size, found, names = self.pages.size, [], [request.salt]
        for start in range(0, (request.length - 1) // size * size, size):
            following = digest(names[-1], request.slice(start, start + size))
            page = self.pages.find(following)
            if page is None:
                break
            found.append(page)
            names.append(following)
        while self.lined and found and self.pages.line(names[-1]) is None:
            self.pages.release([found.pop()])
            names.pop()
        request.digest = names[-1]
        return found

    def _pages_for(self, tokens: int) -> int:
        return -(-tokens // self.pages.size)

    def make_room(self, request: Request, tokens: int) -> bool:
        """Gives a running request pages for this many tokens. Returns False if it was itself preempted.

        The youngest request is preempted first: it loses least, and the oldest always makes progress.
        """
        while len(request.pages) < self._pages_for(tokens):
            if self.pages.free == 0:
                if self._drop_prefixes():
                    continue
                youngest = self.running[-1]
                self.preempt(youngest)
                if youngest is request:
                    return False
                continue
            self._lines[request.slot, len(request.pages)] = page = self.pages.take()
            request.pages.append(page)
        return True

    def follow(self, request: Request, leader: Request) -> None:
        """Lets a waiting request start after its leader's prompt, if both are equal and the leader still reads it."""
        same = request.prompt == leader.prompt and request.salt == leader.salt
        alone = request.sampling.prompt_logprobs is not None or request.sampling.max_tokens == 0
        if same and not alone and leader.finish_reason is None and not leader.tokens:
            request.follows = True
            leader.followers += 1

    def lead(self, request: Request, state: Tensor, line: Line) -> None:
        """Stores for its followers what a request has read: the prompt's last state and the row's state."""
        pages = request.pages[: self._pages_for(len(request.prompt))]
        self.pages.hold(pages)
        request.prefix = Prefix(pages, state, line)
        self._leaders.append(request)

    def stop_following(self, request: Request) -> None:
        """Notes that a request no longer needs its leader's prefix; the last follower releases it."""
        leader = request.leader
        if leader is not None and request.follows:
            request.follows = False
            leader.followers -= 1
            if leader.followers == 0:
                self._let_go(leader)

    def _let_go(self, leader: Request) -> None:
        if leader.prefix is not None:
            self.pages.release(leader.prefix.pages)
            self._leaders.remove(leader)
            leader.prefix = None

    def _drop_prefixes(self) -> bool:
        """Releases all prefixes because pages are short; their followers then read their prompts themselves."""
        found = list(self._leaders)
        for leader in found:
            self._let_go(leader)
        return bool(found)

    def preempt(self, request: Request) -> None:
        """Moves a running request back to the head of the queue; its tokens are read again later."""
        self.on_preempt(request)
        self._leave(request)
        request.preempted += 1
        self.waiting.appendleft(request)

    def outgrow(self, window: int) -> None:
        """Moves requests back whose length has just passed `window` tokens: their cache must be computed again."""
        for request in list(self.running):
            if not request.outgrown and len(request.prompt) <= window < request.length:
                request.outgrown = True
                self.preempt(request)

    def publish(self, request: Request) -> None:
        """Publishes the pages of a request that have become full."""
        size = self.pages.size
        while self.reuse and (request.published + 1) * size <= request.computed:
            start = request.published * size
            name = request.digest if request.published else request.salt
            request.digest = digest(name, request.slice(start, start + size))
            self.pages.publish(request.pages[request.published], request.digest)
            request.published += 1

    def keep_line(self, request: Request, make: Callable[[int], Line]) -> None:
        """Stores the state of a row that is at the end of a full page, copied by `make`; for an answer only the newest."""
        if not self.lined or request.slot < 0 or not request.computed or request.computed % self.pages.size:
            return
        if request.lined:
            self.pages.drop_line(request.lined)
        self.pages.keep_line(request.digest, make(request.slot), 2 * self.rows)
        request.lined = request.digest if request.computed > len(request.prompt) else b""

    def finish(self, request: Request, reason: FinishReason) -> None:
        """Ends a request in any state and frees its pages at once."""
        request.finish_reason = reason
        self.stop_following(request)
        if request.slot >= 0:
            self._leave(request)
        elif request in self.waiting:
            self.waiting.remove(request)

    def _leave(self, request: Request) -> None:
        self.pages.release(request.pages)
        self._lines[request.slot, : len(request.pages)] = 0
        self._slots.append(request.slot)
        self.running.remove(request)
        request.slot, request.pages = -1, []
        request.computed = request.published = 0
        request.draft, request.drafts_from, request.digest = -1, 0, b""
