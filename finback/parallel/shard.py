"""Shards a model's parameters over ranks by FSDP2, or by ZeRO-1, which shards only the optimizer's state.

In both, each parameter has a `ShardedParameter` on this rank, a DTensor that describes its share of the whole. Optimizers
and checkpoints work with shares only and do not depend on the kind of sharding.
"""

import math
from abc import ABC, abstractmethod
from dataclasses import dataclass
from itertools import chain
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed.device_mesh import DeviceMesh
from torch.distributed.fsdp import CPUOffloadPolicy, FSDPModule, MixedPrecisionPolicy, OffloadPolicy, fully_shard
from torch.distributed.tensor import DTensor, Shard
from torch.distributed.tensor._dtensor_spec import DTensorSpec, TensorMeta
from torch.distributed.tensor._utils import compute_local_shape_and_global_offset
from torch.distributed.tensor.placement_types import Placement, _StridedShard

from finback.checkpoint.shares import Share
from finback.model.moe import MoE
from finback.model.mtp import MTP
from finback.model.rope import rotation
from finback.model.transformer import Block, Transformer
from finback.parallel.buckets import Buckets
from finback.parallel.layout import Layout, share
from finback.parallel.mesh import Mesh


@dataclass
class ShardedParameter:
    """This rank's share of a parameter, with its share of the gradient as `value.grad`."""

    # the name in Transformer.state_dict
    name: str
    # a DTensor
    value: nn.Parameter
    # whether an earlier stage has the same parameter and counts it in norms
    is_copy: bool = False


def local(tensor: Tensor) -> Tensor:
    """This rank's part of a DTensor, in the same memory; a plain tensor is returned unchanged."""
    return tensor.to_local() if isinstance(tensor, DTensor) else tensor


def like(tensor: Tensor, part: Tensor) -> Tensor:
    """Wraps a local tensor as a DTensor with the placement of `part`; returns it unchanged if `part` is plain.

    It has the shape of local(part), but matrices may have another row length, and it may be on a device other than the mesh's.
    """
    if not isinstance(part, DTensor):
        return tensor
    shape = part.shape if part.ndim < 2 else torch.Size([*part.shape[:-1], tensor.size(-1)])
    meta = TensorMeta(shape, torch.empty(shape, device="meta").stride(), tensor.dtype)
    # not from_local, which would move it to the mesh's device
    return DTensor(tensor, DTensorSpec(part.device_mesh, part.placements, meta), requires_grad=False)


def share_of(name: str, tensor: Tensor) -> Share:
    """This rank's share of a DTensor and its offset in the whole; for a plain tensor, all of it."""
    shape, offset = tuple(tensor.shape), (0,) * tensor.ndim
    if isinstance(tensor, DTensor):
        _, offset = compute_local_shape_and_global_offset(shape, tensor.device_mesh, tensor.placements)
    return Share(name, shape, offset, local(tensor.detach()))


def expert_parameters(model: nn.Module) -> dict[str, nn.Parameter]:
    """The parameters of routed experts by name; their first dimension indexes experts."""
    layers = [(name, module) for name, module in model.named_modules() if isinstance(module, MoE)]
    return {f"{name}.{leaf}": p for name, moe in layers for leaf, p in moe.named_parameters(recurse=False)}


def materialise(root: nn.Module, model: Transformer, device: torch.device, offload: bool = False) -> None:
    """Gives a blank model, sharded or not, memory for this rank's share; parameters have no values yet."""
    root.to_empty(device="cpu" if offload else device)
    for module in root.modules() if offload else ():  # FSDP2 fetches parameters only
        for name, buffer in module.named_buffers(recurse=False):
            setattr(module, name, torch.empty_like(buffer, device=device))
    if model.config.tie_word_embeddings and "head" in dict(model.named_children()):
        model.head.weight = model.embed  # to_empty unties them
    model.cos, model.sin = (t.to(device) for t in rotation(model.config, model.config.max_position_embeddings))
    for router in model.routers():
        router.bias.zero_()
        router.load.zero_()


