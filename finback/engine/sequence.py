"""The nouns of generation: what is asked, what comes back."""

from dataclasses import dataclass
from typing import Literal

from finback.config import UserError


@dataclass(frozen=True)
class Sampling:
    """How tokens are chosen. temperature 0 is greedy; `seed` fixes a sequence whatever else is in its batch."""

    temperature: float = 1.0
    max_tokens: int = 128
    top_k: int = 0  # only the k likeliest tokens; 0: all
    top_p: float = 1.0  # only the likeliest tokens that together reach this probability
    min_p: float = 0.0  # only tokens with this share of the likeliest one's probability

    def __post_init__(self) -> None:
        if self.temperature < 0:
            raise UserError(
                "temperature", self.temperature, "negative", "Use 0 for greedy or a positive number."
            )
        if self.top_k < 0:
            raise UserError("top_k", self.top_k, "negative", "Use 0 for all tokens.")
        if not 0 < self.top_p <= 1:
            raise UserError("top_p", self.top_p, "not above 0 and up to 1", "Use 1 for all tokens.")
        if not 0 <= self.min_p <= 1:
            raise UserError("min_p", self.min_p, "not in 0..1", "Use 0 for all tokens.")
        if self.max_tokens < 1:
            raise UserError("max_tokens", self.max_tokens, "nothing to generate", "Use at least 1.")


@dataclass(frozen=True)
class Completion:
    """Generated ids (without prompt; the final eos included) with log-probabilities under the sampling distribution."""

    tokens: list[int]
    logprobs: list[float]
    finish: Literal["stop", "length"]
