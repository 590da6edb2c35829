"""Losses that are not learnt from: NaN or infinite, or far above the usual."""

import math
import statistics
from collections import deque
from typing import Any, Literal

WINDOW = 128  # steps that say what is usual
ENOUGH = 32  # of them before anything is called unusual

Verdict = Literal["learn", "skip", "rewind"]


class Spikes:
    """Judges each step before it is learnt from.

    A step whose loss or gradient is not finite, or whose loss is more than `sigma` standard deviations above the mean
    of the last WINDOW, is skipped; `patience` of them in a row mean that the weights, not the data, are at fault, and
    the run goes back to its last checkpoint and on with the data that follow (as PaLM did, 2204.02311 5.1).
    """

    def __init__(self, sigma: float, patience: int) -> None:
        self.sigma, self.patience = sigma, patience
        self.usual: deque[float] = deque(maxlen=WINDOW)
        self.in_a_row = 0

    def judge(self, loss: float, norm: float) -> Verdict:
        """What to do with a step of this loss and gradient norm; what is learnt from becomes usual."""
        if math.isfinite(loss) and math.isfinite(norm) and not self._unusual(loss):
            self.usual.append(loss)
            self.in_a_row = 0
            return "learn"
        self.in_a_row += 1
        return "rewind" if self.in_a_row >= self.patience else "skip"

    def _unusual(self, loss: float) -> bool:
        if not self.sigma or len(self.usual) < ENOUGH:
            return False
        # a floor under the spread: a loss that has hardly moved is no reason to call a hundredth more a spike
        spread = max(statistics.pstdev(self.usual), 0.01 * statistics.fmean(self.usual))
        return loss > statistics.fmean(self.usual) + self.sigma * spread

    def state(self) -> dict[str, Any]:
        """What resuming needs."""
        return {"usual": list(self.usual), "in_a_row": self.in_a_row}

    def load_state(self, state: dict[str, Any]) -> None:
        """Take back what `state` gave."""
        self.usual = deque(state["usual"], maxlen=WINDOW)
        self.in_a_row = state["in_a_row"]
