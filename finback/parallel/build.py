"""Builds this rank's share of a model from a config and a layout; no rank ever holds the whole model.

Models are created on the meta device, cut to this rank's stages and experts and sharded, and only then get memory and values.
"""

from collections.abc import Callable
from typing import Any, NamedTuple

import torch
from torch import nn
from torch.distributed.tensor import DTensor, Shard

from finback.checkpoint.shares import Share, Values
from finback.model.config import ModelConfig
from finback.model.moe import MoE, router_buffers
from finback.model.transformer import Transformer
from finback.parallel.context import spread_context
from finback.parallel.experts import spread_experts
from finback.parallel.layout import Layout, share
from finback.parallel.mesh import Mesh
from finback.parallel.pipeline import Loss, PipelineStage, cut
from finback.parallel.shard import FullyShard, Sharding, ZeroOne, expert_parameters, share_of


class Built(NamedTuple):
    """The models of this rank's stages, the modules to call instead of them, and their sharding."""

    models: list[Transformer]
    roots: list[nn.Module]
    sharding: Sharding


def build(
    config: ModelConfig,
    layout: Layout,
    mesh: Mesh,
    values: Values,
    compute: torch.dtype = torch.float32,
    loss: Loss | None = None,
    put_on: Callable[[Transformer], Any] = lambda model: model,
    dtype: torch.dtype = torch.float32,
) -> Built:
    """Builds this rank's share with its values, in training mode, with parameters in `dtype`. A pipeline needs `loss`.

    `put_on` changes in place how a model computes and which parameters are trainable; it runs before experts are distributed.
    """
    stages = layout.stages_of(mesh.pp.get_local_rank())
    models = [blank(config, compute, dtype) for _ in stages]
    roots: list[nn.Module] = list(models)
    if layout.pp > 1:
        assert loss is not None, "a pipeline ends with a loss"
        models = [cut(model, number, layout.stages) for model, number in zip(models, stages, strict=True)]
        ends = zip(models, stages, strict=True)
        roots = [PipelineStage(model, number, layout.stages, loss) for model, number in ends]
    fsdp = layout.sharding == "fsdp"
    for model in models:
        put_on(model)
        _keep_own_experts(model, mesh, fsdp)
        spread_experts(model, mesh)
        if mesh.cp is not None:
            spread_context(model, mesh.cp.get_group())
        model.train()
    sharding = FullyShard(roots, models, layout, mesh) if fsdp else ZeroOne(models, layout, mesh)
    values.fill(shares(models, mesh))
    return Built(models, roots, sharding)


def blank(config: ModelConfig, compute: torch.dtype, dtype: torch.dtype = torch.float32) -> Transformer:
    """A model on the meta device, whose parameters have no memory."""
    with torch.device("meta"):
        return Transformer(config, compute, dtype)


def _keep_own_experts(model: Transformer, mesh: Mesh, fsdp: bool) -> None:
    """Drops the experts of other ranks from a blank model."""
    if mesh.ep.size() == 1:
        return
    for moe in [m for m in model.modules() if isinstance(m, MoE)]:
        for name in [name for name, _ in moe.named_parameters(recurse=False)]:
            whole: nn.Parameter = getattr(moe, name)
            start, stop = share(len(whole), mesh.ep.size(), mesh.ep.get_local_rank())
            mine = whole.detach()[start:stop]
            # a DTensor tells FSDP that this is a part of the parameter; ZeRO-1 takes plain tensors
            part = DTensor.from_local(mine, mesh.ep, [Shard(0)], run_check=False) if fsdp else mine
            setattr(moe, name, nn.Parameter(part, whole.requires_grad))


def shares(models: list[Transformer], mesh: Mesh) -> list[Share]:
    """This rank's shares of parameters and router biases, including copies (ZeRO-1, and the embedding at both ends)."""
    return [share for model in models for share in _shares(model, mesh)]


def _shares(model: Transformer, mesh: Mesh) -> list[Share]:
    found, experts = [], expert_parameters(model)
    for name, parameter in model.named_parameters():
        mine = share_of(name, parameter)
        if name in experts and not isinstance(parameter, DTensor):  # split along the ep axis only
            members, member, (rows, *rest) = mesh.ep.size(), mesh.ep.get_local_rank(), mine.shape
            mine = Share(name, (members * rows, *rest), (member * rows, *(0 for _ in rest)), mine.local)
        found.append(mine)
    return found + [share_of(name, bias) for name, bias in router_buffers(model).items()]
