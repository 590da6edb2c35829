"""Training indexers: the divergence worked by hand, and a dense model that becomes sparse."""

import dataclasses
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers
from torch import Tensor

from finback.checkpoint import models
from finback.checkpoint.hf_config import model_config, raw_config
from finback.config import UserError
from finback.model.count import parameters
from finback.model.dsa import DSA, SharedDSA, pick
from finback.model.dsa_training import TaughtCSA, TaughtDSA, divergence, divergences, take_divergences, teach_indexers
from finback.model.picking import trace_indexers
from finback.model.recompute import use_recompute
from finback.model.rope import rotate_last
from finback.model.transformer import Transformer
from finback.model.windows import windows_of
from finback.parallel.layout import Layout
from finback.stages.extend import Extend
from finback.stages.sparsify import Sparsify
from finback.train.rates import Phase
from tests.test_model import SPARSE, random_model
from tests.test_pretrain import prepared, pretrain, trained
from tests.toy import CONFIG, V4

__all__ = ["prepared"]

INDEXER: dict[str, Any] = {"index_topk": 6, "index_n_heads": 4, "index_head_dim": 8}


def test_a_divergence_by_hand() -> None:
    """Two of three keys are visible: target (1/4, 3/4), scores (0, ln 3) -> 0; equal scores -> ln 2 - H(1/4)."""
    target, looked = torch.tensor([[[0.25, 0.75, 0.0]]]), torch.tensor([[[True, True, False]]])
    log3 = torch.tensor(3.0).log()
    assert divergences(target, torch.tensor([[[0.0, log3, 9.0]]]), looked).item() == pytest.approx(0.0, abs=1e-6)
    flat = divergences(target, torch.tensor([[[1.0, 1.0, 9.0]]]), looked).item()
    assert flat == pytest.approx(0.693147 - 0.562335, abs=1e-5)


@pytest.mark.parametrize("dense", [True, False])
def test_what_an_indexer_learns_is_the_attention(dense: bool) -> None:
    """One layer's loss against explicit attention; its gradient reaches only the indexer, the main loss all else."""
    model = teach_indexers(random_model(SPARSE), "warm-up" if dense else "sparse").train()
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


