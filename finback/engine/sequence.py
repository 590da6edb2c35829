"""The nouns of generation: what is asked, what comes back."""

from dataclasses import dataclass
from typing import Literal

from finback.config import UserError


@dataclass(frozen=True)
class Sampling:
    """How tokens are chosen. temperature 0 is greedy; `seed` fixes a sequence whatever else is in its batch."""

    temperature: float = 1.0
    max_tokens: int = 128

    def __post_init__(self) -> None:
        if self.temperature < 0:
            raise UserError(
                "temperature", self.temperature, "negative", "Use 0 for greedy or a positive number."
            )
        if self.max_tokens < 1:
            raise UserError("max_tokens", self.max_tokens, "nothing to generate", "Use at least 1.")


@dataclass(frozen=True)
class Completion:
    """Generated ids (without prompt; the final eos included) with log-probabilities under the sampling distribution."""

    tokens: list[int]
    logprobs: list[float]
    finish: Literal["stop", "length"]
