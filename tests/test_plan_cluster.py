"""Layouts, memory, cost and traffic on named hardware: DeepSeek's published figures, and numbers worked by hand."""

import dataclasses
import math
from typing import Any

import numpy as np
import pytest
import torch

from finback.config import UserError
from finback.model.adaptable import in_blocks
from finback.model.config import TINY, V2_LITE, V3, ModelConfig
from finback.model.count import parameters
from finback.model.moe import Router
from finback.parallel.layout import Layout
from finback.planner import cluster, cost, expert_load, hardware, memory, published, recommend, traffic
from finback.planner.hardware import ASSUMPTIONS, MACHINES
from finback.planner.options import PlanOptions
from finback.planner.workload import Workload, parse_mesh
from finback.train import loss

H800, _ = hardware.find("h800:2048")
KNOWN = dict(ASSUMPTIONS)


def worst(work: Workload) -> float:
    return max(rank.total for rank in memory.rank_memory(V3, work, KNOWN))


def scheduled(name: str, **change: Any) -> Workload:
    """V3's pre-training under another schedule."""
    layout = dataclasses.replace(cost.V3_WORKLOAD.layout, schedule=name)  # type: ignore[arg-type]
    return dataclasses.replace(cost.V3_WORKLOAD, layout=layout, **change)


def plan(model: ModelConfig, rows: int, length: int, tokens: float, options: PlanOptions) -> cluster.ClusterPlan:
    site = hardware.site(options.on, options.assume)
    return cluster.plan("x", model, cluster.workload(rows, length, site, options), tokens, site, options)


def test_what_deepseek_published_comes_out() -> None:
    claims = {claim.what: claim for claim in published.claims(KNOWN)}
    assert claims["V3 parameters"].ours == 671_026_419_200
    assert claims["V3 cache bytes per token"].ours == 70_272
    assert all(abs(claims[name].off) < 1e-3 for name in ("V3 GFLOPs per token", "V2 GFLOPs per token"))
    for name in ("V3 H800-hours per trillion tokens", "V3 dollars in all", "R1 dollars"):
        assert abs(claims[name].off) < 0.1, claims[name]
    shares = [round(claim.ours) for what, claim in claims.items() if what.startswith("V4")]
    assert shares == [10, 27], "in single-token FLOPs of FP8"
    assert all(claim.rule and claim.source for claim in claims.values())
    # by hand from first principles: 250.456 GFLOPs over 38.94 % of 987.9 TFLOPS
    by_hand = 250.455926784e9 * 1e12 / (0.3894 * 432e12 / 0.4373) / 3600
    assert claims["V3 H800-hours per trillion tokens"].ours == pytest.approx(by_hand, rel=2e-3)
    assert claims["R1 dollars"].ours == (512 * 198 + 512 * 80 + 5000) * 2


def test_v3s_layout_fits_and_1f1b_without_recomputation_does_not() -> None:
    choice = recommend.judge(V3, cost.V3_WORKLOAD, H800, KNOWN)
    assert choice.fits and 1 - choice.worst.total / 80e9 >= 0.1
    plain = scheduled("1f1b", recompute="none")
    for precision in ("fp8", "bf16"):
        assert not recommend.judge(V3, dataclasses.replace(plain, precision=precision), H800, KNOWN).fits


def test_the_published_step_comes_out() -> None:
    share = cost.efficiency(V3, cost.V3_WORKLOAD, H800, KNOWN)
    step = cost.step(V3, cost.V3_WORKLOAD, H800, share.value, KNOWN)
    assert step.mfu == pytest.approx(0.3894, rel=1e-3)  # by construction
    assert step.seconds == pytest.approx(19.926, rel=0.01)  # arXiv 2505.09343, table 4
    assert sum(step.shares().values()) == pytest.approx(1)
    assert all(share >= 0 for share in step.shares().values())


