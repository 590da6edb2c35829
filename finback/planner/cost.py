"""Time of a step on a mesh, and the cost of a run: device-hours, money, energy. Does not import torch.

A step is the makespan of its schedule (planner/simulate.py) plus the exchange of gradients. An operation takes its FLOPs
divided by peak x efficiency, plus the exposed all-to-all. FLOPs are counted as in DeepSeek's papers: 2 per weight and token,
and attention over T / 2 keys, times three for training, without MTP. MTP and recomputation take time but do not count in
MFU.
"""

import dataclasses
from dataclasses import dataclass
from functools import lru_cache
from typing import Any

from finback.model.config import V3, ModelConfig
from finback.model.count import TokenFlops, parameters, token_flops, training_flops
from finback.parallel.layout import Layout, StageLayers, split_layers
from finback.planner import hardware, traffic
from finback.planner.hardware import Fact, Machine, Site
from finback.planner.memory import parameter_bytes
from finback.planner.simulate import Durations, Timeline, simulate
from finback.planner.traffic import Traffic
from finback.planner.workload import Workload

# V3's published pre-training (report 3.2): 16-way DualPipe, 64-way experts, ZeRO-1, 2048 H800, 15360 rows of 4096 per step
V3_WORKLOAD = Workload(
    Layout(pp=16, dp=128, ep=64, nodes=8, schedule="dualpipe", micro_batches=120, sharding="zero1"),
    rows=15360,
    recompute="selective",
    precision="fp8",
)


KERNELS = 40  # kernels of a layer's forward pass: norms, projections, rotary parts, attention, router, experts, sums


@dataclass(frozen=True)
class Step:
    """One optimizer step. The parts are in seconds, averaged over devices, and add up to `seconds`."""

    seconds: float
    mfu: float
    # share of the peak reached while computing
    efficiency: float
    # counted FLOPs at the peak
    at_peak: float
    # MTP's FLOPs at the peak
    mtp: float
    # recomputed FLOPs at the peak
    recompute: float
    # extra time because kernels do not reach the peak and experts are unbalanced
    below_peak: float
    # exposed all-to-all
    exposed: float
    # idle time from the schedule and from unequal stages
    bubble: float
    # exchange of gradients and weights
    exchange: float
    traffic: Traffic
    timeline: Timeline
    durations: Durations

    def shares(self) -> dict[str, float]:
        """Each part as a share of the total time."""
        names = ("at_peak", "mtp", "recompute", "below_peak", "exposed", "bubble", "exchange")
        return {name: getattr(self, name) / self.seconds for name in names}


@dataclass(frozen=True)
class StageFlops:
    """Forward FLOPs per token of one pipeline stage."""

    # products with weights, whose backward pass has a part for weight gradients
    linear: float
    # products of queries with keys, and of attention weights with values
    attention: float
    # recomputed in the backward pass
    again: float
    # number of layers, whose kernels start one after the other
    layers: int


def stage_flops(c: ModelConfig, stage: StageLayers, work: Workload, imbalance: float) -> StageFlops:
    """FLOPs of one stage as executed, including MTP."""
    layers = len(stage.layers)
    moe = sum(c.is_moe(layer) for layer in stage.layers)
    modules = sum(layer >= c.num_hidden_layers for layer in stage.layers)
    dense, sparse = (_layer(c, kind, work.length) for kind in (False, True))
    attention = layers * dense.attention_scores
    uneven = moe * sparse.experts * imbalance if work.layout.ep > 1 else 0.0
    linear = layers * dense.attention_linear + (layers - moe) * dense.dense + uneven
    linear += moe * (sparse.experts + sparse.shared + sparse.router)
    linear += (int(stage.has_head) + modules) * dense.head + modules * 4 * c.hidden_size**2
    again = 0.0
    if work.recompute == "block":
        again = linear + attention - (int(stage.has_head) + modules) * dense.head - modules * 4 * c.hidden_size**2
    elif work.recompute == "attention":
        again = attention + layers * dense.attention_linear
    elif work.recompute == "selective" and c.attention == "mla":
        query = (c.q_lora_rank or 0) * c.qk_head_dim
        latent = c.kv_lora_rank * (c.qk_nope_head_dim + c.v_head_dim)
        again = 2 * layers * c.num_attention_heads * (query + latent)
    return StageFlops(linear, attention, again, layers)


