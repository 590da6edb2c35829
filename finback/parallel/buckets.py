"""Sums gradients over ranks in buckets, in fp32 or rounded to bf16: after a step's passes, or while the last of them runs.

The method is that of PyTorch's DistributedDataParallel (Li et al., arXiv 2006.15704).
"""

from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed.device_mesh import DeviceMesh

from finback.parallel.mesh import flat_gradients

WIDTH = 4  # bytes of a gradient


@dataclass
class Bucket:
    """Gradients that are adjacent in memory and exchanged together."""

    gradients: Tensor
    # parameters, and those whose gradients the last pass has not completed
    count: int
    missing: int = 0
    # the gradients that are being summed, and the collective that does it
    sent: Tensor | None = None
    work: Any = None


class Buckets:
    """The gradients of some parameters as views of one fp32 buffer.

    A backward pass reaches the last parameters first, so buckets are sent from the end of the buffer to its start. A bucket
    waits for those before it: then all ranks send them in the same order, even if a rank's pass does not use a parameter.
    """

    def __init__(self, parameters: list[nn.Parameter], axis: DeviceMesh, size: int, dtype: torch.dtype) -> None:
        """axis: the ranks to sum over. size: bytes of gradients per bucket; 0: a single one, sent after the passes."""
        self.flat, self.dtype, self.is_armed = flat_gradients(parameters), dtype, False
        # collectives during a pass need their own group: their order relative to others differs between ranks
        self.group = _further_group(axis) if size else axis.get_group()
        self.buckets: list[Bucket] = []
        stop, members = len(self.flat), list[nn.Parameter]()
        start = stop
        for index, parameter in reversed(list(enumerate(parameters))):
            start -= parameter.numel()
            members.append(parameter)
            if index == 0 or (size and WIDTH * (stop - start) >= size):
                bucket = Bucket(self.flat[start:stop], len(members))
                self.buckets.append(bucket)
                for member in members if size else ():
                    member.register_post_accumulate_grad_hook(partial(self._complete, bucket))
                stop, members = start, []

    def arm(self) -> None:
        """Call before a step's last backward pass: from now on buckets are sent as soon as they are complete."""
        self.is_armed = True
        for bucket in self.buckets:
            bucket.missing = bucket.count

    def _complete(self, bucket: Bucket, parameter: nn.Parameter) -> None:
        if not self.is_armed:
            return
        assert bucket.work is None, "a backward pass after the last one of the step"
        bucket.missing -= 1
        for each in self.buckets:
            if each.missing:
                break
            self._send(each)

    def _send(self, bucket: Bucket) -> None:
        if bucket.work is None:
            bucket.sent = bucket.gradients.to(self.dtype)  # no copy in fp32
            bucket.work = dist.all_reduce(bucket.sent, group=self.group, async_op=True)

    def sum_(self) -> None:
        """Sends what has not been sent, and waits for all sums."""
        for bucket in self.buckets:
            self._send(bucket)
        for bucket in self.buckets:
            bucket.work.wait()
            if bucket.sent is not bucket.gradients and bucket.sent is not None:
                bucket.gradients.copy_(bucket.sent)
            bucket.sent = bucket.work = None
        self.is_armed = False


def _further_group(axis: DeviceMesh) -> dist.ProcessGroup:
    """One more process group of the same ranks. Collective over all ranks."""
    groups: list[Any] = [None] * dist.get_world_size()
    dist.all_gather_object(groups, tuple(dist.get_process_group_ranks(axis.get_group())))
    found, _ = dist.new_subgroups_by_enumeration([list(ranks) for ranks in sorted(set(groups))])
    assert found is not None, "every rank is in one of the groups"
    return found
