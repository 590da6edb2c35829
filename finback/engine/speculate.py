"""Drafts from n-grams, and the decision when to draft: steps with and without drafts are timed, acceptance is measured."""

from collections import defaultdict
from collections.abc import Sequence
from typing import TYPE_CHECKING, Literal

from finback.config import UserError

if TYPE_CHECKING:
    from finback.model.config import ModelConfig

SLOW = 0.9  # weight of the past in moving averages
PROBE = 64  # decisions between two measurements without drafts
FORGET = 512  # decisions after which drafting is tried again


# mtp: the model's MTP module drafts one token a step; ngram: drafts repeat what followed the same tokens before
Drafting = Literal["mtp", "ngram"]
GRAMS = 3, 2  # lengths of the runs of tokens to look up, in this order; the first one found is used
NGRAM_DRAFTS = 4  # tokens per step


class PromptLookup:
    """Drafts what followed the previous occurrence of a request's last tokens (prompt lookup decoding, Saxena 2023)."""

    def __init__(self) -> None:
        # run of tokens -> end of its last occurrence, not counting one at the very end of the text
        self._ends: dict[tuple[int, ...], int] = {}
        self._indexed = 0

    def drafts(self, tokens: Sequence[int], most: int) -> list[int]:
        """At most `most` tokens that may follow `tokens`, which must start with the sequence of the last call."""
        for end in range(self._indexed + 1, len(tokens)):
            for size in GRAMS:
                if end >= size:
                    self._ends[tuple(tokens[end - size : end])] = end
        self._indexed = max(self._indexed, len(tokens) - 1)
        for size in GRAMS:
            found = self._ends.get(tuple(tokens[-size:])) if len(tokens) > size else None
            if found is not None:
                return list(tokens[found : found + most])
        return []


class Speculation:
    """Decides for each decoding step whether to use drafts, by tokens per second measured in this process.

    A step with MTP drafts reads two tokens per row and also runs the MTP module; one with n-grams reads up to five. With few
    rows that is almost free, because reading the weights takes most of a step; with many rows it is not. Batches of similar
    size are compared.
    """

    def __init__(self) -> None:
        # accepted drafts per MTP draft, or per row with n-grams
        self.acceptance = 0.8  # V3 reports 85 to 90 % (5.4.3); soon replaced by measurements
        self._plain: dict[int, float] = {}
        self._drafting: dict[int, float] = {}
        self._decisions: defaultdict[int, int] = defaultdict(int)

    def choose(self, rows: int) -> str:
        """ "draft", "plain", or "probe": a step without drafts that keeps MTP's entries up to date."""
        size = rows.bit_length()
        self._decisions[size] += 1
        count = self._decisions[size]
        if size not in self._drafting:
            return "draft"
        if size not in self._plain or (count % PROBE == 0 and self.worth(rows)):
            return "probe"
        if self.worth(rows):
            return "draft"
        if count % FORGET == 0:
            del self._drafting[size]
        return "plain"

    def worth(self, rows: int) -> bool:
        """Whether drafts give more tokens per second at this batch size; True until both kinds of steps are measured."""
        size = rows.bit_length()
        if size not in self._plain or size not in self._drafting:
            return True
        return (1 + self.acceptance) * self._plain[size] > self._drafting[size]

    def saw(self, rows: int, kind: str, seconds: float, drafted: int, accepted: int) -> None:
        """Records the time of a step and the result of its drafts; for n-grams, `drafted` is the number of rows."""
        times = self._drafting if kind == "draft" else self._plain
        size = rows.bit_length()
        times[size] = SLOW * times.get(size, seconds) + (1 - SLOW) * seconds
        if drafted:
            # a batch of drafts has the weight of all its members
            weight = SLOW**drafted
            self.acceptance = weight * self.acceptance + (1 - weight) * accepted / drafted


def speculation_of(draft: Drafting, mtp_modules: int, config: "ModelConfig") -> Speculation | None:
    """A Speculation, or None if nothing can draft. UserError if the model does not support n-gram drafts."""
    if draft == "ngram" and config.attention == "compressed":
        problem = "V4's compressed cache can drop only one draft at a time, and n-grams draft several"
        raise UserError("draft", draft, problem, 'Use "mtp", or leave out drafts.')
    return Speculation() if draft == "ngram" or mtp_modules else None
