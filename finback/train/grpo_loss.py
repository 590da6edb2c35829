"""GRPO's formulas as pure functions: group advantages, the clipped surrogate with its variants, KL, averaging.

Mismatch between engine and trainer is corrected in train/correction.py.

Notation: advantage A, ratio ρ = π_new / π_old of a token, clip range ε, answer o of |o| tokens.
"""

from dataclasses import InitVar, dataclass
from typing import Literal

import torch
from torch import Tensor

from finback.config import UserError, check_fields, check_not_negative
from finback.train.correction import Correction, geometric_mask, importance_weights, off_policy_mask


@dataclass(frozen=True)
class Objective:
    """What an update minimizes. The defaults are GRPO with DAPO's average over tokens; the knobs cover the other forms.

    DeepSeekMath (2402.03300): average="answer", beta=0.04. R1 (Nature 2025): epsilon_low=10, epsilon_high=10, beta=0.001,
    average="answer". Dr. GRPO (2503.20783): average="constant" and GRPO(normalise=False). DAPO (2503.14476):
    epsilon_high=0.28. GSPO (2507.18071): ratio="sequence", average="answer", epsilon_low=3e-4, epsilon_high=4e-4.
    """

    # clip range below: where A < 0, ρ under 1 - epsilon_low has no gradient
    epsilon_low: float = 0.2
    # clip range above: where A > 0, ρ over 1 + epsilon_high has no gradient
    epsilon_high: float = 0.2
    # where A < 0, the loss of a token is at most dual_clip · |A| (1912.09729); None: unbounded
    dual_clip: float | None = None
    # ρ per token, or "sequence": one ρ per answer, the geometric mean over its tokens (GSPO)
    ratio: Literal["token", "sequence"] = "token"
    # token: mean over all tokens; answer: 1/|o| per answer; constant: 1/max_tokens per answer
    average: Literal["token", "answer", "constant"] = "token"
    # weight of the KL divergence from the reference model
    beta: float = 0.0
    # estimator of the KL; the gradient of k1 is zero in expectation, so it only adds noise
    kl_estimator: Literal["k1", "k3"] = "k3"
    # multiply the estimator by ρ, which makes k3's gradient that of the KL (V3.2, 2512.02556; TRL's default)
    unbiased_kl: bool = False
    # weights and masks for the mismatch between trainer and engine
    correction: Correction = Correction()
    # the former name of truncated importance sampling
    importance_cap: InitVar[float | None] = None

    def __post_init__(self, importance_cap: float | None) -> None:
        check_fields(self, "objective")
        if importance_cap is not None:
            remedy = f'Write correction=Correction(mode="token_truncate", clip_max={importance_cap:g}).'
            raise UserError("objective.importance_cap", importance_cap, "has become one of the corrections", remedy)
        if self.dual_clip is not None and self.dual_clip <= 1:
            raise UserError("objective.dual_clip", self.dual_clip, "not above 1", "The usual value is 3.")
        check_not_negative(self, "objective", "epsilon_low", "epsilon_high", "beta")


def advantages(rewards: Tensor, normalise: bool = True, counted: Tensor | None = None) -> Tensor:
    """A_i = (r_i - mean r) / std r within each group (DeepSeekMath 4.1.2); rewards (groups, group) -> same shape.

    A group with equal rewards gets 0. Without `normalise` only the mean is subtracted (Dr. GRPO, V3.2). std is the
    population's; the sample's, which other libraries use, is sqrt(G / (G - 1)) times as large. Answers that are not
    `counted` (groups, group) are excluded from mean and std and get 0.
    """
    if counted is None or bool(counted.all()):
        centred = rewards - rewards.mean(dim=1, keepdim=True)
        std = rewards.std(dim=1, keepdim=True, correction=0)
    else:
        n = counted.sum(dim=1, keepdim=True).clamp(min=1)
        mean = rewards.masked_fill(~counted, 0.0).sum(dim=1, keepdim=True) / n
        centred = (rewards - mean).masked_fill(~counted, 0.0)
        std = (centred.square().sum(dim=1, keepdim=True) / n).sqrt()
    differs = std > 1e-6
    scaled = centred / std.clamp(min=1e-6) if normalise else centred
    return torch.where(differs, scaled, torch.zeros_like(centred))


