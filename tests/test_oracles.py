"""GRPO's advantages, losses and gradients against TRL's GRPOTrainer and verl's core_algos on the same tensors."""

import json
import math
import subprocess
from typing import Any

import pytest
import torch
from torch import Tensor

from finback.train.correction import Correction, geometric_mask, importance_weights
from finback.train.grpo_loss import Objective, advantages, share, terms, total
from tests.toy import ROOT

pytestmark = pytest.mark.slow
PYTHON = ROOT / ".venv/oracles/bin/python"
LONGEST = 16


def tensors(seed: int) -> dict[str, Tensor]:
    """Six answers of 3 to 16 tokens whose probabilities have moved far enough for every clip to act."""
    rng = torch.Generator().manual_seed(seed)
    new = -torch.rand(6, LONGEST, generator=rng, dtype=torch.float64) * 3
    old = new + torch.randn(new.shape, generator=rng, dtype=torch.float64) * 0.7
    lengths = torch.tensor([16, 3, 9, 12, 5, 7])
    return {
        "new": new,
        "old": old,
        "reference": new + torch.randn(new.shape, generator=rng, dtype=torch.float64) * 0.5,
        "mask": (torch.arange(LONGEST) < lengths[:, None]).double(),
        "advantage": torch.tensor([1.2, -0.8, 2.0, -2.5, 0.0, 0.0], dtype=torch.float64),
    }


def ours(t: dict[str, Tensor], aim: Objective) -> tuple[float, Tensor]:
    """The loss as the GRPO stage computes it, and its gradient; only answers with an advantage count."""
    new = t["new"].clone().requires_grad_()
    tokens, answers = float(t["mask"].sum()), len(new)
    looked_at = (t["advantage"] != 0) | (aim.beta > 0)
    leaf, t = new, {name: value[looked_at] for name, value in t.items()}
    new = new[looked_at]
    found = terms(new, t["old"], t.get("engine", t["old"]), t["reference"], t["advantage"], t["mask"], aim)
    whole = share(aim.average, tokens, answers, LONGEST)
    value = total(found.loss, t["mask"], aim.average) / whole
    value.backward()
    assert leaf.grad is not None
    return value.item(), leaf.grad


