"""An interpolated Kneser-Ney model of token n-grams (Chen and Goodman 1998, eq. 28), a baseline for neural models."""

from typing import Any

import numpy as np
from numpy.typing import NDArray

Ints = NDArray[np.int64]
Floats = NDArray[np.float64]


class KneserNey:
    """p(token | up to `order` - 1 tokens before it), learnt from one array of tokens below `vocab`."""

    def __init__(self, tokens: Ints, vocab: int, order: int = 5) -> None:
        self.vocab, self.order = vocab, order
        self.keys: list[
            Ints
        ] = []  # of each order, sorted: id of the n-gram without its last token * vocab + that token
        here, firsts = np.zeros(len(tokens), dtype=np.int64), list[Ints]()
        ids = list[Ints]()  # of each order: which n-gram ends at a position
        for n in range(1, order + 1):
            before = np.concatenate([[0], here[:-1]]) if n > 1 else np.zeros(len(tokens), dtype=np.int64)
            begin = n - 1  # earlier positions do not have n - 1 tokens before them
            found, first, inverse = np.unique(
                before[begin:] * vocab + tokens[begin:], return_index=True, return_inverse=True
            )
            here = np.full(len(tokens), -1, dtype=np.int64)
            here[begin:] = inverse
            self.keys.append(found)
            firsts.append(first + begin)
            ids.append(here)
        self.counts = [self._counts(n, ids, firsts) for n in range(1, order + 1)]
        self._discount()

    def _counts(self, n: int, ids: list[Ints], firsts: list[Ints]) -> Floats:
        """How often each n-gram occurs or, below the highest order, after how many different tokens."""
        size = len(self.keys[n - 1])
        ends = ids[n - 1][n - 1 :] if n == self.order else ids[n - 1][firsts[n]]
        return np.bincount(ends, minlength=size).astype(float)

    def _discount(self) -> None:
        """Computes the discount of each order, and each context's total and its weight for the lower order."""
        self.discounts, self.totals, self.backed = list[float](), list[NDArray[Any]](), list[NDArray[Any]]()
        for n, (keys, counts) in enumerate(zip(self.keys, self.counts, strict=True), start=1):
            once, twice = float((counts == 1).sum()), float((counts == 2).sum())
            discount = once / (once + 2 * twice) if once else 0.5
            contexts = keys // self.vocab
            size = 1 if n == 1 else len(self.keys[n - 2])
            total = np.bincount(contexts, weights=counts, minlength=size)
            kinds = np.bincount(contexts[counts > 0], minlength=size)
            self.discounts.append(discount)
            self.totals.append(total)
            self.backed.append(discount * kinds)

    def _find(self, n: int, context: Ints, tokens: Ints) -> Ints:
        """Ids of n-grams; -1 if one was never seen, or its context was not (-1)."""
        wanted, keys = context * self.vocab + tokens, self.keys[n - 1]
        place = np.searchsorted(keys, wanted).clip(max=len(keys) - 1)
        return np.where((context >= 0) & (keys[place] == wanted), place, -1)

    def probabilities(self, tokens: Ints) -> Floats:
        """p of each token given those before it in the array."""
        context, p = np.zeros(len(tokens), dtype=np.int64), np.full(len(tokens), 1 / self.vocab)
        for n in range(1, self.order + 1):
            found = self._find(n, context, tokens)
            p = self._mixed(n, context, found, p)
            context = np.concatenate([[-1], found[:-1]])
        return p

    def _mixed(self, n: int, context: Ints, found: Ints, lower: Floats) -> Floats:
        total = np.where(context >= 0, self.totals[n - 1][context], 0.0)
        count = np.where(found >= 0, self.counts[n - 1][found], 0.0)
        seen = np.maximum(count - self.discounts[n - 1], 0.0)
        with np.errstate(invalid="ignore", divide="ignore"):
            mixed = (seen + self.backed[n - 1][context] * lower) / total
        return np.where(total > 0, mixed, lower)

    def check(self, tokens: Ints, at: int) -> None:
        """Checks that the probabilities of all tokens at position `at` sum to one."""
        begin = max(0, at - self.order + 1)
        rows = [np.append(tokens[begin:at], word) for word in range(self.vocab)]
        total = sum(float(self.probabilities(row)[-1]) for row in rows)
        assert abs(total - 1) < 1e-6, f"probabilities at {at} sum to {total}"
