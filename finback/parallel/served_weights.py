"""The whole weights that an engine on this rank reads during training, however the trained parameters are sharded.

Rollouts call `ServedWeights` at every update, which brings the weights up to date. On CPUs the ranks of a machine share one
copy, in memory that is freed when the last of them ends.
"""

import os
import platform
from collections.abc import Callable
from contextlib import suppress
from pathlib import Path
from typing import Any

import torch
from torch import nn

from finback.model.config import ModelConfig
from finback.model.layers import RMSNorm
from finback.model.moe import Router
from finback.model.rope import rotation
from finback.model.transformer import Transformer
from finback.parallel.mesh import World

ALIGNED = 64  # bytes


class ServedWeights:
    """A model for generating: the trained one itself, or a whole copy of a sharded one."""

    def __init__(self, model: Transformer, gathered: Callable[[Transformer], int] | None = None) -> None:
        """gathered: fills the copy from the shares of all ranks, collectively, and returns the bytes received; None: no copy."""
        self.model, self._gathered = model, gathered
        # whether the copy is out of date
        self.is_old = gathered is not None
        # received from other ranks so far
        self.bytes = 0

    def __call__(self) -> Transformer:
        """Updates the copy if the trained weights have changed, and returns the model. Collective."""
        if self.is_old and self._gathered is not None:
            self.bytes += self._gathered(self.model)
            self.is_old = False
        return self.model

    def learnt(self) -> None:
        """Marks the copy as out of date after the trained weights have changed."""
        self.is_old = self._gathered is not None


def whole_copy(
    config: ModelConfig,
    compute: torch.dtype,
    dtype: torch.dtype,
    world: World,
    put_on: Callable[[Transformer], Any] = lambda model: model,
) -> tuple[Transformer, bool]:
    """A frozen model without values, with matrices in `dtype`, and whether this rank must fill them.

    Routers and norms are fp32 at every compute dtype. `put_on` changes the memory layout of the blank model in place.
    """
    with torch.device("meta"):
        model = Transformer(config, compute, dtype).eval().requires_grad_(False)
    for module in model.modules():
        if isinstance(module, RMSNorm | Router):
            module.float()
    put_on(model)
    shared = _shared_memory(model, world) if world.device.type == "cpu" else None
    storage, fills = shared or (None, True)
    _lay_out(model, storage, world.device)
    return model, fills


def _lay_out(model: Transformer, storage: torch.UntypedStorage | None, device: torch.device) -> None:
    """Gives a blank model memory; parameters are placed one after another in `storage` if it is given."""
    start = 0
    for module in model.modules():
        for name, parameter in list(module.named_parameters(recurse=False)):
            there = torch.empty_like(parameter, device="cpu" if storage is not None else device)
            if storage is not None:
                there.set_(storage, start // there.itemsize, there.shape, there.stride())
                start += _aligned(there)
            setattr(module, name, nn.Parameter(there, requires_grad=False))
        for name, buffer in list(module.named_buffers(recurse=False)):
            setattr(module, name, torch.zeros_like(buffer, device=device))
    if model.config.tie_word_embeddings:
        model.head.weight = model.embed
    model.cos, model.sin = (t.to(device) for t in rotation(model.config, model.config.max_position_embeddings))


def _aligned(tensor: torch.Tensor) -> int:
    """The bytes of a tensor, rounded up to the alignment."""
    return -(-tensor.numel() * tensor.itemsize // ALIGNED) * ALIGNED


def _shared_memory(model: Transformer, world: World) -> tuple[torch.UntypedStorage, bool] | None:
    """Memory for a model's parameters that the ranks of each machine share, and whether this rank is the machine's first.

    None on all ranks if any of them cannot map it.
    """
    size = sum(map(_aligned, (p for m in model.modules() for p in m.parameters(recurse=False))))
    machines = world.gather(_machine())
    members = [rank for rank, machine in enumerate(machines) if machine == machines[world.rank]]
    own = -1
    if world.rank == members[0] and hasattr(os, "memfd_create"):
        own = os.memfd_create("finback-weights")
        os.ftruncate(own, size)
    pid, handle = world.gather((os.getpid(), own))[members[0]]
    storage: torch.UntypedStorage | None = None
    with suppress(RuntimeError, OSError):  # /proc or memfd is missing or not accessible
        opened: Any = torch.UntypedStorage.from_file(f"/proc/{pid}/fd/{handle}", shared=True, nbytes=size)
        storage = opened
    failed = world.any(storage is None)
    if own >= 0:
        os.close(own)
    return None if failed or storage is None else (storage, world.rank == members[0])


def _machine() -> tuple[str, ...]:
    """A value that is equal for two processes if and only if they see each other's files in /proc."""
    boot, namespace = Path("/proc/sys/kernel/random/boot_id"), Path("/proc/self/ns/pid")
    if not boot.is_file():
        return (platform.node(), str(os.getpid()))
    return (platform.node(), boot.read_text(), str(namespace.readlink()))
