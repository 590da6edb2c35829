"""The group of processes that run one stage together, and how a model that is too large for one lies on them."""

import datetime
import os
from dataclasses import dataclass
from typing import Any, Literal

import torch
import torch.distributed as dist
from torch import Tensor
from torch._C import _distributed_c10d as c10d
from torch.distributed.device_mesh import DeviceMesh, init_device_mesh

from finback.config import UserError, check_fields, check_positive
from finback.model.config import ModelConfig

# Stages that one rank of a pipeline holds; the last two fold the pipeline, so that its ends meet on rank 0.
STAGES_PER_RANK = {"1f1b": 1, "zb1p": 1, "interleaved": 2, "zbv": 2, "dualpipev": 2}


@dataclass(frozen=True)
class Layout:
    """pp x dp x ep ranks: pipeline stages, copies of an expert group, ranks that share one set of experts.

    Every rank of the dp x ep ranks that hold one stage reads rows of its own; all that is not an expert is shared among
    these, an expert among the dp ranks that hold it.
    """

    pp: int = 1
    dp: int = 1
    ep: int = 1
    nodes: int = 1  # the ep ranks lie on so many nodes: a token crosses to each of them once
    schedule: Literal["1f1b", "zb1p", "interleaved", "zbv", "dualpipev"] = "1f1b"
    micro_batches: int = 1  # equal parts into which a rank's rows are cut
    sharding: Literal["fsdp", "zero1"] = "fsdp"  # zero1: the optimiser's state alone is shared out
    gather: Literal["fp32", "bf16"] = "fp32"  # in which sharded weights travel; bf16 is half the traffic, and rounds

    def __post_init__(self) -> None:
        check_fields(self, "layout")
        check_positive(self, "layout", "pp", "dp", "ep", "nodes", "micro_batches")
        if self.gather == "bf16" and self.sharding != "fsdp":
            raise UserError("layout.gather", self.gather, "only sharded weights travel", 'Use sharding="fsdp".')

    @property
    def ranks(self) -> int:
        """How many processes it takes."""
        return self.pp * self.dp * self.ep

    @property
    def data(self) -> int:
        """How many ranks read rows of their own."""
        return self.dp * self.ep

    @property
    def stages(self) -> int:
        """How many pieces the layers are cut into."""
        return self.pp * STAGES_PER_RANK[self.schedule] if self.pp > 1 else 1

    def check(self, config: ModelConfig, rows: int, ranks: int) -> None:
        """Raise UserError unless the model, the rows of one step and the ranks that are there fit."""
        if self.ranks != ranks:
            problem = f"pp x dp x ep is {self.ranks}, but there are {ranks} ranks"
            raise UserError("layout.dp", self.dp, problem, "Start as many as the product says, or change it.")
        if rows % (self.data * self.micro_batches):
            problem = f"do not divide among {self.data} data ranks with {self.micro_batches} micro-batches each"
            raise UserError("rows", rows, problem, f"Use a multiple of {self.data * self.micro_batches}.")
        self._check_experts(config)
        if self.pp > 1:
            self._check_pipeline(config)

    def _check_experts(self, config: ModelConfig) -> None:
        experts = config.n_routed_experts
        if self.ep > 1 and (experts == 0 or experts % self.ep):
            raise UserError("layout.ep", self.ep, f"does not divide {experts} experts", "Use a divisor.")
        if self.ep % self.nodes:
            raise UserError("layout.nodes", self.nodes, f"does not divide ep = {self.ep}", "Use a divisor.")
        if experts and experts // self.ep % self.dp:  # then an expert's rows are cut, and cut evenly
            for name in ("moe_intermediate_size", "hidden_size"):
                if getattr(config, name) % self.dp:
                    problem = f"divides neither {experts // self.ep} experts nor model.{name}"
                    raise UserError("layout.dp", self.dp, problem, "Use a divisor of one of them.")

    def _check_pipeline(self, config: ModelConfig) -> None:
        layers = config.num_hidden_layers
        if self.stages > layers:
            problem = f"{self.schedule} cuts it into {self.stages} stages, of {layers} layers"
            raise UserError("layout.pp", self.pp, problem, "Lower it.")
        if self.micro_batches < self.stages:
            problem = f"fewer than the {self.stages} stages that they are to fill"
            raise UserError("layout.micro_batches", self.micro_batches, problem, "Raise it.")
        if (
            self.schedule in ("zb1p", "zbv", "dualpipev")
            and config.tie_word_embeddings
            and config.num_nextn_predict_layers
        ):
            # autograd cannot do the gradient of such a weight apart from that of what lies between its uses
            problem = "its split backward pass cannot have a head tied to the embedding that MTP reads"
            raise UserError("layout.schedule", self.schedule, problem, 'Use "1f1b" or "interleaved", or untie.')
        rounds = self.micro_batches // self.pp
        if self.schedule == "interleaved" and self.micro_batches % rounds:
            problem = f"interleaved runs them in {rounds} equal rounds"
            raise UserError("layout.micro_batches", self.micro_batches, problem, f"Use a multiple of {self.pp}.")

    def mesh(self, device: str) -> "Mesh":
        """The ranks in order: those of one stage are neighbours, and among them those that share experts."""
        shape = (self.pp, self.dp, self.nodes, self.ep // self.nodes)
        whole = init_device_mesh(device, shape, mesh_dim_names=("pp", "dp", "node", "local"))
        experts, data = whole["node", "local"]._flatten("ep"), whole["dp", "node", "local"]._flatten("data")
        return Mesh(whole["pp"], whole["dp"], whole["node"], whole["local"], experts, data)


@dataclass(frozen=True)
class Mesh:
    """The axes of a layout as this rank sees them: of each, the ranks that differ from it in that alone."""

    pp: DeviceMesh
    dp: DeviceMesh
    node: DeviceMesh
    local: DeviceMesh
    ep: DeviceMesh  # node and local as one
    data: DeviceMesh  # dp, node and local as one

    @property
    def device(self) -> torch.device:
        """Where this rank computes."""
        kind = self.data.device_type
        return (
            torch.device(kind, torch.get_device_module(kind).current_device()) if kind != "cpu" else torch.device(kind)
        )


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
            dist.init_process_group(
                "cpu:gloo,cuda:nccl" if cuda else "gloo",
                rank=rank,
                world_size=size,
                timeout=datetime.timedelta(hours=4),
                store=_fresh_store(size),
            )
        return cls(rank, size)

    @property
    def together(self) -> bool:
        """Whether torch.distributed connects the ranks, one included."""
        return dist.is_initialized()

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
        if self.size == 1:
            return flag
        return bool(self.sum_(torch.tensor(float(flag))).item() > 0)

    def gather(self, value: Any) -> list[Any]:
        """One picklable value from each rank, in rank order, on every rank."""
        if self.size == 1:
            return [value]
        values: list[Any] = [None] * self.size
        dist.all_gather_object(values, value)
        return values


def default_device() -> torch.device:
    """This process's GPU where there is one, else the CPU. CUDA_VISIBLE_DEVICES= (empty) hides all GPUs."""
    return torch.device("cuda", torch.cuda.current_device()) if torch.cuda.is_available() else torch.device("cpu")


def _fresh_store(size: int) -> Any:
    """Where the ranks of this attempt find each other; None for the usual place.

    torchrun hands ranks that it starts again the store of those that died, whose addresses are still in it
    (pytorch issue 135712). On one machine its count of restarts tells attempts apart; machines count for themselves.
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
        raise UserError(
            "--ranks",
            size,
            f"rank {rank} is number {local + 1} of its machine, which has {gpus} GPUs",
            "Start one rank for each GPU, or hide them with CUDA_VISIBLE_DEVICES= to compute on the CPU.",
        )
    return local
