"""GRPO's formulas worked by hand."""

import math

import pytest
import torch

from finback.config import UserError
from finback.train.correction import Correction, geometric_mask, importance_weights, off_policy_mask
from finback.train.grpo_loss import Objective, advantages, divergence, share, surrogate, terms, total

LOG = math.log


def test_advantages_by_hand() -> None:
    rewards = torch.tensor([[1.0, 0.0, 0.0, 1.0], [0.1, 0.1, 0.1, 0.1], [1.0, 0.0, 0.0, 0.0]])
    a = advantages(rewards)
    torch.testing.assert_close(a[0], torch.tensor([1.0, -1.0, -1.0, 1.0]))
    assert (a[1] == 0).all(), "a group with equal rewards has no advantages"
    std = math.sqrt(0.75 * 0.25)
    torch.testing.assert_close(a[2], torch.tensor([0.75 / std] + [-0.25 / std] * 3))
    plain = advantages(rewards, normalise=False)
    torch.testing.assert_close(plain[2], torch.tensor([0.75, -0.25, -0.25, -0.25]))
    assert (plain[1] == 0).all()


def test_clip_by_hand() -> None:
    """ρ = 1.5 and 0.5 at ε = 0.2: the clip acts only where moving further would raise the objective."""
    old = torch.zeros(2, 2)
    new = torch.tensor([[1.5, 0.5], [1.5, 0.5]]).log().requires_grad_()
    loss, clipped = surrogate(new, old, torch.tensor([2.0, -1.0]), torch.ones(2, 2), Objective())
    # A = 2: min(3, 2.4) and min(1, 1.6); A = -1: min(-1.5, -1.2) and min(-0.5, -0.8)
    torch.testing.assert_close(loss.detach(), torch.tensor([[-2.4, -1.0], [1.5, 0.8]]))
    assert clipped.tolist() == [[True, False], [False, True]]
    loss.sum().backward()
    torch.testing.assert_close(new.grad, torch.tensor([[0.0, -1.0], [1.5, 0.0]]))
    hidden = torch.tensor([[0.0, 1.0], [1.0, 0.0]])
    assert surrogate(new.detach(), old, torch.tensor([2.0, -1.0]), hidden, Objective())[1].sum() == 0


def test_the_two_clips_are_apart() -> None:
    new, old, mask = torch.tensor([[LOG(1.25), LOG(0.75)]]), torch.zeros(1, 2), torch.ones(1, 2)
    higher = Objective(epsilon_low=0.2, epsilon_high=0.28)  # DAPO
    assert surrogate(new, old, torch.tensor([1.0]), mask, higher)[0][0, 0].item() == pytest.approx(-1.25)
    assert surrogate(new, old, torch.tensor([-1.0]), mask, higher)[0][0, 1].item() == pytest.approx(0.8)
    lower = Objective(epsilon_low=0.3, epsilon_high=0.1)
    assert surrogate(new, old, torch.tensor([1.0]), mask, lower)[0][0, 0].item() == pytest.approx(-1.1)
    assert surrogate(new, old, torch.tensor([-1.0]), mask, lower)[0][0, 1].item() == pytest.approx(0.75)


def test_dual_clip_bounds_what_a_bad_token_costs() -> None:
    new, old, mask = torch.tensor([[LOG(8.0), LOG(2.0)]]), torch.zeros(1, 2), torch.ones(1, 2)
    aim = Objective(dual_clip=3.0)
    loss, clipped = surrogate(new, old, torch.tensor([-2.0]), mask, aim)
    torch.testing.assert_close(loss, torch.tensor([[6.0, 4.0]]))  # 3 · 2 instead of 8 · 2; 2 · 2 is unchanged
    assert clipped.tolist() == [[True, False]]
    good = surrogate(new, old, torch.tensor([2.0]), mask, aim)[0]
    torch.testing.assert_close(good, torch.tensor([[-2.4, -2.4]]))
    with pytest.raises(UserError, match=r"objective\.dual_clip = 1\.0"):
        Objective(dual_clip=1.0)