class Sharding(ABC):
    """The sharding of the parameters of this rank's stages."""

    # the shares of each stage
    parts: list[list[ShardedParameter]]

    @abstractmethod
    def zero(self) -> None:
        """Clears all gradients."""

    def overlap(self) -> None:  # noqa: B027 - does nothing if gradients are summed block by block, or after all passes
        """Call before the last backward pass of a step: gradients may be summed while it runs."""

    @abstractmethod
    def reduce(self) -> None:
        """Call after the last backward pass of a step: sums each share's gradient over the ranks that hold the parameter."""

    def publish(self) -> None:  # noqa: B027 - does nothing if passes read the shares themselves
        """Call after shares have changed: makes the change visible to forward passes."""

    def rest(self) -> None:  # noqa: B027 - does nothing if passes gather no parameters
        """Call after forward passes without a backward pass: frees the parameters that they have gathered."""


class FullyShard(Sharding):
    """FSDP2: parameters are gathered block by block, only while they are used. Experts are sharded over edp ranks only."""

    def __init__(self, roots: list[nn.Module], models: list[Transformer], layout: Layout, mesh: Mesh) -> None:
        """roots: the modules to call, which contain the blank models."""
        for root, model in zip(roots, models, strict=True):
            _fully_shard(root, model, layout, mesh)
            materialise(root, model, mesh.device, layout.offload)
        self.parts = [[ShardedParameter(n, p) for n, p in model.named_parameters()] for model in models]
        self.roots = roots

    def zero(self) -> None:
        for part in chain(*self.parts):
            part.value.grad = None

    def reduce(self) -> None:
        for part in chain(*self.parts):
            if part.value.grad is None and part.value.requires_grad:  # the step did not use this module
                part.value.grad = torch.zeros_like(part.value)

    def rest(self) -> None:
        for module in chain.from_iterable(root.modules() for root in self.roots):
            if isinstance(module, FSDPModule):
                module.reshard()


def _fully_shard(root: nn.Module, model: Transformer, layout: Layout, mesh: Mesh) -> None:
    exact = MixedPrecisionPolicy(reduce_dtype=torch.float32, cast_forward_inputs=False)
    rounded = MixedPrecisionPolicy(torch.bfloat16, torch.float32, cast_forward_inputs=False)
    policy = rounded if layout.gather == "bf16" else exact
    # passes of a pipeline interleave, so the next one needs the same parameters again
    reshard_after = False if layout.pp > 1 else None
    stored = CPUOffloadPolicy(pin_memory=mesh.device.type == "cuda") if layout.offload else OffloadPolicy()

    def shard(module: nn.Module, policy: MixedPrecisionPolicy, over: str = "dp") -> None:
        axis = mesh.dp if over == "dp" else mesh.edp
        how: dict[str, Any] = {
            "mesh": axis,
            "reshard_after_forward": reshard_after,
            "mp_policy": policy,
            "offload_policy": stored,
        }
        fully_shard(module, **how, shard_placement_fn=lambda p: Shard(_cut(p, axis.size())))

    modules = list(model.modules())
    for moe in [m for m in modules if isinstance(m, MoE)]:  # the inner modules first
        shard(moe.router, exact)  # the gate is gathered in fp32, whatever layout.gather is
        if moe.config.n_shared_experts:
            shard(moe.shared, policy)
        else:
            moe.register_forward_hook(_apart)
        shard(moe, policy, over="edp")
    for kind in (Block, MTP):
        for outer in [m for m in modules if isinstance(m, kind)]:
            shard(outer, policy)
    shard(root, exact)
    for module in root.modules():
        if isinstance(module, FSDPModule):
            # sums, not means: the step divides by the number of tokens
            module.set_gradient_divide_factor(1.0)
            module.set_force_sum_reduction_for_comms(True)
            if mesh.device.type == "cpu":  # no overlap on a CPU, so prefetching would only cost memory
                module.set_modules_to_backward_prefetch([module])


def _apart(module: nn.Module, inputs: tuple[Tensor, ...], output: Tensor) -> Tensor:
    """Returns a copy instead of a view, because FSDP2 hooks the output of a module and a view may lose the hooks."""
    return output.clone()


def _cut(parameter: Tensor, members: int) -> int:
    """The dimension along which a parameter is sharded: the first, or an expert's rows if experts do not divide evenly."""
    return 1 if parameter.ndim == 3 and len(local(parameter)) % members else 0


