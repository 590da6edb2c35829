"""What RL pays for. R1-Zero's two parts: accuracy, and a little for an answer of the asked form (R1 2.2.2).

Thinking itself earns nothing. If answers grow longer, it is because thinking makes them right.
"""

from dataclasses import dataclass

from finback.config import check_fields
from finback.tasks.task import Verdict


@dataclass(frozen=True)
class Reward:
    """accuracy for a right answer, else form for a well-formed one, else 0; a right answer never earns less."""

    accuracy: float = 1.0
    form: float = 0.1

    def __post_init__(self) -> None:
        check_fields(self, "reward")

    def __call__(self, verdict: Verdict) -> float:
        if verdict.correct:
            return self.accuracy
        return self.form if verdict.well_formed else 0.0