def asked(cases: list[dict[str, Any]]) -> list[Any]:
    if not PYTHON.exists():
        pytest.skip("TRL and verl are not installed; `make test-slow` installs them")
    given = json.dumps([c | {"tensors": {k: v.tolist() for k, v in c["tensors"].items()}} for c in cases])
    done = subprocess.run([PYTHON, ROOT / "tests/oracles.py"], input=given, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr[-3000:]
    return list(json.loads(done.stdout.splitlines()[-1]))


def agree(found: list[Any], expected: list[tuple[float, Tensor]]) -> None:
    for (value, gradient), (our_value, our_gradient) in zip(found, expected, strict=True):
        assert our_value == pytest.approx(value, abs=1e-5)
        torch.testing.assert_close(our_gradient, torch.tensor(gradient, dtype=torch.float64), atol=1e-5, rtol=0)


TRL = [
    ({"loss_type": "grpo"}, Objective(average="answer")),
    ({"loss_type": "dapo", "high": 0.28}, Objective(epsilon_high=0.28)),
    ({"loss_type": "bnpo", "beta": 0.04}, Objective(beta=0.04)),
    ({"loss_type": "dr_grpo"}, Objective(average="constant")),
    ({"loss_type": "grpo", "beta": 0.04}, Objective(average="answer", beta=0.04)),
    (
        {"loss_type": "grpo", "level": "sequence", "low": 0.1, "high": 0.1},
        Objective(average="answer", ratio="sequence", epsilon_low=0.1, epsilon_high=0.1),
    ),
    ({"loss_type": "dapo", "importance": 2.0}, Objective(correction=Correction(mode="token_truncate"))),
    (
        {"loss_type": "grpo", "off_policy": 0.3},
        Objective(average="answer", correction=Correction(off_policy_mask_threshold=0.3)),
    ),
    # TRL's default correction of the KL term
    ({"loss_type": "dapo", "beta": 0.04, "unbiased_kl": True}, Objective(beta=0.04, unbiased_kl=True)),
    ({"loss_type": "dapo", "beta": 1e-12, "unbiased_kl": True}, Objective(beta=1e-12, unbiased_kl=True)),
]


def test_losses_and_gradients_are_trls() -> None:
    cases, expected = [], []
    for seed, (knobs, aim) in enumerate(TRL):
        t = tensors(seed)
        if cap := knobs.pop("importance", None):
            t["engine"] = t["reference"]
            t["importance"] = (t["old"] - t["engine"]).exp().clamp(max=cap)
        if "off_policy" in knobs:
            t["engine"] = t["reference"]
        defaults = {"level": "token", "beta": 0.0, "low": 0.2, "high": 0.2, "longest": LONGEST, "unbiased_kl": False}
        defaults["off_policy"] = None
        cases.append({"oracle": "trl_loss", "tensors": t, "knobs": defaults | knobs})
        expected.append(ours(t, aim))
    agree(asked(cases), expected)


VERL = [
    ({}, Objective(dual_clip=3.0)),
    ({"low": 0.1, "high": 0.3, "dual": 1.5}, Objective(epsilon_low=0.1, epsilon_high=0.3, dual_clip=1.5)),
    ({"mode": "seq-mean-token-mean"}, Objective(dual_clip=3.0, average="answer")),
    ({"mode": "seq-mean-token-sum-norm"}, Objective(dual_clip=3.0, average="constant")),
    ({"beta": 0.1, "kl_form": "low_var_kl"}, Objective(dual_clip=3.0, beta=0.1)),
    ({"beta": 0.1, "kl_form": "kl"}, Objective(dual_clip=3.0, beta=0.1, kl_estimator="k1")),
]


def test_losses_and_gradients_are_verls() -> None:
    cases, expected = [], []
    for seed, (knobs, aim) in enumerate(VERL):
        t = tensors(seed + 50)
        defaults = {"mode": "token-mean", "beta": 0.0, "low": 0.2, "high": 0.2, "dual": 3.0, "kl_form": "low_var_kl"}
        cases.append({"oracle": "verl_loss", "tensors": t, "knobs": defaults | knobs})
        expected.append(ours(t, aim))
    agree(asked(cases), expected)


def test_advantages_are_verls_but_for_the_kind_of_std() -> None:
    """verl divides by the sample standard deviation plus 1e-6; ours is the population's."""
    rewards = torch.rand(5, 8, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    cases = [
        {"oracle": "verl_advantages", "tensors": {"rewards": rewards}, "knobs": {"normalise": normalise}}
        for normalise in (True, False)
    ]
    normal, plain = (torch.tensor(found, dtype=torch.float64) for found in asked(cases))
    std = rewards.std(dim=1, keepdim=True)
    expected = advantages(rewards) * math.sqrt(7 / 8) * std / (std + 1e-6)
    torch.testing.assert_close(expected, normal, atol=1e-5, rtol=0)
    torch.testing.assert_close(advantages(rewards, normalise=False), plain, atol=1e-5, rtol=0)


WEIGHTS = [
    Correction(mode="token_truncate"),
    Correction(mode="sequence_truncate", clip_max=3.0),
    Correction(mode="token_mask", clip_min=0.5, clip_max=1.6),
    Correction(mode="sequence_mask", clip_min=0.5, clip_max=5.0),
]


def test_weights_are_verls() -> None:
    cases, expected = [], []
    for seed, correction in enumerate(WEIGHTS):
        t = tensors(seed + 80)
        level, form = correction.mode.split("_")
        low, high = correction.clip_min, correction.clip_max
        threshold = f"{high}" if form == "truncate" else f"{low}_{high}"
        cases.append({"oracle": "verl_weights", "tensors": t, "knobs": {"level": level, "threshold": threshold}})
        expected.append(importance_weights(t["old"], t["reference"], t["mask"], correction))
    for found, (weights, cut) in zip(asked(cases), expected, strict=True):
        torch.testing.assert_close(weights, torch.tensor(found, dtype=torch.float64), atol=1e-6, rtol=0)
        assert cut.any() and not cut.all()


def test_the_geometric_mask_is_verls() -> None:
    """verl tests -d, so its bounds are the reciprocals of ours."""
    t, bounds = tensors(90), (0.8, 1.3)
    knobs = {"option": "seq_mean_k1", "threshold": f"{1 / bounds[1]}_{1 / bounds[0]}"}
    (found,) = asked([{"oracle": "verl_rejection", "tensors": t, "knobs": knobs}])
    kept = geometric_mask(t["old"], t["reference"], t["mask"], bounds)
    assert 0 < kept.sum() < len(kept)
    assert torch.equal(kept[:, None] * t["mask"], torch.tensor(found, dtype=torch.float64))