def test_gspo_takes_one_ratio_for_an_answer() -> None:
    """Two tokens with ρ = 4 and 1: their geometric mean is 2; the third is padding."""
    new = torch.tensor([[LOG(4.0), 0.0, 9.0]]).requires_grad_()
    mask = torch.tensor([[1.0, 1.0, 0.0]])
    aim = Objective(ratio="sequence", epsilon_high=5.0, average="answer")
    loss, _ = surrogate(new, torch.zeros(1, 3), torch.tensor([1.0]), mask, aim)
    torch.testing.assert_close(loss.detach(), torch.full((1, 3), -2.0))
    total(loss, mask, "answer").backward()
    torch.testing.assert_close(new.grad, torch.tensor([[-1.0, -1.0, 0.0]]))  # d 2 / d log ρ_i = 2 · 1/2


def test_divergence_by_hand() -> None:
    new, reference = torch.tensor([LOG(0.5)]), torch.tensor([LOG(0.25)])
    assert divergence(new, reference, "k1").item() == pytest.approx(LOG(2.0))
    assert divergence(new, reference, "k3").item() == pytest.approx(0.5 - LOG(0.5) - 1)


def test_k3_is_never_negative_and_both_are_unbiased() -> None:
    p, q = torch.tensor([0.7, 0.2, 0.1]), torch.tensor([0.3, 0.3, 0.4])
    exact = (p * (p / q).log()).sum()
    for form in ("k1", "k3"):
        each = divergence(p.log(), q.log(), form)  # type: ignore[arg-type]
        torch.testing.assert_close((p * each).sum(), exact)
        assert form == "k1" or (each >= 0).all()


def test_averages_by_hand() -> None:
    """Answers of one and three tokens whose tokens have losses 4 and 2: 10 in all."""
    loss = torch.tensor([[4.0, 9.0, 9.0], [2.0, 2.0, 2.0]])
    mask = torch.tensor([[1.0, 0.0, 0.0], [1.0, 1.0, 1.0]])
    assert total(loss, mask, "token").item() / share("token", 4, 2, 8) == 2.5
    assert total(loss, mask, "answer").item() / share("answer", 4, 2, 8) == 3.0
    assert total(loss, mask, "constant").item() / share("constant", 4, 2, 8) == 10 / 16
    assert share("token", 0, 0, 8) == 1, "an empty batch divides by one"


def test_ratios_at_the_old_policy_give_the_policy_gradient() -> None:
    """At new = old only the averaging matters, and the gradient is -A."""
    for aim in (Objective(), Objective(epsilon_low=0.0, epsilon_high=0.0), Objective(dual_clip=3.0, ratio="token")):
        new = torch.randn(2, 3).requires_grad_()
        loss, clipped = surrogate(new, new.detach(), torch.tensor([1.5, -0.5]), torch.ones(2, 3), aim)
        loss.sum().backward()
        if aim.epsilon_low:
            torch.testing.assert_close(new.grad, torch.tensor([[-1.5] * 3, [0.5] * 3]))
        assert clipped.sum() == 0


# d = 0.2, -0.1, 1.0 and padding: the numbers that verl 0.9.1 gives
ENGINE = torch.tensor([[-1.0, -2.0, -3.0, 0.0]])
TRAINER = torch.tensor([[-0.8, -2.1, -2.0, 0.0]])
MASK = torch.tensor([[1.0, 1.0, 1.0, 0.0]])


