"""Answers that share a row with their prompt equal those in separate rows; long rows do not need a mask."""

from dataclasses import replace
from pathlib import Path

import pytest
import torch
from torch import Tensor

from finback.data.messages import Response
from finback.engine.request import Completion
from finback.kernels import documents
from finback.kernels.attention import causal_attention, torch_attention
from finback.kernels.documents import Prefixed, masked
from finback.model.config import ModelConfig
from finback.model.recompute import use_recompute
from finback.model.transformer import Transformer
from finback.rollouts.rollouts import Rollout, batches
from finback.rollouts.shared_prompts import predicting, shared_batches
from finback.tasks.task import NO_ANSWER, Problem
from finback.train.grpo_loss import Objective
from tests.test_batching import DENSE
from tests.test_grpo import reinforcement, step, with_varied_rewards
from tests.toy import CONFIG

GROUPS = {(5, 6, 7, 8, 9): (3, 7, 1, 7), (4,): (2, 5), (11, 12): (6,)}  # prompt -> lengths of its answers


def rollouts() -> list[tuple[Rollout, float]]:
    generator = torch.Generator().manual_seed(0)
    made = []
    for prompt, lengths in GROUPS.items():
        for n in lengths:
            ids = torch.randint(10, 300, (n,), generator=generator).tolist()
            done = Completion(ids, (-torch.rand(n, generator=generator)).tolist(), "stop")
            found = Rollout(
                Problem("?", "!", ""), list(prompt), done, Response("", "", thinks=False, closed=True), NO_ANSWER
            )
            made.append((found, float(n)))
    return sorted(made, key=lambda pair: -pair[0].length)


def lengths_and_ids() -> tuple[Prefixed, Tensor, Tensor]:
    """Two rows: a prefix of 5 with documents of 3, 4, 3 and 1; no prefix, with documents of 9 and 7."""
    rows = ((5, 3, 4, 3, 1), (0, 9, 7))
    ids = torch.stack([torch.cat([torch.full((n,), i) for i, n in enumerate(row)]) for row in rows])
    return Prefixed(rows), ids, torch.tensor([5, 0])


@pytest.mark.parametrize("heads", [4, 2])
@pytest.mark.parametrize("width", [8, 6])
def test_attention_behind_a_prefix_is_that_of_the_matrix(heads: int, width: int) -> None:
    mask, ids, prefixes = lengths_and_ids()
    generator = torch.Generator().manual_seed(1)
    shapes = (2, 4, 16, 8), (2, heads, 16, 8), (2, heads, 16, width)
    inputs = [torch.randn(shape, generator=generator, requires_grad=True) for shape in shapes]
    dense = masked(ids, prefixes)
    assert dense[0, 8].nonzero().flatten().tolist() == [0, 1, 2, 3, 4, 8] and dense[1, 9].sum() == 1
    plain = torch_attention(*inputs, 0.3, dense)
    found = causal_attention(*inputs, 0.3, mask)
    torch.testing.assert_close(found, plain, atol=1e-6, rtol=1e-5)
    weight = torch.randn(plain.shape, generator=generator)
    expected, gradients = (torch.autograd.grad((out * weight).sum(), inputs) for out in (plain, found))
    for one, other in zip(gradients, expected, strict=True):
        torch.testing.assert_close(one, other, atol=1e-6, rtol=1e-5)


def test_rows_hold_each_prompt_once_and_labels_find_their_places() -> None:
    rows = rollouts()
    (batch,) = shared_batches(rows, 4096)
    assert batch.shared is not None
    shared = batch.shared
    assert shared.prefixes.tolist() == [4, 1, 0] and shared.answers.tolist() == [4, 1, 2]
    assert shared.padding_mask.sum(1).tolist() == [4 + 18, 1 + 6, 7]
    assert len(shared.places) == int(batch.learnt.sum()) == 31
    read = shared.tokens.flatten()[shared.places]
    assert torch.equal(read, batch.tokens[batch.learnt]), "each label must be predicted from the token before it"
    assert sorted(batch.spared()) == [0, 4, 4, 4]
    split = shared_batches(rows, 14)
    assert len(split) > 1 and all(b.shared is not None and b.shared.tokens.numel() <= 14 for b in split)
    assert sum(len(b.tokens) for b in split) == len(rows)


@pytest.mark.parametrize("longest", [512, 0], ids=["matrix", "by documents"])
@pytest.mark.parametrize("config", [replace(CONFIG, initializer_range=0.15), DENSE], ids=["mla", "gqa"])
def test_log_probabilities_and_gradients_are_those_of_plain_rows(
    config: ModelConfig, longest: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(documents, "LONGEST_MASKED", longest)
    model, found = Transformer(config).initialise(0), []
    for form in (batches, shared_batches):
        model.zero_grad()
        logprobs = {}
        for batch in form(rollouts(), 40):
            learnt, states = batch.learnt, predicting(model, batch)
            logp = model.logits(states).log_softmax(-1).gather(1, batch.labels[learnt][:, None]).squeeze(1)
            assert batch.advantages is not None
            weight = batch.advantages[:, None].expand_as(batch.labels)[learnt]
            (logp * weight / 31).sum().backward()  # for an average over 31 tokens, as in a loss
            lines = torch.zeros(batch.tokens.shape).masked_scatter(learnt, logp.detach())
            logprobs |= {tuple(ids.tolist()): line.sum() for ids, line in zip(_whole(batch.labels), lines, strict=True)}
        found.append((logprobs, [p.grad for p in model.parameters() if p.grad is not None]))
    (one, grads), (other, others) = found
    assert one.keys() == other.keys() and len(one) == 7
    for key, value in one.items():
        torch.testing.assert_close(value, other[key], atol=1e-5, rtol=1e-5)
    for a, b in zip(grads, others, strict=True):
        torch.testing.assert_close(a, b, atol=1e-5, rtol=1e-5)


def _whole(labels: Tensor) -> list[Tensor]:
    return [line[line >= 0] for line in labels]


@pytest.mark.parametrize("knobs", [{}, {"routing_replay": True, "micro_tokens": 60}], ids=["native", "replayed"])
def test_a_step_of_grpo_is_that_of_plain_rows(knobs: dict[str, object], tmp_path: Path) -> None:
    gradients, metrics = [], []
    for share in (False, True):
        r = with_varied_rewards(reinforcement(tmp_path, share_prompts=share, max_grad_norm=1e9, **knobs))
        if share:
            use_recompute(r.model, "block")
        looped = r.loop()
        metrics.append(looped.advance())
        gradients.append(r.trainer.gradients.flat.clone())
    torch.testing.assert_close(*gradients, atol=1e-5, rtol=1e-5)
    for name in ("loss", "entropy", "grad_norm", "tokens_with_gradient", "length"):
        assert metrics[1][name] == pytest.approx(metrics[0][name], abs=1e-5, rel=1e-5), name
    assert metrics[1]["gap_max"] <= 1e-4


def test_a_reference_model_reads_shared_rows_too(tmp_path: Path) -> None:
    r = with_varied_rewards(reinforcement(tmp_path, share_prompts=True, objective=Objective(beta=0.1)))
    assert step(r)["kl"] == pytest.approx(0, abs=1e-6)