@lru_cache(maxsize=64)
def _layer(c: ModelConfig, moe: bool, length: int) -> TokenFlops:
    """FLOPs of one layer of this kind, and of the head."""
    first = 0 if moe and c.n_routed_experts else 1
    one = dataclasses.replace(
        c, num_hidden_layers=1, first_k_dense_replace=first, dense_layers=(), num_nextn_predict_layers=0
    )
    found = token_flops(one, length / 2)
    if c.attention != "compressed":
        return found
    every = token_flops(c, length / 2)  # its layers may differ in attention only
    mean = {name: getattr(every, name) / c.num_hidden_layers for name in ("attention_linear", "attention_scores")}
    return dataclasses.replace(found, **mean)


def step(
    c: ModelConfig, work: Workload, machine: Machine, efficiency: float, known: dict[str, Fact], skew: float = 0.0
) -> Step:
    """Predicts one step; `efficiency` is the share of the peak that products reach."""
    layout, sent = work.layout, traffic.of(c, work, machine, skew)
    imbalance = known["imbalance"].value
    if skew and sent.load:
        imbalance = max(imbalance, sent.load.max_over_mean - 1)
    every = [stage_flops(c, stage, work, imbalance) for stage in split_layers(c, layout.stages)]
    peak, tokens = machine.peak(work.precision), work.micro_tokens
    durations, compute = durations_of(every, tokens / (peak * efficiency), work, sent, known)
    timeline = simulate(layout.pipeline.table(layout.pp, layout.micro_batches), durations)
    hidden = compute * work.passes if layout.sharding == "fsdp" else 0.0  # gathers the next layer during this one
    if layout.bucket_mb:  # gradients are exchanged during the last backward pass
        width, weight = traffic.gradient_width(work), parameter_bytes(work.precision, work.optimizer)[0]
        hidden = min(sent.exchange_seconds * width / (width + weight), compute * 2 / 3)
    exchange = max(sent.exchange_seconds - hidden, 0.0)
    seconds = timeline.makespan + exchange
    trained = work.rows * work.length / work.layout.ranks
    counted = training_flops(c, work.length / 2, mtp=False) * trained / peak
    with_mtp = training_flops(c, work.length / 2, mtp=True) * trained / peak
    again = sum(s.again for s in every) / len(every) * work.passes * tokens / peak
    done = compute * work.passes
    busy = sum(end - start for rank in timeline.ranks for start, end, _ in rank) / layout.pp
    return Step(
        seconds=seconds,
        mfu=counted / seconds,
        efficiency=efficiency,
        at_peak=counted,
        mtp=with_mtp - counted,
        recompute=again,
        below_peak=done - with_mtp - again,
        exposed=busy - done,
        bubble=timeline.makespan - busy,
        exchange=exchange,
        traffic=sent,
        timeline=timeline,
        durations=durations,
    )


def durations_of(
    every: list[StageFlops], per_flop: float, work: Workload, sent: Traffic, known: dict[str, Fact]
) -> tuple[Durations, float]:
    """Durations of one micro-batch in a stage of average size, and the seconds of its products, forward and backward."""
    linear, attention, again = (
        sum(getattr(s, name) for s in every) / len(every) for name in ("linear", "attention", "again")
    )
    whole = 3 * linear + 3 * attention + again
    # small micro-batches are bound by kernel launches: once forward, twice backward
    started = 3 * launch_seconds(sum(s.layers for s in every) / len(every), known)
    per_flop = max(per_flop, started / whole)
    compute = whole * per_flop
    one_way, around = sent.dispatch_seconds / (2 * work.passes), sent.context_seconds / (2 * work.passes)
    open_ = (1 - known["overlap"].value) * 2 * one_way
    durations = Durations(
        f=(linear + attention) * per_flop + one_way + around,
        b=(2 * linear + 2 * attention + again) * per_flop + one_way + around,
        w=linear * per_flop,
        both=max(compute, 2 * one_way) + open_ + 2 * around if work.layout.pipeline.overlaps else None,
        send=sent.send_seconds,
        scale=tuple((3 * s.linear + 3 * s.attention + s.again) / whole for s in every),
    )
    return durations, compute