@pytest.mark.parametrize("dense", [True, False])
def test_what_v4s_indexer_learns_is_the_attention_on_entries(dense: bool) -> None:
    """A CSA layer's loss against explicit attention; its gradient reaches only the indexer, the main loss all else."""
    model, length = teach_indexers(Transformer(V4).initialise(0), "warm-up" if dense else "sparse").train(), 30
    attention: TaughtCSA = model.blocks[0].attention
    tokens = torch.randint(0, 50, (2, length), generator=torch.Generator().manual_seed(0))
    given: list[Tensor] = []
    attention.register_forward_pre_hook(lambda _, inputs: given.extend(inputs[:3]))
    hidden = model(tokens)
    loss = attention.loss
    assert loss is not None

    with torch.no_grad():
        x, *tables = given
        cos, sin = (table.chunk(2, dim=-1)[attention.own] for table in tables)
        q_latent = attention.q_norm(attention.q_down(x))
        query = attention.query_norm(attention.q_up(q_latent).unflatten(-1, (4, 16)))
        query = rotate_last(query, cos[:, :, None], sin[:, :, None])
        near = rotate_last(attention.entry_norm(attention.entry(x)), cos, sin)
        windows, angles = windows_of(None, length, 4, x.device), torch.cat([cos, sin], dim=-1)
        far, keys = (c(c.record(x), angles, windows) for c in (attention.compressor, attention.indexer.compressor))
        asked, weight = attention.indexer.queries(x, q_latent, cos, sin)
        scores = torch.stack(
            [weight[..., j, None] * (asked[:, :, j] @ keys.transpose(1, 2)).relu() for j in range(asked.size(2))]
        ).sum(dim=0)
        place, number = torch.arange(length), torch.arange(length // 4)
        seen = (number < (place[:, None] + 1) // 4)[None]
        looked = seen.expand(2, -1, -1) if dense else pick(scores, seen, V4.index_topk)
        distance = place[:, None] - place
        is_near = (distance >= 0) & (distance < V4.sliding_window)
        total = torch.zeros_like(scores)
        for head in range(4):
            products = query[:, :, head] @ torch.cat([far, near], dim=1).transpose(1, 2) * attention.scale
            seen_both = torch.cat([looked, is_near.expand(2, -1, -1)], dim=-1)
            sink = attention.sink[head].expand(2, length, 1)
            weights = torch.cat([products.masked_fill(~seen_both, -torch.inf), sink], dim=-1).softmax(-1)
            total += weights[..., : len(number)]
        target = total / total.sum(-1, keepdim=True).clamp(min=1e-30)
        guess = scores.masked_fill(~looked, -torch.inf).softmax(-1)
        expected = torch.where(looked, target * (target.clamp(min=1e-30) / guess.clamp(min=1e-30)).log(), 0).sum(-1)
    assert loss.item() == pytest.approx(expected.mean().item(), rel=1e-4)

    losses = take_divergences(model)
    assert losses is not None
    losses.backward(retain_graph=True)
    reached = {name for name, p in model.named_parameters() if p.grad is not None}
    assert reached == {n for n, _ in model.named_parameters() if ".indexer." in n}
    assert all(p.grad is None or p.grad.isfinite().all() for p in model.parameters())
    model.zero_grad()
    hidden.square().sum().backward()
    assert not any(".indexer." in name for name, p in model.named_parameters() if p.grad is not None)
    if not dense:
        plain = Transformer(V4).initialise(0).train()
        assert torch.equal(plain(tokens), hidden)


def test_a_dense_model_becomes_sparse(prepared: Path) -> None:
    """The warm-up trains indexers alone, the sparse stage everything; the divergence from the attention shrinks."""
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
    ):
        with pytest.raises(UserError, match=words):
            trained(prepared, "wrong", kind=Sparsify, start=start, **INDEXER | knobs)


def test_v4s_indexers_are_taught_where_there_is_something_to_pick(prepared: Path) -> None:
    """A warm-up of the indexers alone, then a sparse stage, in packed rows; not where all entries are selected."""
    short = dataclasses.replace(V4, vocab_size=CONFIG.vocab_size, index_topk=4)
    phases = (Phase(64, 0.0, 1.0), Phase(256))
    _, log, _ = trained(prepared, "v4", model=short, phases=phases)
    assert "indexer_loss" not in log[0]
    indexer = {"index_topk": 2, "index_n_heads": 16, "index_head_dim": 16}
    _, log, folder = trained(prepared, "v4-warm", kind=Sparsify, start="v4", adam_lr=3e-2, phases=phases, **indexer)
    before, after = models.load(prepared / "v4").state_dict(), models.load(folder).state_dict()
    moved = {name for name, tensor in after.items() if not torch.equal(tensor, before[name])}
    assert moved and all(".indexer." in name for name in moved)
    assert log[-1]["indexer_loss"] < 0.9 * log[0]["indexer_loss"]
    _, log, folder = trained(
        prepared, "v4-sparse", start="v4-warm", document_mask=True, recompute="block", phases=phases
    )
    final = models.load(folder)
    assert final.config.index_topk == 2 and log[-1]["indexer_loss"] > 0
    assert {n for n, t in final.state_dict().items() if ".indexer." in n and torch.equal(t, after[n])} == set()
    with pytest.raises(UserError, match=r"wrong\.index_head_dim"):
        trained(prepared, "wrong", kind=Sparsify, start="v4", **indexer | {"index_head_dim": 8})


def test_v4s_rows_get_longer_and_its_attention_sparse(prepared: Path) -> None:
    """V4's schedule: short rows, longer rows with all entries visible, indexer warm-up, sparse, then longer again."""
    model = dataclasses.replace(V4, vocab_size=CONFIG.vocab_size, index_topk=32, max_position_embeddings=32)
    phases = (Phase(64, 0.0, 1.0), Phase(256))
    indexer = {"index_topk": 2, "index_n_heads": 16, "index_head_dim": 16}
    stages: dict[str, dict[str, Any]] = {
        "4k": {"model": model, "seq_len": 16},
        "16k": {"kind": Extend, "start": "4k", "window": 64, "factor": 2.0, "seq_len": 32},
        "warm-up": {"kind": Sparsify, "start": "16k", "seq_len": 64, "adam_lr": 3e-2, **indexer},
        "64k": {"kind": Extend, "start": "warm-up", "window": 64, "seq_len": 64},
        "1m": {"kind": Extend, "start": "64k", "window": 128, "seq_len": 128},
    }
    before: dict[str, Tensor] = {}
    for name, knobs in stages.items():
        _, log, folder = trained(prepared, f"v4-{name}", **knobs | start_of(knobs), phases=phases, batch_size=2)
        found = models.load(folder)
        after = found.state_dict()
        moved = {n for n, t in after.items() if n in before and not torch.equal(t, before[n])}
        learns = {n for n in after if ".indexer." in n} & moved
        assert ("indexer_loss" in log[0]) == bool(learns) == (name in ("warm-up", "64k", "1m")), name
        assert not before or (moved > learns) == (name != "warm-up"), name
        assert found.config.index_topk == (32 if name in ("4k", "16k") else 2)
        assert found.config.max_position_embeddings == knobs.get("window", 64 if before else 32)
        before = after


def start_of(knobs: dict[str, Any]) -> dict[str, Any]:
    """The stage that a stage starts from, by its name in this file."""
    return {"start": f"v4-{knobs['start']}"} if "start" in knobs else {}


@pytest.mark.parametrize("knobs", [{"index_topk": 0}, {"bias_speed": 0.1}, {"model": SPARSE, "start": ""}])
def test_bad_knobs_are_named(knobs: dict[str, Any]) -> None:
    with pytest.raises(UserError, match=rf"sparse\.{next(iter(knobs))}"):
        pretrain(Sparsify, name="sparse", **{"start": "dense"} | INDEXER | knobs)


SHARING = dataclasses.replace(SPARSE, num_hidden_layers=4, shared_indexers=(1, 3))


def test_layers_that_share_an_indexer_see_what_it_selects() -> None:
    """Equals layers whose indexers are forced to the selection of the layer below; unused indexers do not exist."""
    ours = random_model(SHARING)
    assert parameters(SHARING) == sum(p.numel() for p in ours.parameters())
    assert [isinstance(b.attention, SharedDSA) for b in ours.blocks] == [False, True, False, True]
    apart = Transformer(dataclasses.replace(SHARING, shared_indexers=())).initialise(0).eval()
    apart.load_state_dict(ours.state_dict(), strict=False)
    tokens = torch.randint(0, 97, (2, 40), generator=torch.Generator().manual_seed(0))
    own, given = (torch.full((80, n, SHARING.index_topk), -1) for n in (4, 2))
    with torch.no_grad():
        with trace_indexers(ours).recording(given, torch.arange(80)):
            expected = ours(tokens)
        follow = given.repeat_interleave(2, dim=1).unflatten(0, (2, 40))
        with trace_indexers(apart).recording(own, torch.arange(80), follow):
            assert torch.equal(apart(tokens), expected)
    assert not torch.equal(given[:, 0], given[:, 1]) and (given >= 0).any()


@pytest.mark.parametrize("dense", [True, False])
def test_layers_that_share_an_indexer_look_where_it_is_taught_to(dense: bool) -> None:
    """All tokens in the dense warm-up, the selected ones later; recomputation makes the same selection."""
    tokens = torch.randint(0, 97, (2, 30), generator=torch.Generator().manual_seed(0))
    plain = random_model(dataclasses.replace(SHARING, index_topk=30) if dense else SHARING)
    model = random_model(SHARING)
    model.load_state_dict(plain.state_dict())
    teach_indexers(model, "warm-up" if dense else "sparse").train()
    found, gradients = model(tokens), []
    assert (found - plain(tokens)).abs().max() <= 1e-5
    for policy in ("none", "block"):
        use_recompute(model, policy)  # type: ignore[arg-type]
        model.zero_grad()
        divergences = take_divergences(model) if policy == "none" else None
        (model(tokens).square().sum() + (take_divergences(model) or 0)).backward()
        assert divergences is None or divergences > 0
        gradients.append({n: p.grad.clone() for n, p in model.named_parameters() if p.grad is not None})
    assert gradients[0].keys() == gradients[1].keys()
    for name, gradient in gradients[0].items():
        torch.testing.assert_close(gradients[1][name], gradient, rtol=1e-4, atol=1e-5, msg=name)


@pytest.mark.parametrize(
    ("given", "expected"),
    [
        ({"indexer_types": ["full", "shared", "full", "shared"]}, (1, 3)),
        ({"index_topk_pattern": "FFSS"}, (2, 3)),
        ({"index_topk_pattern": ["full", "full", "full", "shared"]}, (3,)),
        ({"index_topk_freq": 4}, (2, 3)),
        ({"index_topk_freq": 2, "index_skip_topk_offset": 1}, (1, 3)),
        ({}, ()),
    ],
)
def test_glm5_says_in_three_ways_which_layers_share(given: dict[str, Any], expected: tuple[int, ...]) -> None:
    raw = raw_config(dataclasses.replace(SHARING, index_rope_interleaved=True), "float32")
    del raw["indexer_types"]
    assert model_config(raw | given).shared_indexers == expected
    theirs = transformers.GlmMoeDsaConfig(num_hidden_layers=4, **given)
    assert tuple(i for i, kind in enumerate(theirs.indexer_types) if kind == "shared") == expected


def test_what_cannot_share_is_told() -> None:
    with pytest.raises(
        UserError, match=r"model\.shared_indexers = \(0,\): not layers of latent attention from layer 1 on"
    ):
        dataclasses.replace(SHARING, shared_indexers=(0,))
    with pytest.raises(UserError, match=r"layout\.pp = 2: stages do not pass on what an indexer selects"):
        Layout(pp=2, micro_batches=2).check(SHARING, 8)
    with pytest.raises(UserError, match="GLM-5 alone has them"):
        raw_config(SHARING, "float32")