class ZeroOne(Sharding):
    """ZeRO-1: parameters and gradients are whole on every rank that uses them; an optimizer sees its share of each.

    Frozen parameters have no gradients and are not exchanged.
    """

    def __init__(self, models: list[Transformer], layout: Layout, mesh: Mesh) -> None:
        for model in models:
            materialise(model, model, mesh.device)
        known = {id(p) for model in models for p in expert_parameters(model).values()}
        learnt = [p for model in models for p in model.parameters() if p.requires_grad]
        experts, others = ([p for p in learnt if (id(p) in known) == is_one] for is_one in (True, False))
        self.shared = [(axis, ps) for axis, ps in ((mesh.dp, others), (mesh.edp, experts)) if ps]
        dtype = torch.bfloat16 if layout.reduce == "bf16" else torch.float32
        self.gradients = [Buckets(ps, axis, round(layout.bucket_mb * 2**20), dtype) for axis, ps in self.shared]
        self.parts = [
            [ShardedParameter(n, _view(p, mesh, id(p) in known)) for n, p in model.named_parameters()]
            for model in models
        ]

    def zero(self) -> None:
        for gradients in self.gradients:
            gradients.flat.zero_()

    def overlap(self) -> None:
        for gradients in self.gradients:
            gradients.arm()

    def reduce(self) -> None:
        for gradients in self.gradients:
            gradients.sum_()

    @torch.no_grad()
    def publish(self) -> None:
        for axis, parameters in self.shared:
            me, members = axis.get_local_rank(), range(axis.size())
            theirs = [[_narrow(p.detach(), axis.size(), member) for p in parameters] for member in members]
            sizes = [sum(t.numel() for t in part) for part in theirs]
            mine = parameters[0].new_zeros(max(sizes))
            mine[: sizes[me]] = torch.cat([t.flatten() for t in theirs[me]])
            everyone = mine.new_empty(len(members), max(sizes))
            dist.all_gather(list(everyone), mine, group=axis.get_group())
            for row, size, part in zip(everyone, sizes, theirs, strict=True):
                for t, values in zip(part, row[:size].split([t.numel() for t in part]), strict=True):
                    t.copy_(values.view_as(t))


def _narrow(whole: Tensor, members: int, member: int) -> Tensor:
    dim = _cut(whole, members)
    start, stop = share(whole.size(dim), members, member)
    return whole.narrow(dim, start, stop - start)


def _view(parameter: nn.Parameter, mesh: Mesh, is_of_experts: bool) -> nn.Parameter:
    """A share that is a view of a whole parameter, and of its gradient if it learns, placed as FSDP2 would place it."""
    axis, where, shape = mesh.dp, mesh.dp, list(parameter.shape)
    placements: list[Placement] = [Shard(0)]
    if is_of_experts:
        axis = where = mesh.edp
        dim = _cut(parameter, axis.size())
        placements = [Shard(dim)]
        if mesh.ep.size() > 1:
            where = DeviceMesh._concatenate([mesh.edp, mesh.ep])
            placements = [_StridedShard(0, split_factor=mesh.ep.size()) if dim == 0 else Shard(dim), Shard(0)]
            shape[0] *= mesh.ep.size()
    stride = torch.empty(shape, device="meta").stride()

    def mine(whole: Tensor) -> DTensor:
        t = _narrow(whole, axis.size(), axis.get_local_rank())
        return DTensor.from_local(t, where, placements, run_check=False, shape=torch.Size(shape), stride=stride)

    part = nn.Parameter(mine(parameter.detach()), parameter.requires_grad)
    part.grad = None if parameter.grad is None else mine(parameter.grad)
    return part


@torch.no_grad()
def global_norm(parts: list[ShardedParameter]) -> float:
    """The norm of the gradients over all ranks."""
    gradients = [local(part.value.grad) for part in parts if part.value.grad is not None]
    square = torch.zeros((), dtype=torch.float64, device=gradients[0].device)
    for part, gradient in zip(parts, gradients, strict=True):
        if not part.is_copy:
            square += gradient.double().square().sum()
    dist.all_reduce(square)
    return math.sqrt(square.item())
