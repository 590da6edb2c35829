"""Traffic of each device in a step: bytes per wire, and seconds. Does not import torch.

Ranks are placed with data and expert parallelism innermost, so that an expert group fills whole nodes. All-to-all sends a token
once to each node that holds one of its experts and forwards it within the node (V3 2.1.2, 3.2.2), out and back in the
activations' dtype. V3 sends FP8 on the way out.
"""

import math
from dataclasses import dataclass
from functools import lru_cache

from finback.config import UserError
from finback.model.config import CSA, HCA, ModelConfig
from finback.planner import expert_load
from finback.planner.expert_load import Load
from finback.planner.hardware import Machine
from finback.planner.memory import SCALE, parameter_bytes, rank_stages
from finback.planner.workload import Workload


@dataclass(frozen=True)
class Traffic:
    """Bytes each device sends in one step, and their seconds if nothing is hidden."""

    # all-to-all between nodes
    dispatch_network: float = 0.0
    # all-to-all within nodes
    dispatch_link: float = 0.0
    # exchange of heads for tokens around attention, or gathering what sparse attention reads, if rows are split
    context: float = 0.0
    # activations and their gradients to the next stage
    pipeline: float = 0.0
    # summing gradients and distributing weights
    exchange: float = 0.0
    dispatch_seconds: float = 0.0
    context_seconds: float = 0.0
    # seconds to send one micro-batch to the next stage
    send_seconds: float = 0.0
    exchange_seconds: float = 0.0
    # load of the expert ranks
    load: Load | None = None


def of(c: ModelConfig, work: Workload, machine: Machine, skew: float = 0.0) -> Traffic:
    """Traffic of one step; `skew` is the Zipf exponent of expert popularity."""
    layout = work.layout
    network = link = seconds = 0.0
    # bytes per value sent to an expert, and in any other transfer
    out = back = 4.0 if work.precision == "fp32" else 2.0
    if work.precision == "fp8" and layout.schedule == "dualpipe":  # V3's schedule, for planning only, with FP8 dispatch
        out = 1 + SCALE
    load = None
    if layout.ep > 1:
        load = spread(c, layout.ep, min(per_node(machine), layout.ep), skew)
        layers = c.num_hidden_layers + c.num_nextn_predict_layers
        moe = sum(c.is_moe(layer) for layer in range(layers)) / layout.stages
        # out and back, in the forward and in the backward pass
        sent = work.passes * work.micro_tokens * moe * 2 * (out + back) * c.hidden_size
        network, link = sent * load.remote_nodes, sent * load.forwarded
        slow = network / wire(machine, layout.ranks, inside=False) if network else 0.0
        seconds = max(slow, link / wire(machine, layout.ep, inside=True) if link else 0.0)
    passed = handed = 0.0
    if layout.pp > 1:
        handed = work.micro_tokens * c.hidden_size * back
        passed = 2 * work.passes * handed
        handed /= wire(machine, layout.ranks, inside=layout.ranks <= per_node(machine))
    context = _context(c, work, back)
    around = context / wire(machine, layout.cp, inside=layout.cp <= per_node(machine)) if context else 0.0
    exchanged, exchange_seconds = _exchange(c, work, machine)
    return Traffic(network, link, context, passed, exchanged, seconds, around, handed, exchange_seconds, load)


def _context(c: ModelConfig, work: Workload, width: float) -> float:
    """Bytes that a rank sends around attention: queries, keys, values and outputs, forward and backward.

    `width`: bytes per value. A rank keeps its own share; recomputation sends again.
    """
    cp, heads = work.layout.cp, c.num_attention_heads
    if c.index_topk or c.attention == "compressed":
        return _gathered(c, work, width)
    if c.attention == "mla":
        numbers = heads * 2 * (c.qk_head_dim + c.v_head_dim)
    else:  # with fewer key heads than ranks, keys go to several ranks
        numbers = 2 * c.head_dim * (heads + math.lcm(c.num_key_value_heads, cp))
    layers = (c.num_hidden_layers + c.num_nextn_predict_layers) / work.layout.stages
    ways = 3 if work.recompute in ("attention", "block") else 2
    return ways * work.passes * work.micro_tokens * layers * numbers * width * (cp - 1) / cp


def _gathered(c: ModelConfig, work: Workload, width: float) -> float:
    """The same for sparse attention: a rank receives what all heads share, for all tokens of other ranks, and sends gradients back.

    DSA's indexer keys have no gradient. What V4 compresses into entries differs by layer.
    """
    layers = range(c.num_hidden_layers + c.num_nextn_predict_layers)
    forward = backward = 0
    for layer in layers:
        if c.attention == "mla":
            forward += c.kv_lora_rank + c.qk_rope_head_dim + c.index_head_dim
            backward += c.kv_lora_rank + c.qk_rope_head_dim
            continue
        numbers = c.head_dim
        if (kind := c.layer_type(layer)) == HCA:
            numbers += 2 * c.head_dim + c.rope_dim
        elif kind == CSA:
            numbers += 4 * (c.head_dim + c.index_head_dim) + c.rope_dim
        forward, backward = forward + numbers, backward + numbers
    again = 2 if work.recompute in ("attention", "block") else 1
    of_a_stage = (again * forward + backward) / work.layout.stages
    return work.passes * work.micro_tokens * of_a_stage * width * (work.layout.cp - 1)


@lru_cache(maxsize=64)
def spread(c: ModelConfig, ep: int, node: int, skew: float) -> Load:
    """How tokens spread over the expert ranks, `node` per node."""
    shares = expert_load.popularity(c.n_routed_experts, skew, seed=0) if skew else None
    return expert_load.simulate(c, ep, node, shares, tokens=1024)


def per_node(machine: Machine) -> int:
    """Devices connected by the fast link; 1 if unknown."""
    return int(machine.node.value) if machine.node else 1


def wire(machine: Machine, devices: int, inside: bool) -> float:
    """Bytes per second of the link within a node, or of the network; UserError if unknown."""
    if inside and machine.link and devices <= per_node(machine):
        return machine.link.value
    name = "link" if inside and machine.node else "network"
    fact = machine.link if name == "link" else machine.network
    if fact is None:
        problem = f"no source gives the {name}'s speed"
        raise UserError("--on", machine.name, problem, f"Give bytes/s: --assume {name}=50e9.")
    return fact.value


def gradient_width(work: Workload) -> float:
    """Bytes per gradient that ranks exchange."""
    return 2.0 if work.layout.reduce == "bf16" else parameter_bytes(work.precision, work.optimizer)[1]


def _exchange(c: ModelConfig, work: Workload, machine: Machine) -> tuple[float, float]:
    """Bytes and seconds of summing gradients and distributing weights, on the rank with the most to send."""
    layout, copies = work.layout, work.layout.pipeline.copies
    if layout.holders * copies == 1:
        return 0.0, 0.0
    per_weight, per_gradient = parameter_bytes(work.precision, work.optimizer)[0], gradient_width(work)
    once = 2 * per_gradient if layout.sharding == "ddp" else per_gradient + per_weight
    times = 1
    if layout.sharding == "fsdp":  # weights are gathered for each pass of each micro-batch
        once, times = per_gradient + 2 * (4 if layout.gather == "fp32" else 2), layout.micro_batches
    groups = layout.holders * copies, layout.edp * copies
    shared = [((rank.plain, groups[0]), (rank.routed, groups[1])) for rank in rank_stages(c, layout)]
    most = once * times * max(sum(size * (group - 1) / group for size, group in sizes) for sizes in shared)
    return most, most / wire(machine, layout.ranks, inside=layout.ranks <= per_node(machine))
