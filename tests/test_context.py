"""Context parallelism: rows split over several ranks train like whole rows on one."""

import dataclasses
import json
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist

from finback.config import UserError
from finback.kernels import documents
from finback.kernels.attention import torch_attention
from finback.kernels.documents import Documents, masked
from finback.model.config import TINY, V2_LITE, ModelConfig
from finback.model.recompute import Policy, use_recompute
from finback.model.rope_scaling import Yarn
from finback.model.transformer import Transformer
from finback.parallel.context import HeadExchange, spread_context
from finback.parallel.layout import Layout
from finback.planner import cluster, cost, hardware, traffic
from finback.planner.memory import rank_memory
from finback.planner.options import PlanOptions
from finback.planner.workload import Workload, parse_mesh
from finback.train.batch import Batch
from finback.train.loss import LossTerms, training_losses
from tests import toy
from tests.many import MANY, ROWS, SEQ_LEN, SPARSE_MANY, V4_MANY, Way, batches, on_one, on_ranks, pipeline, trained

MANY_HEADS = dataclasses.replace(MANY, num_attention_heads=4, num_nextn_predict_layers=2)
EXTENDED = dataclasses.replace(MANY_HEADS, rope_scaling=Yarn(factor=4.0, original_max_position_embeddings=64))
DENSE = dataclasses.replace(toy.DENSE, num_hidden_layers=4, num_attention_heads=8, head_dim=4, initializer_range=0.15)
WINDOWS = dataclasses.replace(DENSE, sliding_window=9, layer_types=("sliding_attention", "full_attention") * 2)
MIXED = dataclasses.replace(WINDOWS, nope_layers=(1,), partial_rotary_factor=0.5, local_rope_theta=300.0, norms="post")
# gpt-oss: sinks, windows, experts with biases
OSS = dataclasses.replace(
    WINDOWS,
    attention_bias="all",
    attention_sinks=True,
    n_routed_experts=4,
    num_experts_per_tok=2,
    first_k_dense_replace=0,
    n_shared_experts=0,
    scoring_func="softmax",
    swiglu_alpha=1.702,
    swiglu_limit=7.0,
)
OSS_PACKED = Way(OSS, optimizer="adamw", packed=True, looks=(19,))
PACKED = Way(MANY_HEADS, rows=(4, 8), packed=True, looks=(19,))


def agrees(one: dict[Way, Any], layout: Layout, tmp_path: Path, way: Way) -> None:
    """Over 20 steps: losses within 1e-5, norms within 1e-5 relative, biases within 1e-6 of those of one rank."""
    if way not in one:
        one[way] = on_one(way)
    on_ranks(layout.ranks, trained, layout, way, str(tmp_path / "out.json"))
    found, biases = json.loads((tmp_path / "out.json").read_text())
    numbers, expected = torch.tensor(found), torch.tensor(one[way][0])
    off = (numbers - expected).abs()
    assert off[:, :3].max() <= 1e-5 and (off[:, 3] <= 1e-5 * expected[:, 3].clamp(min=1)).all(), off.amax(dim=0)
    for name, bias in biases.items():
        torch.testing.assert_close(torch.tensor(bias), one[way][1][name.removeprefix("model.")], atol=1e-6, rtol=0)


@pytest.fixture(scope="module")
def one() -> dict[Any, Any]:
    """One rank's results by training setup."""
    return {}


@pytest.mark.parametrize(
    ("layout", "way"),
    [
        (Layout(cp=2), PACKED),
        (Layout(cp=2, ep=2), OSS_PACKED),
        *(
            pytest.param(layout, way, marks=pytest.mark.slow)
            for layout, way in (
                (Layout(cp=2), Way()),
                (Layout(cp=2), Way(DENSE)),
                (Layout(cp=4), Way(DENSE, packed=True)),
                (Layout(cp=2), Way(WINDOWS, packed=True)),
                (pipeline("1f1b", cp=2), Way(MIXED, packed=True)),
                (Layout(cp=4), OSS_PACKED),
                (Layout(dp=2, cp=2, ep=4, nodes=2, micro_batches=2), OSS_PACKED),
                (Layout(dp=4, ep=2, sharding="zero1"), OSS_PACKED),
                (Layout(dp=4), dataclasses.replace(OSS_PACKED, config=dataclasses.replace(OSS, n_routed_experts=2))),
                (pipeline("zbv", cp=2, ep=2), dataclasses.replace(OSS_PACKED, recompute="attention")),
                (Layout(cp=4, ep=4), PACKED),
                (Layout(dp=2, cp=2), PACKED),
                (Layout(dp=2, cp=2, ep=2), PACKED),
                (Layout(dp=2, cp=2, ep=4, nodes=2, micro_batches=2), PACKED),
                (Layout(dp=2, cp=2, sharding="zero1"), Way(MANY_HEADS)),
                (Layout(dp=2, cp=2), Way(DENSE, packed=True)),
                (pipeline("1f1b", cp=2), PACKED),
                (Layout(cp=2), Way(recompute="attention")),
                (pipeline("zbv", cp=2, ep=2), Way(packed=True)),
            )
        ),
    ],
)
def test_parts_of_rows_train_like_whole_rows(one: dict[Any, Any], layout: Layout, way: Way, tmp_path: Path) -> None:
    """Losses, gradient norms and router biases; documents, padding and MTP's labels cross the boundaries between parts.

    Two ranks with rows of their own, dp=2, differ as much from one rank: its norm is summed in fp32, theirs in fp64.
    """
    agrees(one, layout, tmp_path, way)


