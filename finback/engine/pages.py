"""Bookkeeping of cache pages: who holds them, and lookup of pages by the tokens that they store."""

import hashlib
from array import array
from collections import OrderedDict
from collections.abc import Collection, Sequence

import psutil
import torch
from torch import Tensor

from finback.model.compressed_cache import pool_of
from finback.model.transformer import Transformer

# state of a row besides its pages; see Pool.line
Line = list[Tensor]


class Pages:
    """Pages 1 … count of a pool, each held by any number of requests; page 0 is for padding.

    A full page can be published under a digest of all tokens up to its end. Once nobody holds it, it can still be found
    until its space is needed; the least recently used goes first.
    """

    def __init__(self, count: int, size: int) -> None:
        self.count, self.size = count, size
        self._blank = list(range(count, 0, -1))  # unused
        self._idle: OrderedDict[int, None] = OrderedDict()  # published but not held; oldest first
        self._holders = [0] * (count + 1)
        self._digest: dict[int, bytes] = {}
        self._page: dict[bytes, int] = {}
        # state of a row at the end of a digest's page; oldest first
        self._lines: OrderedDict[bytes, Line] = OrderedDict()

    @property
    def free(self) -> int:
        """Number of pages that can be taken."""
        return len(self._blank) + len(self._idle)

    @property
    def shared(self) -> int:
        """Number of pages that can be found by their tokens."""
        return len(self._page)

    def take(self) -> int:
        """Takes an exclusive page; the caller has checked that one is free."""
        if self._blank:
            page = self._blank.pop()
        else:
            page, _ = self._idle.popitem(last=False)
            del self._page[self._digest.pop(page)]
        self._holders[page] = 1
        return page

    def release(self, pages: Sequence[int]) -> None:
        """Releases pages, a request's last page first, so that those near the start can be found longest."""
        for page in reversed(pages):
            self._holders[page] -= 1
            assert self._holders[page] >= 0, f"page {page} released twice"
            if self._holders[page] == 0:
                if page in self._digest:
                    self._idle[page] = None
                else:
                    self._blank.append(page)

    def hold(self, pages: Sequence[int]) -> None:
        """Adds a holder to pages that are already held."""
        for page in pages:
            assert self._holders[page] > 0, f"page {page} is not held"
            self._holders[page] += 1

    def find(self, digest: bytes) -> int | None:
        """The page published under a digest, now also held by the caller."""
        page = self._page.get(digest)
        if page is not None:
            self._idle.pop(page, None)
            self._holders[page] += 1
        return page

    def publish(self, page: int, digest: bytes) -> None:
        """Publishes a full page; if an equal one is already published, that one stays."""
        if digest not in self._page and page not in self._digest:
            self._page[digest], self._digest[page] = page, digest

    def keep_line(self, digest: bytes, line: Line, most: int) -> None:
        """Stores the row state at the end of a digest's page; keeps the `most` last used ones."""
        self._lines[digest] = line
        self._lines.move_to_end(digest)
        while len(self._lines) > most:
            self._lines.popitem(last=False)

    def line(self, digest: bytes) -> Line | None:
        """The row state at the end of a digest's page, None if it is not stored."""
        if digest in self._lines:
            self._lines.move_to_end(digest)
        return self._lines.get(digest)

    def drop_line(self, digest: bytes) -> None:
        """Removes the stored row state."""
        self._lines.pop(digest, None)

    def forget(self) -> None:
        """Unpublishes all pages, because the weights have changed."""
        self._blank += self._idle
        self._idle.clear()
        self._digest.clear()
        self._lines.clear()
        self._page.clear()


def digest(before: bytes, tokens: Sequence[int]) -> bytes:
    """The name of a page: a hash of its tokens and all before. Cryptographic, so that prompts of others cannot collide."""
    return hashlib.blake2b(array("q", tokens).tobytes(), key=before, digest_size=16).digest()


def affordable(model: Transformer, parts: int, choices: Collection[str] = ()) -> int:
    """Number of cached tokens, with these recorded choices, that fit into 1 / `parts` of the free memory."""
    config, device = model.config, model.embed.device
    each = pool_of(config, 1, 0, model.compute, torch.device("meta"), choices=choices).bytes_per_token
    free = torch.cuda.mem_get_info(device)[0] if device.type == "cuda" else psutil.virtual_memory().available
    return int(free / parts / max(each, 1))  # V4 layers with only a window store nothing for distant tokens