def test_memory_by_hand() -> None:
    # one dense layer of width 4 with 2 heads of 3, one token, bf16, without recomputation
    c = dataclasses.replace(
        TINY,
        hidden_size=4,
        num_attention_heads=2,
        qk_nope_head_dim=2,
        qk_rope_head_dim=2,
        v_head_dim=3,
        q_lora_rank=5,
        kv_lora_rank=6,
        intermediate_size=7,
    )
    attention = 2 * (4 + 4) + 2 * (5 + 5 + 6 + 6 + 2) + 2 * 2 * (4 + 4 + 3) + 2 * 2 * 3 + 4 * 2
    assert memory.attention_activation(c, "bf16", "none") == attention
    assert memory.feed_forward_activation(c, False, "bf16", "none", 0.0) == 2 * (4 + 4) + 2 * 3 * 7
    # V3's way saves x, both latents, the rotary key and the output; and x, gate and up
    assert memory.attention_activation(c, "bf16", "selective") == 2 * (4 + 5 + 6 + 2) + 2 * 2 * 3 + 4 * 2
    assert memory.feed_forward_activation(c, False, "bf16", "selective", 0.0) == 2 * 4 + 2 * 2 * 7
    assert memory.layer_activation(c, False, "bf16", "block", 0.0) == 2 * 4


def test_what_cross_entropy_takes_by_hand() -> None:
    """A vocabulary of 1000 and a width of 4; 300 tokens are chunks of 256 and 44."""
    assert memory.CHUNK == loss.CHUNK
    c = dataclasses.replace(TINY, vocab_size=1000, hidden_size=4, num_nextn_predict_layers=0)
    # saved: gradients of 300 x 4 states and of the head; temporarily 256 x 1000 logits
    assert memory.cross_entropy(c, 300, "fp32", 1) == 4 * (300 * 4 + 4000) + 4 * 256 * 1000
    # in bf16 logits also have a gradient, and the head a copy
    in_bf16 = 2 * 300 * 4 + 4 * 4000 + (4 + 2) * 256 * 1000 + 2 * 4000
    assert memory.cross_entropy(c, 300, "bf16", 1) == in_bf16
    assert memory.cross_entropy(c, 10, "fp32", 1) == 4 * (10 * 4 + 4000) + 4 * 10 * 1000
    # two MTP modules save as much each; a wide head's scaled gradient is larger than the logits
    wide = dataclasses.replace(c, hidden_size=512, num_nextn_predict_layers=2)
    assert memory.cross_entropy(wide, 10, "fp8", 2) == 2 * 3 * (2 * 10 * 512 + 4 * 512_000) + 4 * 512_000
    # V3: 7.4 GB of head gradients per micro-batch between F and B, and ZB1P delays W on the last of 16 ranks
    head = V3.vocab_size * V3.hidden_size
    last = [memory.rank_memory(V3, scheduled(name), KNOWN)[15].working for name in ("1f1b", "zb1p")]
    assert last[1] - last[0] == pytest.approx(15 * 2 * (4 * head + 2 * 4096 * V3.hidden_size))
    assert memory.rank_memory(V3, scheduled("1f1b"), KNOWN)[0].working < 4 * head, "only the rank of the head needs it"


def test_what_finback_sends_to_experts_is_bf16() -> None:
    """V3's own schedule, which is only planned, sends FP8 with a scale per 128 numbers."""
    layout = Layout(pp=2, dp=2, ep=2, micro_batches=4, sharding="zero1")
    ours, theirs = (
        traffic.of(TINY, Workload(dataclasses.replace(layout, schedule=s), 8, 64, precision="fp8"), H800)
        for s in ("zb1p", "dualpipe")
    )
    assert ours.load is not None
    sent = 4 * 64 * 2 * TINY.hidden_size * ours.load.forwarded  # 4 x 64 tokens, half of 3 MoE layers and MTP's
    assert ours.dispatch_link == pytest.approx(sent * 2 * (2 + 2))
    assert theirs.dispatch_link == pytest.approx(sent * 2 * (1 + 4 / 128 + 2))


