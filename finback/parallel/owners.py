"""Assembles matrices whose rows are on several ranks, each on one owner, and sends the results back.

Newton-Schulz needs whole matrices. Each matrix has one owner, so that the work is done once and its rows are sent twice, as
in Moonshot's distributed Muon (arXiv 2502.16982). Owners are chosen so that the work is balanced.
"""

from collections.abc import Callable, Sequence

import torch
import torch.distributed as dist
from torch import Tensor

from finback.parallel.layout import pack, share
from finback.parallel.mesh import swap


class Owners:
    """Owners of matrices with the given shapes (rows, columns), each sharded by rows over the ranks of a group."""

    def __init__(self, shapes: Sequence[tuple[int, int]], group: dist.ProcessGroup) -> None:
        self.shapes, self.group = shapes, group
        self.rank, self.size = group.rank(), group.size()
        work = [rows * columns * min(rows, columns) for rows, columns in shapes]
        self.owned = [sorted(owned) for owned in pack(work, self.size, room=len(work))]

    def apply(self, function: Callable[[list[Tensor]], list[Tensor]], parts: list[Tensor]) -> list[Tensor]:
        """Applies `function`, which preserves shapes, to whole matrices: this rank's rows of all -> its rows of the results."""
        mine, members = self.owned[self.rank], range(self.size)
        to_owners = [sum(self._numels(owned, self.rank)) for owned in self.owned]
        to_me = [sum(self._numels(mine, member)) for member in members]
        flat = torch.cat([parts[i].flatten() for owned in self.owned for i in owned])
        blocks = swap(flat, to_owners, to_me, self.group).split(to_me)
        rows = [block.split(self._numels(mine, member)) for member, block in enumerate(blocks)]
        wholes = [torch.cat([r[at] for r in rows]).view(self.shapes[i]) for at, i in enumerate(mine)]
        made = [
            whole.flatten().split([self._numel(i, member) for member in members])
            for i, whole in zip(mine, function(wholes), strict=True)
        ]
        back = torch.cat([flat.new_empty(0), *(whole[member] for member in members for whole in made)])
        blocks = swap(back, to_me, to_owners, self.group).split(to_owners)
        result = {}
        for owned, block in zip(self.owned, blocks, strict=True):
            for i, part in zip(owned, block.split(self._numels(owned, self.rank)), strict=True):
                result[i] = part.view_as(parts[i])
        return [result[i] for i in range(len(parts))]

    def _numel(self, index: int, member: int) -> int:
        rows, columns = self.shapes[index]
        start, stop = share(rows, self.size, member)
        return (stop - start) * columns

    def _numels(self, indices: list[int], member: int) -> list[int]:
        return [self._numel(i, member) for i in indices]
