"""Where experts go when they are served: EPLB, copies of the busy ones and even loads (V3 3.4, DeepSeek's EPLB).

Hierarchical where expert groups divide among nodes, so that node-limited routing stays within nodes: groups onto nodes,
copies inside each node, copies onto its GPUs. Otherwise the same with all as one group on one node.
"""

from dataclasses import dataclass

import torch
from torch import Tensor

from finback.config import UserError
from finback.parallel.layout import pack


@dataclass(frozen=True)
class Placement:
    """Which expert each slot holds, of `slots per GPU` successive slots for every GPU, and the reverse."""

    # (layers, slots)
    expert: Tensor
    # (layers, experts, most copies), -1 where an expert has fewer
    slots: Tensor
    # (layers, experts)
    copies: Tensor


def place(load: Tensor, slots: int, groups: int, nodes: int, gpus: int) -> Placement:
    """Place experts by their load (layers, experts) into `slots` slots, equally many on each of `gpus` GPUs.

    Loads are as a rule a moving average of the router's counts. Ties go to the first.
    """
    experts = load.size(1)
    _check(experts, slots, groups, nodes, gpus)
    if groups % nodes:
        groups = nodes = 1
    rows = [_layer(row, slots, groups, nodes, gpus) for row in load.double().tolist()]
    expert = torch.tensor(rows)
    copies = torch.stack([torch.bincount(row, minlength=experts) for row in expert])
    where = torch.full((len(rows), experts, int(copies.max())), -1)
    for layer, row in enumerate(rows):
        for index in range(experts):
            own = [slot for slot, e in enumerate(row) if e == index]
            where[layer, index, : len(own)] = torch.tensor(own)
    return Placement(expert, where, copies)


def _check(experts: int, slots: int, groups: int, nodes: int, gpus: int) -> None:
    for name, value, of, problem in (
        ("slots", slots, slots < experts, f"fewer than {experts} experts"),
        ("gpus", gpus, slots % gpus, f"does not divide {slots} slots"),
        ("nodes", nodes, gpus % nodes, f"does not divide {gpus} GPUs"),
        ("groups", groups, experts % groups, f"does not divide {experts} experts"),
    ):
        if of:
            raise UserError(f"placement.{name}", value, problem, "Change one of the two.")


def _layer(load: list[float], slots: int, groups: int, nodes: int, gpus: int) -> list[int]:
    """The expert in each slot."""
    size = len(load) // groups
    of_group = [sum(load[g * size : (g + 1) * size]) for g in range(groups)]
    placed: list[int] = []
    for members in pack(of_group, nodes, groups // nodes):
        experts = [g * size + i for g in members for i in range(size)]
        copied = replicate([load[e] for e in experts], slots // nodes)
        copies = [copied.count(i) for i in range(len(experts))]
        weights = [load[experts[i]] / copies[i] for i in copied]
        placed += [experts[copied[item]] for gpu in pack(weights, gpus // nodes, slots // gpus) for item in gpu]
    return placed


def replicate(load: list[float], slots: int) -> list[int]:
    """Which expert each slot holds: every expert once, then always one more of that with most load per copy."""
    copies = [1] * len(load)
    chosen = list(range(len(load)))
    while len(chosen) < slots:
        busiest = max(range(len(load)), key=lambda i: load[i] / copies[i])
        copies[busiest] += 1
        chosen.append(busiest)
    return chosen