def test_states_by_hand() -> None:
    # V3.3.3: AdamW moments in bf16, gradients and masters in fp32
    assert memory.parameter_bytes("bf16", "adamw") == (2, 4, 8)
    assert memory.parameter_bytes("fp8", "muon") == (2, 4, 6)
    assert memory.parameter_bytes("fp32", "adamw") == (4, 4, 8)
    one = memory.rank_memory(TINY, Workload(rows=1, length=64), KNOWN)[0]
    p = parameters(TINY)
    assert (one.weights, one.gradients, one.optimizer) == (2 * p, 4 * p, 8 * p)
    shared = memory.rank_memory(TINY, Workload(Layout(dp=4, sharding="zero1"), rows=4, length=64), KNOWN)[0]
    assert (shared.weights, shared.optimizer) == (2 * p, 2 * p)
    rounded = memory.rank_memory(TINY, Workload(rows=1, length=64, rounded=True), KNOWN)[0]
    assert rounded.optimizer == 8 * p - 4 * in_blocks(TINY) and 0.5 * p < in_blocks(TINY) < p
    sharded = memory.rank_memory(TINY, Workload(Layout(dp=4), rows=4, length=64), KNOWN)[0]
    assert (sharded.weights, sharded.gradients) == (p / 2, p)


def test_more_recomputation_needs_less_and_takes_longer() -> None:
    layouts = [dataclasses.replace(cost.V3_WORKLOAD, recompute=r) for r in ("none", "selective", "block")]
    needs = [worst(layout) for layout in layouts]
    assert needs == sorted(needs, reverse=True)
    steps = [cost.step(V3, layout, H800, 0.5, KNOWN).seconds for layout in layouts]
    assert steps == sorted(steps)


def test_dualpipe_is_faster_than_1f1b_and_holds_twice_the_weights() -> None:
    plain = scheduled("1f1b")
    steps = [cost.step(V3, layout, H800, 0.5, KNOWN) for layout in (plain, cost.V3_WORKLOAD)]
    assert steps[1].seconds < 0.7 * steps[0].seconds and steps[1].exposed < steps[0].exposed
    held = [sum(r.weights for r in memory.rank_memory(V3, layout, KNOWN)) for layout in (plain, cost.V3_WORKLOAD)]
    # except the second copy of the embedding, which 1F1B needs for MTP
    assert held[1] == pytest.approx(2 * (held[0] - 2 * V3.vocab_size * V3.hidden_size))


def test_nothing_is_sent_by_one_device_alone() -> None:
    sent = traffic.of(TINY, Workload(rows=4, length=64), H800)
    assert sent == traffic.Traffic()


def test_traffic_by_hand() -> None:
    # two devices of one node, half the experts each: forward and backward, to and from, in bf16, 3 MoE layers and MTP's
    work = Workload(Layout(dp=2, ep=2, micro_batches=4, sharding="zero1"), rows=8, length=64)
    sent = traffic.of(TINY, work, H800)
    assert sent.load is not None and sent.dispatch_network == 0
    each_way = 4 * 64 * 4 * TINY.hidden_size * 2 * 2
    assert sent.dispatch_link == pytest.approx(2 * each_way * sent.load.forwarded)
    # plain parameters: half of the gradients in fp32 and weights in bf16 go to the other; each expert has one rank
    routed = 4 * 8 * 3 * 128 * 64
    assert sent.exchange == pytest.approx((parameters(TINY) - routed) * (4 + 2) / 2)
    assert sent.exchange_seconds == pytest.approx(sent.exchange / 160e9)