def ratio(new: Tensor, old: Tensor, mask: Tensor, objective: Objective) -> Tensor:
    """ρ of every token; new, old, mask (answers, tokens): log-probabilities, and 1 where a token counts."""
    log_ratio = (new - old).clamp(-20, 20)  # exp stays finite
    if objective.ratio == "sequence":
        log_ratio = ((log_ratio * mask).sum(1) / mask.sum(1).clamp(min=1))[:, None].expand_as(log_ratio)
    return log_ratio.exp()


def surrogate(new: Tensor, old: Tensor, advantage: Tensor, mask: Tensor, objective: Objective) -> tuple[Tensor, Tensor]:
    """-min(ρ A, clip(ρ, 1 - ε_low, 1 + ε_high) A) per token (R1 eq. 1), and a mask of where the clip was active.

    new, old, mask (answers, tokens): log-probabilities, and 1 where a token counts; advantage (answers,).
    """
    rho, weight = ratio(new, old, mask, objective), advantage[:, None]
    plain = rho * weight
    clipped = torch.minimum(plain, rho.clamp(1 - objective.epsilon_low, 1 + objective.epsilon_high) * weight)
    if objective.dual_clip is not None:
        clipped = torch.where(weight < 0, torch.maximum(clipped, objective.dual_clip * weight), clipped)
    return -clipped, (clipped != plain) & (mask > 0)


def divergence(new: Tensor, reference: Tensor, form: Literal["k1", "k3"]) -> Tensor:
    """Estimates of KL(π_new || π_ref) from one token's log-probabilities: k1 = log π - log π_ref, which can be negative,
    k3 = π_ref/π - log(π_ref/π) - 1 >= 0 (DeepSeekMath eq. 4)."""
    if form == "k1":
        return new - reference
    gap = (reference - new).clamp(-20, 20)
    return gap.exp() - gap - 1


@dataclass(frozen=True)
class Terms:
    """The parts of the loss, each (answers, tokens)."""

    # before averaging, including the divergence
    loss: Tensor
    # without the weight beta
    divergence: Tensor
    # bool: where the clip was active, where a bound changed a weight, and tokens of masked answers
    clipped: Tensor
    cut: Tensor
    masked: Tensor


def terms(
    new: Tensor,
    old: Tensor | None,
    engine: Tensor,
    reference: Tensor | None,
    advantage: Tensor,
    mask: Tensor,
    objective: Objective,
) -> Terms:
    """The loss of every token from log-probabilities (answers, tokens): under the weights being trained, under those before the
    update (None: the engine's are used), under the engine, and under the reference model if there is one.

    Corrections weight the surrogate only, not the divergence.
    """
    fix, before = objective.correction, engine if old is None else old
    loss, clipped = surrogate(new, before, advantage, mask, objective)
    weight, cut = importance_weights(before, engine, mask, fix)
    keep = torch.ones_like(advantage, dtype=torch.bool)
    if fix.geometric_mask is not None:
        keep &= geometric_mask(before, engine, mask, fix.geometric_mask)
    if fix.off_policy_mask_threshold is not None:
        keep &= off_policy_mask(new, engine, advantage, mask, fix.off_policy_mask_threshold)
    loss = (loss * weight).masked_fill(~keep[:, None], 0.0)
    kl = torch.zeros_like(new)
    if reference is not None:
        kl = divergence(new, reference, objective.kl_estimator)
        kl = kl * ratio(new, before, mask, objective) if objective.unbiased_kl else kl
        loss = loss + objective.beta * kl
    return Terms(loss, kl, clipped, cut, ~keep[:, None] & (mask > 0))


def total(per_token: Tensor, mask: Tensor, average: Literal["token", "answer", "constant"]) -> Tensor:
    """The sum over a micro-batch, to be divided by `share` of the whole batch; per_token, mask (answers, tokens)."""
    masked = per_token * mask
    if average == "answer":
        return (masked.sum(dim=1) / mask.sum(dim=1).clamp(min=1)).sum()
    return masked.sum()


def share(average: Literal["token", "answer", "constant"], tokens: float, answers: float, longest: int) -> float:
    """The divisor for `total`, from the counts of the whole batch over all ranks; never 0."""
    return max(1.0, {"token": tokens, "answer": answers, "constant": answers * longest}[average])