@pytest.mark.slow
def test_compiled_blocks_exchange_heads_too(tmp_path: Path) -> None:
    agrees({Way(compile=True): on_one(Way())}, Layout(cp=2), tmp_path, Way(compile=True))


def test_a_part_holds_what_mtp_reads_behind_it() -> None:
    tokens = torch.arange(20).view(2, 10)
    batch = Batch(tokens, tokens + 1, 8, document_ids=tokens // 5, advantages=torch.tensor([1.0, 2.0]))
    first, second = (batch.part(member, 2) for member in range(2))
    assert first.seq_len == 4 and first.tokens[0].tolist() == [0, 1, 2, 3, 4, 5]
    assert second.tokens[0].tolist() == [4, 5, 6, 7, 8, 9] and second.labels[1].tolist() == [15, 16, 17, 18, 19, 20]
    assert first.advantages is batch.advantages
    for depth in range(3):
        whole = torch.cat([first.labels_at(depth), second.labels_at(depth)], dim=1)
        assert torch.equal(whole, batch.labels_at(depth))


def _attention(heads: int, keys: int) -> None:
    """Output and gradients of this rank's tokens equal those of whole rows, under a mask and document by document."""
    rank, size, generator = dist.get_rank(), dist.get_world_size(), torch.Generator().manual_seed(1)
    whole = [torch.randn(2, n, 12, d, generator=generator) for n, d in ((heads, 8), (keys, 8), (keys, 6))]
    ids = torch.tensor([[0] * 5 + [1] * 7, [0] * 12])
    part = slice(rank * 12 // size, (rank + 1) * 12 // size)
    spread = HeadExchange(dist.group.WORLD, torch_attention)
    for mask in (None, masked(ids), Documents((5, 7, 12))):
        results = []
        for form, tokens in ((torch_attention, slice(None)), (spread, part)):
            inputs = [t[:, :, tokens].clone().requires_grad_() for t in whole]
            out = form(*inputs, 0.3, mask)
            (out * torch.arange(12.0)[tokens, None]).sum().backward()
            results.append([out.detach(), *(t.grad for t in inputs)])
        for found, expected in zip(results[1], results[0], strict=True):
            torch.testing.assert_close(found, expected[:, :, part], atol=1e-6, rtol=1e-5)


@pytest.mark.parametrize(
    ("ranks", "heads", "keys"), [(2, 4, 1), *(pytest.param(4, 12, n, marks=pytest.mark.slow) for n in (12, 6, 3, 2))]
)
def test_attention_over_heads_is_that_of_whole_rows(ranks: int, heads: int, keys: int) -> None:
    """Fewer key heads than ranks are replicated: 6, 3 and 2 of them over 4 ranks."""
    on_ranks(ranks, _attention, heads, keys)


def _long() -> None:
    """Rows too long for a mask, with recomputed blocks: the loss of whole rows through the model alone."""
    documents.LONGEST_MASKED = 4
    for batch in batches(PACKED, 1):
        terms, found = LossTerms(batch.counts(2).tolist()), []
        for member in (None, dist.get_rank()):
            model = Transformer(EXTENDED).initialise(5).train()
            if member is not None:
                spread_context(model, dist.group.WORLD)
                use_recompute(model, "block")
                batch = batch.part(member, 2)
            losses = training_losses(model, batch, terms)
            losses.total(terms).backward()  # type: ignore[no-untyped-call]
            numbers = [losses.detached(), model.embed.grad]
            if member is not None:
                for t in numbers:
                    dist.all_reduce(t)
            found.append(numbers)
        for a, b in zip(*found, strict=True):
            torch.testing.assert_close(a, b, atol=1e-6, rtol=1e-5)


def _sent(config: ModelConfig, recompute: Policy, expected: float) -> None:
    """Bytes that a rank sends in a step: all but its own part of what it exchanges, its own part to all others."""
    model, batch = Transformer(config).initialise(5).train(), next(batches(Way(config), 1))
    spread_context(model, dist.group.WORLD)
    use_recompute(model, recompute)
    sent, size = [], dist.get_world_size()
    gather, exchange = dist.all_gather, dist.all_to_all_single
    dist.all_gather = lambda parts, part, **k: sent.append(part.nbytes * (size - 1)) or gather(parts, part, **k)
    dist.all_to_all_single = lambda out, part, **k: (
        sent.append(part.nbytes * (size - 1) / size) or exchange(out, part, **k)
    )
    batch = batch.part(dist.get_rank(), size)
    losses = training_losses(model, batch, terms := LossTerms([1.0] * (1 + config.num_nextn_predict_layers), 0.3))
    losses.total(terms).backward()  # type: ignore[no-untyped-call]
    assert sum(sent) == expected


@pytest.mark.parametrize("recompute", ["none", pytest.param("block", marks=pytest.mark.slow)])
@pytest.mark.parametrize("config", [MANY, SPARSE_MANY, V4_MANY], ids=["V3", "V3.2", "V4"])
def test_the_planner_counts_what_is_sent(config: ModelConfig, recompute: Policy) -> None:
    work = Workload(Layout(cp=2), rows=ROWS, length=SEQ_LEN, precision="fp32", recompute=recompute)
    on_ranks(2, _sent, config, recompute, traffic.of(config, work, hardware.MACHINES["h100"]).context)


def test_documents_of_long_rows_lie_on_several_ranks() -> None:
    on_ranks(2, _long)


@pytest.mark.parametrize(
    ("layout", "words"),
    [
        (Layout(cp=3), r"layout\.cp = 3: does not divide the 2 heads"),
        (Layout(dp=2, cp=2, ep=8), r"layout\.ep = 8: does not divide dp x cp = 4"),
        (Layout(dp=2), r"layout\.dp = 2: pp x dp is 2, but there are 4 ranks"),
        (Layout(dp=4, cp=2), r"layout\.dp = 4: pp x dp x cp is 8, but there are 4 ranks"),
    ],
)
def test_what_cannot_be_cut_is_refused(layout: Layout, words: str) -> None:
    with pytest.raises(UserError, match=words):
        layout.check_trainable(MANY, 8, layout.ranks if layout.cp == 3 or layout.ep == 8 else 4)
    Layout(cp=2).check_length(SEQ_LEN)
    with pytest.raises(UserError, match=r"layout\.cp = 2: does not divide rows of 17 tokens"):
        Layout(cp=2).check_length(17)


def test_the_planner_counts_parts_of_rows() -> None:
    """A rank's activations are those of its part of a row; TINY's exchange of heads by hand: 4 heads, 5 layers."""
    site = hardware.site("h100:8", ())
    whole, cut = (Workload(Layout(cp=n), rows=1, length=4096, precision="bf16") for n in (1, 2))
    memory = [rank_memory(TINY, work, site.known)[0] for work in (whole, cut)]
    assert memory[1].activations == memory[0].activations / 2 and memory[1].optimizer == memory[0].optimizer / 2
    sent = [traffic.of(TINY, work, site.machine) for work in (whole, cut)]
    numbers = 4 * (48 + 48 + 32 + 32)  # per query, key, value and attention output
    assert sent[0].context == 0 and sent[1].context == 2 * 2048 * 5 * numbers * 2 / 2 and sent[1].context_seconds > 0
    shared = dataclasses.replace(DENSE, num_hidden_layers=1)  # 4 ranks get copies of its 2 key and value heads
    of_keys = traffic.of(shared, dataclasses.replace(whole, layout=Layout(cp=4)), site.machine)
    assert of_keys.context == 2 * 1024 * 2 * 4 * (8 + 4) * 2 * 3 / 4
    forward = [cost.step(V2_LITE, work, site.machine, 0.4, site.known).durations.f for work in (whole, cut)]
    assert 0.5 * forward[0] < forward[1] < 0.6 * forward[0]


def test_meshes_with_parts_of_rows_are_planned() -> None:
    assert parse_mesh("cp=2,dp=2", 8) == {"cp": 2, "dp": 2, "pp": 2, "sharding": "zero1"}
    with pytest.raises(UserError, match="pp · dp · cp = 1 · 2 · 3 are not 8 devices"):
        parse_mesh("pp=1,dp=2,cp=3", 8)
    site, options = hardware.site("h100:8", ()), PlanOptions(on="h100:8", mesh="cp=4,zero=3")
    found = cluster.plan("x", TINY, cluster.workload(8, 4096, site, options), 1e9, site, options)
    assert found.work.layout.cp == 4 and found.work.layout.ranks == 8 and "cp=4" in found.values["layout"]["mesh"]
    with pytest.raises(UserError, match="rows of 4,098 tokens"):
        cluster.plan("x", TINY, cluster.workload(8, 4098, site, options), 1e9, site, options)