def test_gradients_in_bf16_and_in_buckets_by_hand() -> None:
    """Half the gradients' bytes and a rounded copy of them; the last backward pass hides what it has time for."""
    works = [
        Workload(Layout(dp=2, micro_batches=4, sharding="zero1", **knobs), rows=8, length=64)  # type: ignore[arg-type]
        for knobs in ({}, {"reduce": "bf16"}, {"bucket_mb": 25.0}, {"bucket_mb": 25.0, "reduce": "bf16"})
    ]
    p, (plain, rounded, bucketed, both) = parameters(TINY), works
    assert traffic.of(TINY, plain, H800).exchange == traffic.of(TINY, bucketed, H800).exchange == p * (4 + 2) / 2
    assert traffic.of(TINY, rounded, H800).exchange == traffic.of(TINY, both, H800).exchange == p * (2 + 2) / 2
    assert [memory.rank_memory(TINY, work, KNOWN)[0].gradients for work in works] == [4 * p, 6 * p, 4 * p, 6 * p]
    steps = [cost.step(TINY, work, H800, 0.5, KNOWN) for work in works]
    assert [step.exchange for step in steps] == pytest.approx([p * bytes_ / 160e9 for bytes_ in (3, 2, 1, 1)])
    # on a wire a million times as slow there is time for two thirds of a micro-batch's products
    slow = dataclasses.replace(H800, link=dataclasses.replace(H800.link, value=160e3))  # type: ignore[type-var]
    late, early = (cost.step(TINY, work, slow, 0.5, KNOWN) for work in (plain, bucketed))
    compute = late.durations.f + late.durations.b
    assert late.exchange - early.exchange == pytest.approx(compute * 2 / 3)


def test_routing_is_the_models_own() -> None:
    c = dataclasses.replace(V3, hidden_size=32)
    scores = np.random.default_rng(0).normal(size=(64, 256)).astype(np.float32)
    chosen = Router(c).select(torch.tensor(scores))
    ours = expert_load.route(c, scores)
    assert [set(row) for row in ours.tolist()] == [set(row) for row in chosen.tolist()]


def test_expert_load() -> None:
    even = expert_load.simulate(V3, 64, 8, tokens=4096)
    assert sum(even.per_rank) == pytest.approx(1) and even.max_over_mean < 1.2
    assert 3.9 < even.nodes <= 4  # V3 2.1.2: at most four
    assert even.remote_nodes == pytest.approx(even.nodes * 7 / 8, rel=0.02)  # its own is one of eight
    skewed = expert_load.simulate(V3, 64, 8, expert_load.popularity(256, 0.8, seed=1), tokens=4096)
    assert skewed.max_over_mean > 1.5 * even.max_over_mean
    free = expert_load.simulate(dataclasses.replace(V3, n_group=1, topk_group=1), 64, 8, tokens=4096)
    assert free.nodes > even.nodes + 1  # the nodes per token that the limit saves
    # eight distinct experts of 256 are on this many of 64 ranks; some copies have reached theirs at the first hop
    met = 64 * (1 - math.comb(256 - 4, 8) / math.comb(256, 8))
    assert 0.8 * met < free.forwarded < met
    one = expert_load.simulate(TINY, 1, 1, tokens=128)
    assert (one.nodes, one.remote_nodes, one.forwarded, one.max_over_mean) == (1, 0, 0, 1)


def test_given_popularity_that_is_none() -> None:
    for bad in ([1.0], [0.0] * 8, [math.nan] * 8):
        with pytest.raises(UserError, match="8 numbers above 0"):
            expert_load.simulate(TINY, 2, 8, bad)


def test_skew_makes_a_step_longer() -> None:
    plans = [
        plan(
            V3,
            15360,
            4096,
            1e12,
            PlanOptions(on="h800:2048", mesh="pp=16,ep=64", schedule="dualpipe", recompute="selective", skew=s),
        )
        for s in (0.0, 0.8)
    ]
    assert plans[1].step.seconds > plans[0].step.seconds


@pytest.mark.parametrize(
    ("on", "model", "rows"), [("h800:2048", V3, 15360), ("h100:8", V2_LITE, 512), ("4090", TINY, 64)]
)
def test_a_recommended_layout_fits_and_no_other_of_its_kind_is_faster(on: str, model: object, rows: int) -> None:
    length = 128 if model is TINY else 4096
    found = plan(model, rows, length, 1e9, PlanOptions(on=on))  # type: ignore[arg-type]
    assert found.values["memory"]["fits"] and found.work.layout.ranks == found.values["machine"]["devices"]
    for name, other in found.values["schedules"].items():
        if other.get("fits"):
            assert found.step.seconds <= 1.05 * other["step_seconds"], name


