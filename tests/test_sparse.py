"""Teaching DSA's indexers: the divergence by hand, and a dense model that becomes a sparse one."""

from pathlib import Path
from typing import Any

import pytest
import torch

from finback.checkpoint import models
from finback.config import UserError
from finback.model.dsa import DSA, pick
from finback.model.dsa_training import TaughtDSA, divergence, divergences, take_divergences, teach_indexers
from finback.stages.sparsify import Sparsify
from tests.test_model import SPARSE, random_model
from tests.test_pretrain import prepared, pretrain, trained

__all__ = ["prepared"]

INDEXER: dict[str, Any] = {"index_topk": 6, "index_n_heads": 4, "index_head_dim": 8}


def test_a_divergence_by_hand() -> None:
    """Two keys of three are looked at: target (1/4, 3/4), scores (0, ln 3) -> 0; equal scores -> ln 2 - H(1/4)."""
    target, looked = torch.tensor([[[0.25, 0.75, 0.0]]]), torch.tensor([[[True, True, False]]])
    log3 = torch.tensor(3.0).log()
    assert divergences(target, torch.tensor([[[0.0, log3, 9.0]]]), looked).item() == pytest.approx(0.0, abs=1e-6)
    flat = divergences(target, torch.tensor([[[1.0, 1.0, 9.0]]]), looked).item()
    assert flat == pytest.approx(0.693147 - 0.562335, abs=1e-5)


@pytest.mark.parametrize("dense", [True, False])
def test_what_an_indexer_learns_is_the_attention(dense: bool) -> None:
    """The loss of one layer against attention spelled out; its gradient reaches the indexer alone, the main loss all else."""
    model = teach_indexers(random_model(SPARSE), dense).train()
    tokens = torch.randint(0, 97, (2, 20), generator=torch.Generator().manual_seed(0))
    attention: TaughtDSA = model.blocks[0].attention
    hidden = model(tokens)
    loss = attention.loss
    assert loss is not None

    x, cos, sin = model.blocks[0].attention_norm(model.embedded(tokens)), model.cos[None, :20], model.sin[None, :20]
    with torch.no_grad():
        q_latent, kv = attention.inputs(x)
        query = torch.cat(attention.queries(attention.q_of(q_latent), cos, sin), dim=-1).transpose(1, 2)
        key, _ = attention.expanded(*attention.latents(kv, cos, sin))
        asked, weight = attention.indexer.queries(x, q_latent, cos, sin)
        keys, causal = attention.indexer.keys(x, cos, sin), torch.ones(1, 20, 20, dtype=torch.bool).tril()
        scores = torch.stack(
            [(weight[..., j, None] * (asked[:, :, j] @ keys.transpose(1, 2)).relu()) for j in range(asked.size(2))]
        ).sum(dim=0)
        looked = causal if dense else pick(scores, causal, SPARSE.index_topk)
        weights = (query @ key.transpose(2, 3) * attention.scale).masked_fill(~looked[:, None], -torch.inf).softmax(-1)
        target, guess = weights.mean(dim=1), scores.masked_fill(~looked, -torch.inf).softmax(-1)
        expected = torch.where(looked, target * (target.clamp(min=1e-30) / guess.clamp(min=1e-30)).log(), 0).sum(-1)
    assert loss.item() == pytest.approx(expected.mean().item(), rel=1e-4)

    losses = take_divergences(model)
    assert losses is not None and take_divergences(model) is None and divergence(model) > 0
    losses.backward(retain_graph=True)
    reached = {name for name, p in model.named_parameters() if p.grad is not None}
    assert reached == {n for n, _ in model.named_parameters() if ".indexer." in n and not n.startswith("mtp.")}
    model.zero_grad()
    hidden.square().sum().backward()
    assert not any(".indexer." in name for name, p in model.named_parameters() if p.grad is not None)


def test_a_dense_model_becomes_sparse(prepared: Path) -> None:
    """The warm-up moves indexers alone; the sparse stage moves everything; the gap to the attention shrinks."""
    trained(prepared, "dense", weight_decay=0.1)
    _, log, folder = trained(prepared, "warm", kind=Sparsify, start="dense", adam_lr=1e-2, **INDEXER)
    before, after = models.load(prepared / "dense").state_dict(), models.load(folder).state_dict()
    moved = {name for name, tensor in after.items() if name not in before or not torch.equal(tensor, before[name])}
    assert moved and all(".indexer." in name for name in moved)
    assert log[-1]["indexer_loss"] < 0.7 * log[0]["indexer_loss"]
    _, log, folder = trained(prepared, "sparse", start="warm", recompute="block")
    model = models.load(folder)
    assert all(isinstance(block.attention, DSA) for block in model.blocks) and model.config.index_topk == 6
    final = model.state_dict()
    assert all(not torch.equal(final[name], after[name]) for name in after if "router.bias" not in name)
    assert 0 < log[-1]["indexer_loss"] < log[0]["indexer_loss"] + 0.1
    for start, knobs, words in (
        ("warm", {}, r"wrong\.index_topk"),
        ("dense", {"index_head_dim": 4}, r"wrong\.index_head_dim"),
        ("dense", {"compute": "fp8"}, r"wrong\.compute"),
    ):
        with pytest.raises(UserError, match=words):
            trained(prepared, "wrong", kind=Sparsify, start=start, **INDEXER | knobs)


@pytest.mark.parametrize("knobs", [{"index_topk": 0}, {"bias_speed": 0.1}, {"model": SPARSE, "start": ""}])
def test_bad_knobs_are_named(knobs: dict[str, Any]) -> None:
    with pytest.raises(UserError, match=rf"sparse\.{next(iter(knobs))}"):
        pretrain(Sparsify, name="sparse", **{"start": "dense"} | INDEXER | knobs)
