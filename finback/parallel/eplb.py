"""Places experts on GPUs for serving by EPLB: busy experts are copied, and loads are balanced (V3 3.4, DeepSeek's EPLB).

If the number of nodes divides the number of expert groups, placement is hierarchical, so that node-limited routing stays
within nodes: groups go to nodes, experts are copied within each node, copies go to its GPUs. Otherwise all experts are placed as one
group on one node.
"""

from dataclasses import dataclass

import torch
from torch import Tensor

from finback.config import UserError
from finback.parallel.layout import pack


@dataclass(frozen=True)
class Placement:
    """The expert in each slot and the slots of each expert. Each GPU has slots / gpus consecutive slots."""

    # (layers, slots), the expert in each slot
    expert: Tensor
    # (layers, experts, most copies), the slots of each expert, -1 if it has fewer copies
    slots: Tensor
    # (layers, experts), the number of copies
    copies: Tensor


def place(load: Tensor, slots: int, groups: int, nodes: int, gpus: int) -> Placement:
    """Places experts by their load (layers, experts) in `slots` slots, slots / gpus on each GPU.

    Loads are usually a moving average of the router's counts. Ties go to the lower index. UserError if sizes do not divide.
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
    """The expert in each slot of one layer."""
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
    """The expert in each slot: every expert once, then repeatedly the one with the highest load per copy."""
    copies = [1] * len(load)
    chosen = list(range(len(load)))
    while len(chosen) < slots:
        busiest = max(range(len(load)), key=lambda i: load[i] / copies[i])
        copies[busiest] += 1
        chosen.append(busiest)
    return chosen
