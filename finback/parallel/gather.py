"""The whole model on every rank, for what cannot be done share by share: generating, while training goes on.

One parameter after the other is put together by the ranks that hold its stage and sent to those of the others. A rank needs
memory for the whole model and its largest parameter while this lasts, and receives about the whole model.
"""

import torch
import torch.distributed as dist
from torch import Tensor
from torch.distributed.tensor import DTensor

from finback.model.transformer import Transformer
from finback.parallel.mesh import Mesh
from finback.parallel.shard import router_biases


@torch.no_grad()
def gather(held: dict[str, Tensor], mesh: Mesh, into: Transformer) -> None:
    """Fill parameters and router biases of a whole model from what all ranks hold of them, by name."""
    group = mesh.pp.get_group()
    names: list[list[str]] = [[] for _ in range(mesh.pp.size())]
    dist.all_gather_object(names, list(held), group=group)
    owners = {name: rank for rank in reversed(range(len(names))) for name in names[rank]}
    wanted: dict[str, Tensor] = dict(into.named_parameters()) | router_biases(into)
    for name, target in wanted.items():
        if owners[name] == mesh.pp.get_local_rank():
            mine = held[name].detach()
            target.copy_(mine.full_tensor() if isinstance(mine, DTensor) else mine)
        if mesh.pp.size() > 1:
            dist.broadcast(target.detach(), group=group, group_src=owners[name])
