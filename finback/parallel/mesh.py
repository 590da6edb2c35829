"""The group of processes that run a stage together, and the mesh of ranks that a layout makes of them."""

import datetime
import os
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch._C import _distributed_c10d as c10d
from torch.distributed.device_mesh import DeviceMesh, init_device_mesh

from finback.config import UserError
from finback.parallel.heartbeat import Heartbeat, wait_of
from finback.parallel.layout import Layout
from finback.parallel.meeting import ARRIVAL, Party, meet
from finback.runs.folder import StageRun


@dataclass(frozen=True)
class Mesh:
    """The axes of a layout as this rank sees them; an axis contains the ranks that differ from this one only along it."""

    pp: DeviceMesh
    # ranks that hold the same experts
    edp: DeviceMesh
    node: DeviceMesh
    local: DeviceMesh
    # node and local combined: ranks that share one set of experts
    ep: DeviceMesh
    # edp, node and local combined: ranks that hold the same stage
    dp: DeviceMesh
    # ranks that have parts of the same rows; None if rows are whole
    cp: DeviceMesh | None

    @classmethod
    def of(cls, layout: Layout, device: str) -> "Mesh":
        """Builds the mesh: ranks of one stage are adjacent, and among them those that share experts or rows."""
        shape = (layout.pp, layout.edp, layout.nodes, layout.ep // layout.nodes)
        whole = init_device_mesh(device, shape, mesh_dim_names=("pp", "edp", "node", "local"))
        experts, data = whole["node", "local"]._flatten("ep"), whole["edp", "node", "local"]._flatten("dp")
        context: DeviceMesh | None = None
        if layout.cp > 1:
            sizes, names = (layout.pp * layout.dp, layout.cp), ("rows", "cp")
            context = init_device_mesh(device, sizes, mesh_dim_names=names)["cp"]
        return cls(whole["pp"], whole["edp"], whole["node"], whole["local"], experts, data, context)

    @property
    def device(self) -> torch.device:
        """The device on which this rank computes."""
        return default_device() if self.dp.device_type == "cuda" else torch.device("cpu")

    @property
    def world(self) -> "World":
        """All ranks of the mesh."""
        return World(dist.get_rank(), dist.get_world_size(), self.device)


class World:
    """This process's rank among `size`. Methods are collective, return the same on every rank, and do nothing for one rank."""

    def __init__(self, rank: int = 0, size: int = 1, device: torch.device | None = None) -> None:
        self.rank, self.size = rank, size
        self.device = device or default_device()  # where a stage computes
        self.heartbeat: Heartbeat | None = None

    @classmethod
    def join(
        cls,
        rank: int,
        size: int,
        declared: Mapping[str, Any] | None = None,
        stopping: Callable[[], bool] = lambda: False,
    ) -> "World":
        """Meets the other ranks at MASTER_ADDR:MASTER_PORT, which torchrun and the CLI's launcher set.

        declared: JSON values that must agree on all ranks, or UserError on all. stopping: whether this rank has been asked to
        stop; then Interrupted on all.
        """
        cuda = torch.cuda.is_available()
        if cuda:
            torch.cuda.set_device(_local(rank, size, torch.cuda.device_count()))
        world = cls(rank, size)
        if size > 1:
            wait = wait_of(os.environ)
            party = Party(rank, size, {"device": world.device.type, **(declared or {})}, stopping, wait)
            store, address = _store(rank, size, ARRIVAL * wait)
            name, world.heartbeat = meet(store, party, address)
            # One rank may work for hours while the others wait in a collective.
            backend, limit = "cpu:gloo,cuda:nccl" if cuda else "gloo", datetime.timedelta(hours=4)
            # a prefix per meeting: torchrun's store still has the addresses of ranks that died (pytorch issue 135712)
            fresh = c10d.PrefixStore(name, store)
            dist.init_process_group(backend, rank=rank, world_size=size, timeout=limit, store=fresh)
        return world

    @classmethod
    def of(cls, run: StageRun) -> "World":
        """The ranks of a stage that exchanges tensors."""
        assert isinstance(run.ranks, cls), "a stage that exchanges tensors runs on a World"
        return run.ranks

    def checked_layout(self, layout: Layout | None, field: str) -> Layout | None:
        """The layout, or None if there is one rank; UserError if the number of ranks is not the layout's."""
        if layout is not None and layout.ranks != self.size:
            there = f"there are {self.size} ranks" if self.size > 1 else "there is 1 rank"
            product, ranks = "pp x dp x cp" if layout.cp > 1 else "pp x dp", layout.ranks
            remedy = f"Start it with --ranks {ranks}, or {ranks} ranks under torchrun, or change the layout."
            raise UserError(field, layout.mesh(), f"{product} is {ranks}, but {there}", remedy)
        return None if self.size == 1 else layout

    def leave(self) -> None:
        """Leaves the group and ends it."""
        if self.heartbeat is not None:
            self.heartbeat.leave()
        if self.size > 1:
            dist.destroy_process_group()

    def has_lost_a_rank(self, error: BaseException) -> bool:
        """Whether a collective failed with this error because another rank is gone."""
        return self.size > 1 and (isinstance(error, dist.DistError) or "gloo" in str(error))

    def barrier(self) -> None:
        """Waits for all ranks."""
        if self.size > 1:
            self.sum_(torch.zeros(1))  # on the CPU: dist.barrier would also wait for pending work of the GPU

    def sum_(self, tensor: Tensor) -> Tensor:
        """Sums a tensor over ranks, in place."""
        if self.size > 1:
            dist.all_reduce(tensor)
        return tensor

    def any(self, flag: bool) -> bool:
        """Whether `flag` is True on any rank."""
        return bool(self.sum_(torch.tensor(float(flag))).item() > 0)

    def gather(self, value: Any) -> list[Any]:
        """One picklable value from each rank, in rank order, on every rank."""
        if self.size == 1:
            return [value]
        values: list[Any] = [None] * self.size
        dist.all_gather_object(values, value)
        return values


def swap(t: Tensor, sent: list[int], received: list[int], group: dist.ProcessGroup) -> Tensor:
    """Sends the first sent[0] rows to member 0, the next sent[1] to member 1 and so on; returns received[m] rows from each m."""
    out = t.new_empty(sum(received), *t.shape[1:])
    dist.all_to_all_single(out, t.contiguous(), received, sent, group=group)
    return out


def flat_gradients(parameters: list[nn.Parameter]) -> Tensor:
    """Makes the gradients of all parameters views of one fp32 buffer, which it returns, so that one collective sums them.

    Gradients of bf16 parameters are rounded to bf16 by each pass, and added up in fp32.
    """
    flat = torch.zeros(sum(p.numel() for p in parameters), device=parameters[0].device)
    for p, gradient in zip(parameters, flat.split([p.numel() for p in parameters]), strict=True):
        p.grad_dtype = torch.float32
        p.grad = gradient.view_as(p)
    return flat


def default_device() -> torch.device:
    """This process's GPU if there is one, else the CPU. CUDA_VISIBLE_DEVICES= (empty) hides all GPUs."""
    return torch.device("cuda", torch.cuda.current_device()) if torch.cuda.is_available() else torch.device("cpu")


def _store(rank: int, size: int, seconds: float) -> tuple[Any, tuple[str, int]]:
    """The store through which ranks find each other, torchrun's or rank 0's own, and its address."""
    address = os.environ["MASTER_ADDR"], int(os.environ["MASTER_PORT"])
    is_host = rank == 0 and os.environ.get("TORCHELASTIC_USE_AGENT_STORE") != "True"
    limit = datetime.timedelta(seconds=seconds)
    try:
        return c10d.TCPStore(*address, size, is_host, limit, wait_for_workers=False), address
    except dist.DistNetworkError:
        problem = "is in use on this machine" if is_host else f"no answer from {address[0]} in {seconds:.0f} s"
        raise UserError("MASTER_PORT", address[1], problem, "Start rank 0 there, on a free port.") from None


def _local(rank: int, size: int, gpus: int) -> int:
    """The index of the GPU that a rank uses on its machine; UserError if there are fewer GPUs than ranks."""
    local = int(os.environ.get("LOCAL_RANK", rank))
    if local >= gpus:
        problem = f"rank {rank} is number {local + 1} of its machine, which has {gpus} GPUs"
        remedy = "Start one rank for each GPU, or hide them with CUDA_VISIBLE_DEVICES= to compute on the CPU."
        raise UserError("--ranks", size, problem, remedy)
    return local
