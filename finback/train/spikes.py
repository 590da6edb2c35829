"""Detects losses that should not be learned from: NaN, infinite, or far above normal."""

import math
import statistics
from collections import deque
from typing import Any, Literal

WINDOW = 128  # steps that define what is normal
ENOUGH = 32  # steps needed before any loss counts as abnormal

Verdict = Literal["learn", "skip", "rewind"]


class Spikes:
    """Decides for each step whether to learn from it.

    A step is skipped if its loss or gradient is not finite, or if its loss is more than `sigma` standard deviations above the
    mean of the last WINDOW steps. `patience` skipped steps in a row mean that the weights, not the data, are at fault: the run
    returns to its last checkpoint and continues with the data that follow (as PaLM did, 2204.02311 5.1).
    """

    def __init__(self, sigma: float, patience: int) -> None:
        self.sigma, self.patience = sigma, patience
        self.usual: deque[float] = deque(maxlen=WINDOW)
        self.in_a_row = 0

    def judge(self, loss: float, norm: float) -> Verdict:
        """Verdict for a step with this loss and gradient norm; accepted losses update the statistics."""
        if math.isfinite(loss) and math.isfinite(norm) and not self._unusual(loss):
            self.usual.append(loss)
            self.in_a_row = 0
            return "learn"
        self.in_a_row += 1
        return "rewind" if self.in_a_row >= self.patience else "skip"

    def _unusual(self, loss: float) -> bool:
        if not self.sigma or len(self.usual) < ENOUGH:
            return False
        # lower bound of the spread: when the loss hardly varies, 1 % more is not yet a spike
        spread = max(statistics.pstdev(self.usual), 0.01 * statistics.fmean(self.usual))
        return loss > statistics.fmean(self.usual) + self.sigma * spread

    def state(self) -> dict[str, Any]:
        """State for a checkpoint."""
        return {"usual": list(self.usual), "in_a_row": self.in_a_row}

    def load_state(self, state: dict[str, Any]) -> None:
        """Restores what `state` returned."""
        self.usual = deque(state["usual"], maxlen=WINDOW)
        self.in_a_row = state["in_a_row"]
