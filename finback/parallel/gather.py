"""What lies on many ranks as every one of them needs it: the whole model, for generating while training goes on, or some
numbers of a tensor.

One parameter after the other is put together by the ranks that hold its stage and sent to those of the others. A rank needs
memory for the whole model and its largest parameter while this lasts, and receives about the whole model.
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
    """Fill parameters and router biases of a whole model from what all ranks hold of them, by name; bytes that came from others.

    Numbers travel in the model's dtype. Ranks may share the parameters: then one of them `fills` them, and all wait for it.
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
                target.detach()[:0].zero_()  # the same memory has changed: engines look at a tensor's version
        else:
            received += target.itemsize * target.numel()
        if mesh.pp.size() > 1:
            dist.broadcast(target.detach(), group=group, group_src=owners[name])
    mesh.world.barrier()
    return received


@torch.no_grad()
def sampled(share: Share, step: int) -> Tensor:
    """Every step-th number of a tensor of which each rank holds a part of its own, row by row, in fp32, on all ranks."""
    found = torch.zeros(-(-math.prod(share.shape) // step), device=share.local.device)
    for start, view in share.runs():
        skipped = -start % step
        some = view[skipped::step].float()
        first = (start + skipped) // step
        found[first : first + len(some)] = some
    dist.all_reduce(found)
    return found
