"""The group of processes that run one stage together, and how a model that is too large for one lies on them."""

import datetime
import os
from dataclasses import dataclass
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch._C import _distributed_c10d as c10d
from torch.distributed.device_mesh import DeviceMesh, init_device_mesh

from finback.config import UserError
from finback.parallel.layout import Layout
from finback.runs.folder import StageRun


@dataclass(frozen=True)
class Mesh:
    """The axes of a layout as this rank sees them: of each, the ranks that differ from it in that alone."""

    pp: DeviceMesh
    # ranks that hold the same experts
    edp: DeviceMesh
    node: DeviceMesh
    local: DeviceMesh
    # node and local as one
    ep: DeviceMesh
    # edp, node and local as one
    dp: DeviceMesh

    @classmethod
    def of(cls, layout: Layout, device: str) -> "Mesh":
        """The ranks in order: those of one stage are neighbours, and among them those that share experts."""
        shape = (layout.pp, layout.edp, layout.nodes, layout.ep // layout.nodes)
        whole = init_device_mesh(device, shape, mesh_dim_names=("pp", "edp", "node", "local"))
        experts, data = whole["node", "local"]._flatten("ep"), whole["edp", "node", "local"]._flatten("dp")
        return cls(whole["pp"], whole["edp"], whole["node"], whole["local"], experts, data)

    @property
    def device(self) -> torch.device:
        """Where this rank computes."""
        return default_device() if self.dp.device_type == "cuda" else torch.device("cpu")


class World:
    """This process's rank among `size`; every method is a no-op for one process. Same result on every rank."""

    def __init__(self, rank: int = 0, size: int = 1, device: torch.device | None = None) -> None:
        self.rank, self.size = rank, size
        self.device = device or default_device()  # where a stage computes

    @classmethod
    def join(cls, rank: int, size: int) -> "World":
        """Meet the other ranks at MASTER_ADDR:MASTER_PORT, as torchrun and the CLI's own launcher set them."""
        cuda = torch.cuda.is_available()
        if cuda:
            torch.cuda.set_device(_local(rank, size, torch.cuda.device_count()))
        if size > 1:
            # A stage may keep one rank busy for long while the others wait, so the limit is generous.
            backend, limit = "cpu:gloo,cuda:nccl" if cuda else "gloo", datetime.timedelta(hours=4)
            dist.init_process_group(backend, rank=rank, world_size=size, timeout=limit, store=_fresh_store(size))
        return cls(rank, size)

    @classmethod
    def of(cls, run: StageRun) -> "World":
        """The ranks of a stage that exchanges tensors."""
        assert isinstance(run.ranks, cls), "a stage that exchanges tensors runs on a World"
        return run.ranks

    def leave(self) -> None:
        """End the group."""
        if self.size > 1:
            dist.destroy_process_group()

    def barrier(self) -> None:
        """Wait for all ranks."""
        if self.size > 1:
            self.sum_(torch.zeros(1))  # on the CPU: dist.barrier would wait for what a GPU has still to do

    def sum_(self, tensor: Tensor) -> Tensor:
        """Add up a tensor over ranks, in place."""
        if self.size > 1:
            dist.all_reduce(tensor)
        return tensor

    def any(self, flag: bool) -> bool:
        """True on all ranks if it is on one."""
        return bool(self.sum_(torch.tensor(float(flag))).item() > 0)

    def gather(self, value: Any) -> list[Any]:
        """One picklable value from each rank, in rank order, on every rank."""
        if self.size == 1:
            return [value]
        values: list[Any] = [None] * self.size
        dist.all_gather_object(values, value)
        return values


def swap(t: Tensor, sent: list[int], received: list[int], group: dist.ProcessGroup) -> Tensor:
    """Send rows, sent[m] of them to member m in order; returns received[m] from each."""
    out = t.new_empty(sum(received), *t.shape[1:])
    dist.all_to_all_single(out, t.contiguous(), received, sent, group=group)
    return out


def flat_gradients(parameters: list[nn.Parameter]) -> Tensor:
    """One fp32 buffer for the gradients of all, which become views of it, so that they travel in one go."""
    flat = torch.zeros(sum(p.numel() for p in parameters), device=parameters[0].device)
    for p, gradient in zip(parameters, flat.split([p.numel() for p in parameters]), strict=True):
        p.grad = gradient.view_as(p)
    return flat


def default_device() -> torch.device:
    """This process's GPU where there is one, else the CPU. CUDA_VISIBLE_DEVICES= (empty) hides all GPUs."""
    return torch.device("cuda", torch.cuda.current_device()) if torch.cuda.is_available() else torch.device("cpu")


def _fresh_store(size: int) -> Any:
    """Where the ranks of this attempt find each other; None for the usual place.

    torchrun hands ranks that it starts again the store of those that died, whose addresses are still in it
    (pytorch issue 135712). On one machine its count of restarts numbers the attempts; machines count for themselves.
    """
    agents = os.environ.get("TORCHELASTIC_USE_AGENT_STORE") == "True"
    if not agents or os.environ.get("LOCAL_WORLD_SIZE") != str(size):
        return None
    address, port = os.environ["MASTER_ADDR"], int(os.environ["MASTER_PORT"])
    store = c10d.TCPStore(address, port, size, is_master=False)
    return c10d.PrefixStore(f"attempt {os.environ['TORCHELASTIC_RESTART_COUNT']}", store)


def _local(rank: int, size: int, gpus: int) -> int:
    """Which of its machine's GPUs a rank takes; UserError if it would have to share one."""
    local = int(os.environ.get("LOCAL_RANK", rank))
    if local >= gpus:
        problem = f"rank {rank} is number {local + 1} of its machine, which has {gpus} GPUs"
        remedy = "Start one rank for each GPU, or hide them with CUDA_VISIBLE_DEVICES= to compute on the CPU."
        raise UserError("--ranks", size, problem, remedy)
    return local
