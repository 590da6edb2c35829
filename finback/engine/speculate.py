"""When drafting pays: the time of steps with and without drafts, and how many drafts were right."""

from collections import defaultdict

SLOW = 0.9  # weight of the past in moving averages
PROBE = 64  # decisions between two looks at the step without drafts
FORGET = 512  # decisions after which a verdict against drafts is tried again


class Speculation:
    """Decides for each decoding step whether to verify drafts, by tokens per second measured in this process.

    A step with drafts reads two tokens per row and runs the MTP module besides. With few rows that is nearly free, for a
    step waits for the weights; with many it is not. Steps are compared among batches of about the same size.
    """

    def __init__(self) -> None:
        self.acceptance = 0.8  # V3 reports 85 to 90 % (5.4.3); soon replaced by what is seen
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
        """Whether drafts give more tokens per second in batches of this size, as far as is known."""
        size = rows.bit_length()
        if size not in self._plain or size not in self._drafting:
            return True
        return (1 + self.acceptance) * self._plain[size] > self._drafting[size]

    def saw(self, rows: int, kind: str, seconds: float, drafted: int, accepted: int) -> None:
        """Note what a step took and what came of its drafts."""
        times = self._drafting if kind == "draft" else self._plain
        size = rows.bit_length()
        times[size] = SLOW * times.get(size, seconds) + (1 - SLOW) * seconds
        if drafted:
            # a batch of drafts counts as many times as it has members
            weight = SLOW**drafted
            self.acceptance = weight * self.acceptance + (1 - weight) * accepted / drafted