def test_what_fits_nowhere_says_so() -> None:
    found = plan(V3, 64, 4096, 1e9, PlanOptions(on="h800:8")).values
    assert not found["memory"]["fits"] and found["memory"]["free_share"] < 0


def test_every_number_of_the_hardware_table_has_its_source() -> None:
    for machine in MACHINES.values():
        facts = {k: v for k, v in vars(machine).items() if v is not None and k != "name"}
        assert {"memory", "bf16"} <= set(facts)
        assert all(fact.value > 0 and len(fact.source) > 8 for fact in facts.values()), machine.name
    assert all(fact.source for fact in ASSUMPTIONS.values())


def test_a_given_mfu_is_the_plans() -> None:
    found = plan(V2_LITE, 512, 4096, 1e12, PlanOptions(on="h100:8", assume=("mfu=0.25",))).values
    assert found["step"]["mfu"] == pytest.approx(0.25, rel=2e-3)
    hours = found["model"]["training_flops_per_token"] * 1e12 / (0.25 * 989.4e12) / 3600
    assert found["run"]["device_hours"] == pytest.approx(hours, rel=2e-3)
    assert found["run"]["dollars"] is None  # without a price
    assert found["run"]["kwh"] == pytest.approx(hours * 0.7 * 1.58, rel=2e-3)


def test_bills_by_hand() -> None:
    bill = cost.bill(TINY, Workload(rows=8, length=100), 9.0, 8e5, hardware.Site(H800, 4, KNOWN), 2.5)
    assert [bill[key] for key in ("steps", "seconds", "device_hours", "dollars")] == [1000, 9000, 10, 25]
    assert bill["kwh"] == pytest.approx(10 * 0.7 * 1.58) and bill["co2_kg"] == pytest.approx(10 * 0.7 * 1.58 * 0.436)


@pytest.mark.parametrize(
    ("mesh", "word"),
    [
        ("pp=15", "not 2048 devices"),
        ("pp=16,dp=64", "not 2048 devices"),
        ("pp=16,tp=8", "tensor parallelism"),
        ("pq=16", "Known: cp, dp, ep"),
        ("pp=x", "whole number"),
        ("pp=0", "whole number"),
        ("pp", "whole number"),
        ("pp=2,pp=4", "whole number"),
        ("fsdp=8,dp=8", "zero=3"),
        ("zero=2", "not supported"),
        ("pp=-4", "whole number"),
    ],
)
def test_impossible_meshes(mesh: str, word: str) -> None:
    with pytest.raises(UserError, match=word):
        parse_mesh(mesh, 2048)


def test_possible_meshes() -> None:
    assert parse_mesh("pp=16,ep=64", 2048) == {"pp": 16, "dp": 128, "ep": 64, "sharding": "zero1"}
    assert parse_mesh("fsdp=8", 8) == {"dp": 8, "pp": 1, "sharding": "fsdp"}
    assert parse_mesh("dp=4", 8) == {"dp": 4, "pp": 2, "sharding": "zero1"}
    assert parse_mesh("tp=1", 8) == {"pp": 1, "dp": 8, "sharding": "zero1"}


@pytest.mark.parametrize(
    ("change", "word"),
    [
        ({"ep": 48}, "256 experts"),
        ({"ep": 256}, "divide dp"),
        ({"pp": 64, "dp": 32, "ep": 32}, "64 stages, but there are layers for only 62"),
        ({"rows": 15361}, "does not divide"),
        ({"rows": 128 * 9}, "even number"),
        ({"rows": 128 * 8}, "at least 32"),
    ],
)
def test_layouts_that_cannot_be(change: dict[str, int], word: str) -> None:
    with pytest.raises(UserError, match=word):
        rows = change.pop("rows", 15360)
        work = dataclasses.replace(cost.V3_WORKLOAD, rows=rows)
        recommend.with_layout(V3, work, change, H800, 1)


