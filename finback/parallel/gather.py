"""Gathers on every rank what many ranks hold: the whole model, for generating during training, or samples of a tensor.

The ranks that hold a stage assemble its parameters one after another and send them to the ranks of other stages. Meanwhile
each rank needs memory for the whole model and its largest parameter; it receives about the whole model.
"""

import math
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed.tensor import DTensor

from finback.checkpoint.shares import Share
from finback.model.moe import router_buffers
from finback.model.transformer import Transformer
from finback.parallel.mesh import Mesh


@torch.no_grad()
def gather(held: dict[str, Tensor], mesh: Mesh, into: Transformer, fills: bool = True) -> int:
    """Fills parameters and router biases of a whole model by name, from the shares of all ranks. Collective.

    Returns the bytes received from other ranks. Numbers are sent in the model's dtype. If ranks share the parameters' memory,
    one of them `fills` it and the others wait.
    """
    received = 0
    group = mesh.pp.get_group()
    names: list[list[str]] = [[] for _ in range(mesh.pp.size())]
    dist.all_gather_object(names, list(held), group=group)
    owners = {name: rank for rank in reversed(range(len(names))) for name in names[rank]}
    wanted: dict[str, Tensor] = dict(into.named_parameters()) | router_buffers(into)
    for name, target in wanted.items():
        if owners[name] == mesh.pp.get_local_rank():
            mine = held[name].detach()
            if isinstance(mine, DTensor):
                received += target.itemsize * (mine.numel() - mine.to_local().numel())
                rounded: Any = mine.to(target.dtype)
                mine = rounded.full_tensor()
            if fills or not isinstance(target, nn.Parameter):
                target.copy_(mine)
            else:
                target.detach()[
                    :0
                ].zero_()  # bumps the tensor's version, by which engines notice that its memory has changed
        else:
            received += target.itemsize * target.numel()
        if mesh.pp.size() > 1:
            dist.broadcast(target.detach(), group=group, group_src=owners[name])
    mesh.world.barrier()
    return received


@torch.no_grad()
def sampled(share: Share, step: int) -> Tensor:
    """Every step-th number of a row-major tensor whose parts are on different ranks; fp32, on all ranks. Collective."""
    found = torch.zeros(-(-math.prod(share.shape) // step), device=share.local.device)
    for start, view in share.runs():
        skipped = -start % step
        some = view[skipped::step].float()
        first = (start + skipped) // step
        found[first : first + len(some)] = some
    dist.all_reduce(found)
    return found