@pytest.mark.parametrize(
    ("correction", "weights", "cut"),
    [
        (Correction(), [1, 1, 1], [0, 0, 0]),
        (Correction(mode="token_truncate"), [1.2214, 0.9048, 2], [0, 0, 1]),
        (Correction(mode="token_truncate", clip_min=0.95), [1.2214, 0.95, 2], [0, 1, 1]),
        (Correction(mode="sequence_truncate"), [2, 2, 2], [1, 1, 1]),
        (Correction(mode="sequence_truncate", clip_max=4.0), [3.0042, 3.0042, 3.0042], [0, 0, 0]),
        (Correction(mode="token_mask", clip_min=0.5), [1.2214, 0.9048, 0], [0, 0, 1]),
        (Correction(mode="sequence_mask", clip_min=0.5, clip_max=5.0), [3.0042, 3.0042, 3.0042], [0, 0, 0]),
        (Correction(mode="sequence_mask", clip_min=0.5, clip_max=3.0), [0, 0, 0], [1, 1, 1]),
    ],
)
def test_importance_weights_by_hand(correction: Correction, weights: list[float], cut: list[int]) -> None:
    found, acted = importance_weights(TRAINER, ENGINE, MASK, correction)
    torch.testing.assert_close(found, torch.tensor([[*weights, 0.0]], dtype=torch.float32), atol=1e-4, rtol=0)
    assert acted.int().tolist() == [[*cut, 0]]


def test_masks_of_answers_by_hand() -> None:
    """The mean of d is 0.36667, its exponential 1.4429; V3.2 masks bad answers that have become unlikely."""
    kept = [
        bool(geometric_mask(TRAINER, ENGINE, MASK, bounds)) for bounds in ((0.999, 1.001), (0.5, 1.44), (0.5, 1.45))
    ]
    assert kept == [False, False, True]
    new, engine, mask = (t.expand(3, 4) for t in (ENGINE, TRAINER, MASK))  # mean b - p = 0.36667
    advantage = torch.tensor([1.0, 0.0, -1.0])
    assert off_policy_mask(new, engine, advantage, mask, 0.36).tolist() == [True, True, False]
    assert off_policy_mask(new, engine, advantage, mask, 0.37).all()
    assert off_policy_mask(engine, new, advantage, mask, 0.36).all(), "answers that became likelier must stay"


def test_corrections_weigh_the_surrogate_alone() -> None:
    """A = -1 at ρ = 1: every token costs its weight, a masked answer only its KL term; the mask has no gradient."""
    new = TRAINER.clone().requires_grad_()
    aim = Objective(correction=Correction(mode="token_truncate", off_policy_mask_threshold=0.1), beta=0.5)
    bad = torch.tensor([-1.0])
    found = terms(new, TRAINER, ENGINE, TRAINER - 1, bad, MASK, aim)
    k3 = math.exp(-1)
    expected = torch.tensor([[1.2214 + k3 / 2, 0.9048 + k3 / 2, 2 + k3 / 2]])
    torch.testing.assert_close(found.loss[:, :3].detach(), expected, atol=1e-4, rtol=0)
    assert found.masked.sum() == 0 and found.cut.int().tolist() == [[0, 0, 1, 0]]
    farther = terms(new - 2, TRAINER, ENGINE, None, bad, MASK, aim)
    assert farther.loss.detach().abs().sum() == 0 and farther.masked.int().tolist() == [[1, 1, 1, 0]]
    farther.loss.sum().backward()
    assert new.grad is not None and new.grad.abs().sum() == 0


@pytest.mark.parametrize(
    ("knobs", "words"),
    [
        ({"mode": "icepop"}, r"objective\.correction\.mode = 'icepop'"),
        ({"clip_max": 0.9}, r"clip_max = 0\.9: below 1"),
        ({"clip_min": 1.5}, r"clip_min = 1\.5"),
        ({"clip_min": 0.0}, r"clip_min = 0\.0: not above 0"),
        ({"geometric_mask": (1.1, 1.2)}, r"geometric_mask = \(1\.1, 1\.2\)"),
        ({"off_policy_mask_threshold": -1.0}, r"off_policy_mask_threshold = -1\.0"),
    ],
)
def test_impossible_corrections_are_named(knobs: dict[str, object], words: str) -> None:
    with pytest.raises(UserError, match=words):
        Correction(**knobs)  # type: ignore[arg-type]


def test_the_old_knob_names_the_new_one() -> None:
    with pytest.raises(UserError, match=r'importance_cap = 3\.0: .*Correction\(mode="token_truncate", clip_max=3\)'):
        Objective(importance_cap=3.0)