@pytest.mark.parametrize(
    ("assume", "word"),
    [
        ("pu=1", "Did you mean 'pue'"),
        ("pue", "above 0"),
        ("pue=x", "above 0"),
        ("pue=-1", "above 0"),
        ("mfu=1.5", "a share above 1"),
        ("pue=nan", "above 0"),
        ("network=0", "above 0"),
    ],
)
def test_assumptions_that_are_none(assume: str, word: str) -> None:
    with pytest.raises(UserError, match=word):
        hardware.assumptions([assume], H800)


def test_assumptions_change_what_they_say() -> None:
    known, machine = hardware.assumptions(["network=25e9", "pue=1.1", "mfu=0.3"], H800)
    assert machine.network is not None and machine.network.value == 25e9 and machine.network.source.startswith("given")
    assert known["pue"].value == 1.1 and known["mfu"].value == 0.3 and "network" not in known
    a100, devices = hardware.find("a100:16")
    with pytest.raises(UserError, match="--assume network"):
        traffic.of(TINY, Workload(Layout(dp=devices), rows=16, length=64), a100)


LLAMA = ModelConfig(
    vocab_size=128256,
    hidden_size=16384,
    num_hidden_layers=126,
    num_attention_heads=128,
    intermediate_size=53248,
    attention="gqa",
    num_key_value_heads=8,
    head_dim=128,
    max_position_embeddings=8192,
)


def planned_remarks(c: ModelConfig, on: str, rows: int, length: int, **options: Any) -> list[str]:
    given = PlanOptions(on=on, **options)
    site = hardware.site(on, given.assume)
    return list(cluster.plan("x", c, cluster.workload(rows, length, site, given), 1e12, site, given).values["remarks"])


def test_what_has_no_basis_is_said() -> None:
    llama = "\n".join(planned_remarks(LLAMA, "h100:16384", 16384, 8192, mesh="pp=16", precision="bf16"))
    assert all(
        word in llama
        for word in (
            "no basis: the efficiency is that of V3",
            "38 to 43 %",
            "on 16,384",
            "it does not fit",
            "H800 only",
        )
    )
    poor = planned_remarks(V3, "h800:2048", 15360, 4096, mesh="pp=16,ep=64", schedule="zb1p", recompute="block")
    assert not any("less than half" in text for text in poor)
    worst = planned_remarks(V3, "h800:2048", 2048, 4096, mesh="pp=16,ep=64", schedule="1f1b", recompute="block")
    assert any("less than half of the 38.9% that V3 reached" in text for text in worst)
    known = "\n".join(planned_remarks(LLAMA, "h100:1024", 1024, 8192, mesh="pp=16", assume=("mfu=0.4",)))
    assert "efficiency" not in known and "less than half" not in known, "a given MFU needs no remark"
    published = planned_remarks(
        V3, "h800:2048", 15360, 4096, mesh="pp=16,ep=64", schedule="dualpipe", recompute="selective"
    )
    assert published == [], "V3's own plan has a basis"


def test_small_steps_have_a_floor() -> None:
    site = hardware.site("h800:8", ())
    layers = TINY.num_hidden_layers + TINY.num_nextn_predict_layers
    assert cost.least_seconds(TINY, 100, site) == pytest.approx(100 * layers * 40 * 5e-6)
    weights = 2 * parameters(V3, active=True, mtp=False)
    assert cost.least_seconds(V3, 1, hardware.site("h800:8", ())) == pytest.approx(
        max(weights / 3.35e12 / 8, 62 * 40 * 5e-6)
    )
    work = Workload(Layout(dp=8, sharding="zero1"), rows=32, length=128)
    slow, fast = (
        cost.step(TINY, work, H800, 0.5, hardware.assumptions([f"launch={launch}"], H800)[0])
        for launch in ("5e-6", "0")
    )
    passes = work.layout.micro_batches
    assert slow.seconds >= 3 * layers * 40 * 5e-6 * passes > fast.seconds
    large = cost.V3_WORKLOAD
    times = [
        cost.step(V3, large, H800, 0.5, hardware.assumptions([f"launch={launch}"], H800)[0]).seconds
        for launch in ("5e-6", "0")
    ]
    assert times[0] == times[1], "V3's kernels take longer than a launch"
