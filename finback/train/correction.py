"""Corrections for the mismatch between the engine's and the trainer's probabilities, as pure functions.

Notation: log-probability of a sampled token under the engine (b), the trainer before the update (o), and the weights being
trained (p); d = o - b. All tensors are (answers, tokens); `mask` is 1 for tokens that count. Weights carry no gradient.
Masked tokens stay in the denominators of averages, so masking answers makes a step smaller, not the others heavier.
"""

from dataclasses import dataclass
from typing import Literal

import torch
from torch import Tensor

from finback.config import UserError, check_fields, check_positive

FARTHEST = 20  # |log ratio| at which it is clamped before exp


@dataclass(frozen=True)
class Correction:
    """How much tokens and answers count where engine and trainer differ; the default corrects nothing.

    Truncated importance sampling: mode="token_truncate" or "sequence_truncate". IcePop (2510.18855): mode="token_mask",
    clip_min=0.5, clip_max=5.0. V3.2 (2512.02556): off_policy_mask_threshold. Weights of several forms multiply.
    """

    # weight of a token (exp d) or an answer (exp Σd): clipped to the bounds ("truncate"), or 0 outside them ("mask")
    mode: Literal["none", "token_truncate", "token_mask", "sequence_truncate", "sequence_mask"] = "none"
    # lower bound of that ratio; None: none
    clip_min: float | None = None
    # upper bound of that ratio
    clip_max: float = 2.0
    # mask answers whose geometric mean of exp d is outside these bounds
    geometric_mask: tuple[float, float] | None = None
    # mask answers with A < 0 whose mean b - p exceeds this (V3.2's δ, whose value is not published)
    off_policy_mask_threshold: float | None = None

    def __post_init__(self) -> None:
        where = "objective.correction"
        check_fields(self, where)
        check_positive(self, where, "clip_min", "clip_max", "off_policy_mask_threshold")
        if self.clip_min is not None and not self.clip_min <= 1 <= self.clip_max:
            problem = f"the bounds up to clip_max ({self.clip_max:g}) must include 1, the ratio of equal models"
            raise UserError(f"{where}.clip_min", self.clip_min, problem, "IcePop's are 0.5 and 5.0.")
        if self.clip_max < 1:
            problem = "below 1, the ratio of equal models"
            raise UserError(f"{where}.clip_max", self.clip_max, problem, "The usual value is 2.")
        bounds = self.geometric_mask
        if bounds is not None and not 0 < bounds[0] <= 1 <= bounds[1]:
            problem = "the bounds must include 1, the ratio of equal models"
            raise UserError(
                f"{where}.geometric_mask", bounds, problem, "Measure the gap first; 0.99 and 1.01 are tight."
            )

    @property
    def needs_trainer(self) -> bool:
        """Whether o must be computed before the update."""
        return self.mode != "none" or self.geometric_mask is not None

    @property
    def acts(self) -> bool:
        """Whether any correction is active."""
        return self.needs_trainer or self.off_policy_mask_threshold is not None


def importance_weights(trainer: Tensor, engine: Tensor, mask: Tensor, correction: Correction) -> tuple[Tensor, Tensor]:
    """The weights of all tokens, and where a bound changed one; `trainer` is o, `engine` is b."""
    log_ratio = (trainer - engine).detach() * mask
    level, _, form = correction.mode.partition("_")
    if level == "none":
        return mask, torch.zeros_like(mask, dtype=torch.bool)
    if level == "sequence":
        log_ratio = log_ratio.sum(dim=1, keepdim=True).expand_as(mask)
    ratio = log_ratio.clamp(-FARTHEST, FARTHEST).exp()
    low, high = correction.clip_min or 0.0, correction.clip_max
    weight = ratio.clamp(low, high) if form == "truncate" else ratio * ((ratio >= low) & (ratio <= high))
    return weight * mask, (weight != ratio) & (mask > 0)


def geometric_mask(trainer: Tensor, engine: Tensor, mask: Tensor, bounds: tuple[float, float]) -> Tensor:
    """(answers,) bool, True where exp(mean d) lies within the bounds."""
    ratio = _mean(trainer - engine, mask).exp()
    return (ratio >= bounds[0]) & (ratio <= bounds[1])


def off_policy_mask(new: Tensor, engine: Tensor, advantage: Tensor, mask: Tensor, threshold: float) -> Tensor:
    """(answers,) bool, False where A < 0 and the mean b - p exceeds the threshold (V3.2); new is p, advantage (answers,)."""
    return (advantage >= 0) | (_mean(engine - new, mask) <= threshold)


def mismatch(trainer: Tensor, engine: Tensor) -> tuple[Tensor, Tensor]:
    """Sums over tokens (n,) of b - o, an estimate of KL(engine || trainer), and of exp(2d) - 1, an estimate of chi-square."""
    log_ratio = trainer - engine
    return -log_ratio.sum(), (2 * log_ratio.clamp(-FARTHEST, FARTHEST)).expm1().sum()


def _mean(values: Tensor, mask: Tensor) -> Tensor:
    """(answers,) mean over each answer's tokens, without gradient."""
    return (values.detach() * mask).sum(dim=1) / mask.sum(dim=1).clamp(min=1)
