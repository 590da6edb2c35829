"""Runs in a separate environment (`make test-slow` creates it): what TRL and verl compute from the tensors on stdin."""

import json
import sys
from collections import defaultdict
from types import SimpleNamespace
from typing import Any

import numpy as np
import torch


def trl_loss(t: dict[str, torch.Tensor], knobs: dict[str, Any]) -> list[Any]:
    """GRPOTrainer._compute_loss on given log-probabilities, and its gradient on them."""
    from trl import GRPOTrainer

    new = t["new"].clone().requires_grad_()
    rows, length = new.shape
    settings = {
        "delta": None,
        "use_bias_correction_kl": knobs["unbiased_kl"],
        "steps_per_generation": 1,
        "report_to": [],
        "epsilon_high": 0.2,
    }
    accelerator = SimpleNamespace(
        num_processes=1, gather=lambda x: x, gather_for_metrics=lambda x: x, reduce=lambda x, reduction: x
    )
    trainer = SimpleNamespace(
        _get_per_token_logps_and_entropies=lambda *a, **k: (new, torch.zeros_like(new), None),
        top_entropy_quantile=1.0,
        off_policy_mask_threshold=knobs["off_policy"],
        get_off_policy_mask=GRPOTrainer.get_off_policy_mask,
        importance_sampling_level=knobs["level"],
        beta=knobs["beta"],
        epsilon_low=knobs["low"],
        epsilon_high=knobs["high"],
        loss_type=knobs["loss_type"],
        use_vllm="importance" in t,
        vllm_importance_sampling_correction=True,
        aux_loss_enabled=False,
        max_completion_length=knobs["longest"],
        current_gradient_accumulation_steps=1,
        accelerator=accelerator,
        args=SimpleNamespace(**settings),
        model=SimpleNamespace(training=True),
        _entropy_bonus_enabled=False,
        _metrics={"train": defaultdict(list)},
        aux_loss_coef=0.0,
        use_adaptive_entropy=False,
    )
    inputs = {
        "prompt_ids": torch.zeros(rows, 1, dtype=torch.long),
        "prompt_mask": torch.ones(rows, 1, dtype=torch.long),
        "completion_ids": torch.zeros(rows, length, dtype=torch.long),
        "completion_mask": t["mask"].long(),
        "advantages": t["advantage"],
        "old_per_token_logps": t["old"],
        "ref_per_token_logps": t["reference"],
        "num_items_in_batch": t["mask"].sum(),
    }
    if "engine" in t:
        inputs["sampling_per_token_logps"] = t["engine"]
    if "importance" in t:
        inputs["importance_sampling_ratio"] = t["importance"]
    loss = GRPOTrainer._compute_loss(trainer, trainer.model, inputs)
    loss.backward()
    assert new.grad is not None
    return [loss.item(), new.grad.tolist()]


def verl_loss(t: dict[str, torch.Tensor], knobs: dict[str, Any]) -> list[Any]:
    """compute_policy_loss_vanilla (and KL as a loss) on given log-probabilities, and its gradient on them."""
    from verl.trainer.ppo import core_algos
    from verl.workers.config import ActorConfig

    new = t["new"].clone().requires_grad_()
    config = ActorConfig(
        strategy="fsdp",
        clip_ratio=0.2,
        clip_ratio_low=knobs["low"],
        clip_ratio_high=knobs["high"],
        clip_ratio_c=knobs["dual"],
        rollout_n=1,
        ppo_micro_batch_size_per_gpu=1,
    )
    loss, _ = core_algos.compute_policy_loss_vanilla(
        t["old"],
        new,
        t["advantage"][:, None].expand_as(new),
        t["mask"],
        knobs["mode"],
        config,
        rollout_is_weights=t.get("importance"),
    )
    if knobs["beta"]:
        kl = core_algos.kl_penalty_forward(new, t["reference"], knobs["kl_form"])
        loss = loss + knobs["beta"] * core_algos.agg_loss(kl, t["mask"], knobs["mode"])
    loss.backward()
    assert new.grad is not None
    return [loss.item(), new.grad.tolist()]


def verl_weights(t: dict[str, torch.Tensor], knobs: dict[str, Any]) -> list[Any]:
    """compute_rollout_correction_weights for log-probabilities of the trainer and the engine."""
    from verl.trainer.ppo import rollout_corr_helper as helper

    found, _ = helper.compute_rollout_correction_weights(
        t["old"] - t["reference"], t["mask"], knobs["level"], knobs["threshold"]
    )
    return found.tolist()


def verl_rejection(t: dict[str, torch.Tensor], knobs: dict[str, Any]) -> list[Any]:
    """compute_rollout_rejection_mask: the response mask after rejection."""
    from verl.trainer.ppo import rollout_corr_helper as helper

    found, _ = helper.compute_rollout_rejection_mask(
        t["old"] - t["reference"], t["mask"], knobs["option"], knobs["threshold"]
    )
    return found.tolist()


def verl_advantages(t: dict[str, torch.Tensor], knobs: dict[str, Any]) -> list[Any]:
    """compute_grpo_outcome_advantage for rewards (groups, group)."""
    from verl.trainer.ppo import core_algos

    groups, size = t["rewards"].shape
    index = np.repeat(np.arange(groups), size)
    mask = torch.ones(groups * size, 1)
    found, _ = core_algos.compute_grpo_outcome_advantage(
        t["rewards"].reshape(-1, 1).clone(), mask, index, norm_adv_by_std_in_grpo=knobs["normalise"]
    )
    return found.view(groups, size).tolist()


def main() -> None:
    answers = []
    for case in json.load(sys.stdin):
        tensors = {k: torch.tensor(v, dtype=torch.float64) for k, v in case["tensors"].items()}
        answers.append(globals()[case["oracle"]](tensors, case["knobs"]))
    print(json.dumps(answers))


if __name__ == "__main__":
    main()
