"""What each device sends in a step, over which wire, and how long it takes. No torch here.

Ranks are placed with data and expert parallelism innermost, so that an expert group fills whole nodes. All-to-all sends a
token once to each node that holds one of its experts and hands it on within the node (V3 2.1.2, 3.2.2): in FP8 on the way
to experts, in bf16 back.
"""

from dataclasses import dataclass
from functools import lru_cache

from finback.config import UserError
from finback.model.config import ModelConfig
from finback.planner import experts
from finback.planner.experts import Load
from finback.planner.hardware import Machine
from finback.planner.layout import Layout, part_parameters, parts
from finback.planner.memory import SCALE, parameter_bytes


@dataclass(frozen=True)
class Traffic:
    """Bytes each device sends in one step, and the seconds they take were nothing hidden."""

    dispatch_network: float = 0.0  # all-to-all between nodes
    dispatch_link: float = 0.0  # all-to-all within nodes
    pipeline: float = 0.0  # activations and their gradients to the next stage
    exchange: float = 0.0  # gradients summed, weights handed out
    dispatch_seconds: float = 0.0
    send_seconds: float = 0.0  # of one micro-batch to the next stage
    exchange_seconds: float = 0.0
    load: Load | None = None  # of expert ranks


def of(c: ModelConfig, layout: Layout, machine: Machine, skew: float = 0.0) -> Traffic:
    """Traffic of one step; `skew` is the Zipf exponent of expert popularity."""
    network = link = seconds = 0.0
    load = None
    if layout.ep > 1:
        load = spread(c, layout.ep, min(per_node(machine), layout.ep), skew)
        width = 2.0 if layout.precision != "fp8" else 1 + SCALE
        layers = c.num_hidden_layers + c.num_nextn_predict_layers
        moe = sum(c.is_moe(layer) for layer in range(layers)) / layout.stages
        # forward and backward: out in `width` bytes per number, back in bf16 (in fp32 where all is)
        back = 4.0 if layout.precision == "fp32" else 2.0
        sent = layout.operations * _tokens(layout) * moe * 2 * (width + back) * c.hidden_size
        network, link = sent * load.remote_nodes, sent * load.forwarded
        slow = network / wire(machine, layout.devices, inside=False) if network else 0.0
        seconds = max(slow, link / wire(machine, layout.ep, inside=True) if link else 0.0)
    passed = handed = 0.0
    if layout.pp > 1:
        handed = _tokens(layout) * c.hidden_size * (4.0 if layout.precision == "fp32" else 2.0)
        passed = 2 * layout.operations * handed
        handed /= wire(machine, layout.devices, inside=layout.devices <= per_node(machine))
    exchanged, exchange_seconds = _exchange(c, layout, machine)
    return Traffic(network, link, passed, exchanged, seconds, handed, exchange_seconds, load)


@lru_cache(maxsize=64)
def spread(c: ModelConfig, ep: int, node: int, skew: float) -> Load:
    """How tokens spread over the expert ranks, `node` of them to a node."""
    shares = experts.popularity(c.n_routed_experts, skew, seed=0) if skew else None
    return experts.simulate(c, ep, node, shares, tokens=1024)


def per_node(machine: Machine) -> int:
    """Devices joined by the fast link; 1 where none is known."""
    return int(machine.node.value) if machine.node else 1


def wire(machine: Machine, devices: int, inside: bool) -> float:
    """Bytes per second of the link within a node, or of the network; UserError where the table has none."""
    if inside and machine.link and devices <= per_node(machine):
        return machine.link.value
    name = "link" if inside and machine.node else "network"
    fact = machine.link if name == "link" else machine.network
    if fact is None:
        raise UserError(
            "--on", machine.name, f"no source gives the {name}'s speed", f"Give bytes/s: --assume {name}=50e9."
        )
    return fact.value


def _tokens(layout: Layout) -> int:
    return layout.micro_rows * layout.length


def _exchange(c: ModelConfig, layout: Layout, machine: Machine) -> tuple[float, float]:
    """Bytes and seconds of summing gradients and handing out weights, on the rank that has most to send."""
    if layout.dp == 1 and not (layout.pp > 1 and layout.plan.title == "DualPipe"):
        return 0.0, 0.0
    per_weight, per_gradient, _ = parameter_bytes(layout.precision, layout.optimizer)
    once = 2 * per_gradient if layout.zero == 0 else per_gradient + per_weight
    times = 1
    if layout.zero == 3:  # weights are gathered for each pass of each micro-batch
        once, times = per_gradient + 2 * per_weight, layout.micro_batches
    copies = 2 if layout.plan.title == "DualPipe" else 1
    pieces, most = parts(c, layout.stages), 0.0
    for rank in range(layout.pp):
        held = [pieces[stage] for stage in layout.held(rank)]
        ends = any(p.embeds for p in held) and any(p.scores for p in held)
        sizes = [part_parameters(c, p, ends) for p in held]
        sent = 0.0
        for number, group in ((0, layout.dp * copies), (1, layout.dp // layout.ep * copies)):
            amount = sum(size[number] for size in sizes) / (layout.ep if number else 1)
            sent += once * times * amount * (group - 1) / group
        most = max(most, sent)
    return most, most / wire(machine, layout.devices, inside=layout.devices <= per_node(machine))
