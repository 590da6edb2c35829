"""Who runs: admission in the order of arrival, pages for what they say next, and who steps back when none are left."""

from collections import deque

import torch
from torch import Tensor

from finback.engine.pages import Pages, digest
from finback.engine.request import Finish, Sequence


class Scheduler:
    """Sequences that wait and sequences that run, `rows` at most, on the pages of one pool.

    `table` (rows, pages) holds the pages of each running sequence in the line of its slot. With `reuse`, pages are
    published and a newcomer starts behind what others with the same salt have read. `patience` rows must be free before
    newcomers enter a batch that is running, so that many of them are read at once.
    """

    def __init__(self, pages: Pages, rows: int, longest: int, reuse: bool, patience: int = 1) -> None:
        self.pages, self.rows, self.reuse, self.patience = pages, rows, reuse, patience
        self.waiting: deque[Sequence] = deque()
        self.running: list[Sequence] = []  # oldest first
        self.table: Tensor = torch.zeros(rows, -(-longest // pages.size), dtype=torch.long)
        self._lines = self.table.numpy()
        self._slots = list(range(rows - 1, -1, -1))
        self._refused: tuple[Sequence, int, int] | None = None  # who lacked pages, when so many were free

    def admit(self) -> None:
        """Let waiting sequences in while rows and pages last; nobody overtakes one that lacks pages."""
        if self.running and len(self._slots) < self.patience:
            return
        held_back: list[Sequence] = []
        while self.waiting and self._slots:
            sequence = self.waiting.popleft()
            leader = sequence.leader
            if leader is not None and leader.finish is None and leader.computed < len(leader.prompt):
                held_back.append(sequence)
                continue
            # looking for its prefix again is work; it can have changed only if others have let go of pages
            state = (sequence, self.pages.free, len(self.running))
            if state == self._refused or not self._enter(sequence):
                self._refused = state
                self.waiting.appendleft(sequence)
                break
        self.waiting.extendleft(reversed(held_back))

    def _enter(self, sequence: Sequence) -> bool:
        found = self._find(sequence) if self.reuse and sequence.sampling.prompt_logprobs is None else []
        needed = self._pages_for(min(sequence.length + 1, sequence.end)) - len(found)
        # every running sequence will soon want a page; taking the last ones would only preempt somebody
        if needed > self.pages.free - len(self.running):
            self.pages.release(found)
            return False
        size = self.pages.size
        sequence.pages = found + [self.pages.take() for _ in range(needed)]
        sequence.computed, sequence.published = len(found) * size, len(found)
        if not sequence.preempted:
            sequence.cached = min(sequence.computed, len(sequence.prompt))
        sequence.slot = self._slots.pop()
        self._lines[sequence.slot, : len(sequence.pages)] = sequence.pages
        self.running.append(sequence)
        return True

    def _find(self, sequence: Sequence) -> list[int]:
        """Pages that others have filled with this sequence's first tokens; the last token is always left to read."""
        size, found, name = self.pages.size, [], sequence.salt
        for start in range(0, (sequence.length - 1) // size * size, size):
            following = digest(name, sequence.slice(start, start + size))
            page = self.pages.find(following)
            if page is None:
                break
            found.append(page)
            name = following
        sequence.digest = name
        return found

    def _pages_for(self, tokens: int) -> int:
        return -(-tokens // self.pages.size)

    def make_room(self, sequence: Sequence, tokens: int) -> bool:
        """Give a running sequence pages for this many tokens; False when it had to step back itself.

        The youngest steps back first: it loses least, and the oldest always gets on.
        """
        while len(sequence.pages) < self._pages_for(tokens):
            if self.pages.free == 0:
                youngest = self.running[-1]
                self.preempt(youngest)
                if youngest is sequence:
                    return False
                continue
            self._lines[sequence.slot, len(sequence.pages)] = page = self.pages.take()
            sequence.pages.append(page)
        return True

    def preempt(self, sequence: Sequence) -> None:
        """Send a running sequence back to the head of the queue; what it has said is read again later."""
        self._leave(sequence)
        sequence.preempted += 1
        self.waiting.appendleft(sequence)

    def publish(self, sequence: Sequence) -> None:
        """Let others find the pages that have become full."""
        size = self.pages.size
        while self.reuse and (sequence.published + 1) * size <= sequence.computed:
            start = sequence.published * size
            name = sequence.digest if sequence.published else sequence.salt
            sequence.digest = digest(name, sequence.slice(start, start + size))
            self.pages.publish(sequence.pages[sequence.published], sequence.digest)
            sequence.published += 1

    def finish(self, sequence: Sequence, reason: Finish) -> None:
        """End a sequence, wherever it stands; its pages are free at once."""
        sequence.finish = reason
        if sequence.slot >= 0:
            self._leave(sequence)
        elif sequence in self.waiting:
            self.waiting.remove(sequence)

    def _leave(self, sequence: Sequence) -> None:
        self.pages.release(sequence.pages)
        self._lines[sequence.slot, : len(sequence.pages)] = 0
        self._slots.append(sequence.slot)
        self.running.remove(sequence)
        sequence.slot, sequence.pages = -1, []
        sequence.computed = sequence.published = 0
        sequence.draft, sequence.drafts_from, sequence.digest = -1, 0, b""
