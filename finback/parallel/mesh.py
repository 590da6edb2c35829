"""The group of processes that run one stage together: torch.distributed where there are several, nothing for one."""

import datetime
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor


class World:
    """This process's rank among `size`; every method is a no-op for one process. Same result on every rank."""

    def __init__(self, rank: int = 0, size: int = 1) -> None:
        self.rank, self.size = rank, size

    @classmethod
    def join(cls, rank: int, size: int) -> "World":
        """Meet the other ranks at MASTER_ADDR:MASTER_PORT, as torchrun and the CLI's own launcher set them."""
        if size > 1:
            # A stage may keep one rank busy for long while the others wait, so the limit is generous.
            dist.init_process_group("gloo", rank=rank, world_size=size, timeout=datetime.timedelta(hours=4))
        return cls(rank, size)

    def leave(self) -> None:
        """End the group."""
        if self.size > 1:
            dist.destroy_process_group()

    def barrier(self) -> None:
        """Wait for all ranks."""
        if self.size > 1:
            dist.barrier()

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
