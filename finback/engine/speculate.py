"""Decides when drafting pays off: measures steps with and without drafts, and the acceptance of drafts."""

from collections import defaultdict

SLOW = 0.9  # weight of the past in moving averages
PROBE = 64  # decisions between two measurements without drafts
FORGET = 512  # decisions after which drafting is tried again


class Speculation:
    """Decides for each decoding step whether to use drafts, by tokens per second measured in this process.

    A step with drafts reads two tokens per row and also runs the MTP module. With few rows that is almost free, because a
    step is bound by reading the weights; with many rows it is not. Batches of similar size are compared.
    """

    def __init__(self) -> None:
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
        """Whether drafts give more tokens per second at this batch size, as far as is known."""
        size = rows.bit_length()
        if size not in self._plain or size not in self._drafting:
            return True
        return (1 + self.acceptance) * self._plain[size] > self._drafting[size]

    def saw(self, rows: int, kind: str, seconds: float, drafted: int, accepted: int) -> None:
        """Records the time of a step and the result of its drafts."""
        times = self._drafting if kind == "draft" else self._plain
        size = rows.bit_length()
        times[size] = SLOW * times.get(size, seconds) + (1 - SLOW) * seconds
        if drafted:
            # a batch of drafts has the weight of all its members
            weight = SLOW**drafted
            self.acceptance = weight * self.acceptance + (1 - weight) * accepted / drafted