def launch_seconds(layers: float, known: dict[str, Fact]) -> float:
    """Lower bound of a forward pass through `layers` layers, from kernel launches, in seconds."""
    return KERNELS * layers * known["launch"].value if "launch" in known else 0.0


def least_seconds(c: ModelConfig, passes: float, site: Site) -> float:
    """Lower bound of consecutive forward passes in seconds: kernel launches, and reading the weights with all devices."""
    layers = c.num_hidden_layers + c.num_nextn_predict_layers
    bandwidth, active = site.machine.memory_bandwidth, parameters(c, active=True, mtp=False)
    reading = 2 * active / (bandwidth.value * site.devices) if bandwidth else 0.0
    return passes * max(launch_seconds(layers, site.known), reading)


def efficiency(c: ModelConfig, work: Workload, machine: Machine, known: dict[str, Fact], skew: float = 0.0) -> Fact:
    """The share of the peak to assume, with its source: given, or derived from an MFU by removing its layout's losses."""
    if "efficiency" in known:
        return known["efficiency"]
    if "mfu" in known:
        return Fact(_solve(c, work, machine, known, known["mfu"].value, skew), "from --assume mfu")
    return _published_efficiency(known["imbalance"], known["overlap"])


@lru_cache(maxsize=16)
def _published_efficiency(imbalance: Fact, overlap: Fact) -> Fact:
    """The efficiency of V3's pre-training, under the assumptions that its step depends on."""
    h800, _ = hardware.find("h800")
    assert h800.mfu is not None, "the reference machine has a published MFU"
    known = {"imbalance": imbalance, "overlap": overlap}
    value = _solve(V3, V3_WORKLOAD, h800, known, h800.mfu.value)
    return Fact(value, f"from MFU {h800.mfu.value:.2%} ({h800.mfu.source}) without that layout's own losses")


def _solve(
    c: ModelConfig, work: Workload, machine: Machine, known: dict[str, Fact], mfu: float, skew: float = 0.0
) -> float:
    """The efficiency at which a layout's whole step has this MFU; losses hardly depend on it, so a few iterations suffice."""
    value = mfu
    for _ in range(4):
        reached = step(c, work, machine, value, known, skew).mfu
        value *= mfu / reached
        if abs(mfu / reached - 1) < 1e-3:
            break
    return value


def bill(
    c: ModelConfig, work: Workload, step_seconds: float, tokens: float, site: Site, price: float | None
) -> dict[str, Any]:
    """Cost of training `tokens` tokens at a step time: steps, FLOPs as the papers count, and what `spending` returns."""
    steps = tokens / (work.rows * work.length)
    flops = tokens * training_flops(c, work.length / 2, mtp=False)
    spent = spending(steps * step_seconds, site, price)
    return {"tokens": tokens, "flops": flops, "steps": steps, "seconds": steps * step_seconds, **spent}


def spending(seconds: float, site: Site, price: float | None) -> dict[str, Any]:
    """Device-hours, money and energy; None where price or power is unknown.

    Energy is the devices' rated power times the site's PUE.
    """
    hours, watts = seconds * site.devices / 3600, site.machine.watts
    price = site.machine.price.value if price is None and site.machine.price else price
    kwh = None if watts is None else hours * watts.value * site.known["pue"].value / 1000
    return {
        "device_hours": hours,
        "dollars": None if price is None else hours * price,
        "kwh": kwh,
        "co2_kg": None if kwh is None else kwh * site.known["co2"].value,
    }
