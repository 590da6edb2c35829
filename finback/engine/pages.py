"""Who holds which page of the cache, and which pages can be found again by what they hold."""

import hashlib
from array import array
from collections import OrderedDict
from collections.abc import Sequence

import psutil
import torch
from torch import Tensor

from finback.model.compressed_cache import pool_of
from finback.model.transformer import Transformer

# what a pool keeps of a row beside its pages; see Pool.line
Line = list[Tensor]


class Pages:
    """Pages 1 … count of a pool, each held by any number of requests; page 0 is for padding.

    A full page may be published under a digest of all tokens up to its end. When nobody holds it any more it stays
    findable until its room is needed, the longest unused first.
    """

    def __init__(self, count: int, size: int) -> None:
        self.count, self.size = count, size
        self._blank = list(range(count, 0, -1))  # hold nothing of use
        self._idle: OrderedDict[int, None] = OrderedDict()  # published, held by nobody; oldest first
        self._holders = [0] * (count + 1)
        self._digest: dict[int, bytes] = {}
        self._page: dict[bytes, int] = {}
        # behind the page of a digest, what a row was there beside its pages; oldest first
        self._lines: OrderedDict[bytes, Line] = OrderedDict()

    @property
    def free(self) -> int:
        """Pages that can be taken."""
        return len(self._blank) + len(self._idle)

    @property
    def shared(self) -> int:
        """Pages that can be found by their tokens."""
        return len(self._page)

    def take(self) -> int:
        """A page of one's own; the caller has made sure that one is free."""
        if self._blank:
            page = self._blank.pop()
        else:
            page, _ = self._idle.popitem(last=False)
            del self._page[self._digest.pop(page)]
        self._holders[page] = 1
        return page

    def release(self, pages: Sequence[int]) -> None:
        """Let go of pages, the last of a request first: those nearest the start stay findable longest."""
        for page in reversed(pages):
            self._holders[page] -= 1
            assert self._holders[page] >= 0, f"page {page} released twice"
            if self._holders[page] == 0:
                if page in self._digest:
                    self._idle[page] = None
                else:
                    self._blank.append(page)

    def hold(self, pages: Sequence[int]) -> None:
        """Hold pages that somebody holds already once more."""
        for page in pages:
            assert self._holders[page] > 0, f"page {page} is nobody's"
            self._holders[page] += 1

    def find(self, digest: bytes) -> int | None:
        """The page published under a digest, held from now on by the caller too."""
        page = self._page.get(digest)
        if page is not None:
            self._idle.pop(page, None)
            self._holders[page] += 1
        return page

    def publish(self, page: int, digest: bytes) -> None:
        """Make a full page findable; of two with equal tokens the first stays."""
        if digest not in self._page and page not in self._digest:
            self._page[digest], self._digest[page] = page, digest

    def keep_line(self, digest: bytes, line: Line, most: int) -> None:
        """Keep what a row is behind the page of a digest; of all, the `most` that were used last stay."""
        self._lines[digest] = line
        self._lines.move_to_end(digest)
        while len(self._lines) > most:
            self._lines.popitem(last=False)

    def line(self, digest: bytes) -> Line | None:
        """What a row was behind the page of a digest, if that is kept."""
        if digest in self._lines:
            self._lines.move_to_end(digest)
        return self._lines.get(digest)

    def drop_line(self, digest: bytes) -> None:
        """Keep it no longer."""
        self._lines.pop(digest, None)

    def forget(self) -> None:
        """Publish nothing any more: the weights have changed, and with them what the pages should hold."""
        self._blank += self._idle
        self._idle.clear()
        self._digest.clear()
        self._lines.clear()
        self._page.clear()


def digest(before: bytes, tokens: Sequence[int]) -> bytes:
    """The name of a page: tokens, and all that came before them. Cryptographic, for others' prompts must not collide."""
    return hashlib.blake2b(array("q", tokens).tobytes(), key=before, digest_size=16).digest()


def affordable(model: Transformer, parts: int) -> int:
    """Tokens of cache that one of so many equal parts of the free memory could hold."""
    config, device = model.config, model.embed.device
    each = pool_of(config, 1, 0, model.compute, torch.device("meta")).bytes_per_token
    free = torch.cuda.mem_get_info(device)[0] if device.type == "cuda" else psutil.virtual_memory().available
    return int(free / parts / max(each, 1))  # V4's layers with a window alone keep nothing of a token far back
