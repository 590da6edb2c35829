"""Unpacks weights that other tools have packed as integers in words.

The first number is in the lowest bits of a word or byte unless noted otherwise.
"""

from dataclasses import dataclass

import torch
from torch import Tensor

AWQ_ORDER = (0, 4, 1, 5, 2, 6, 3, 7)  # the position in an AWQ word of each of its eight columns


@dataclass(frozen=True)
class Grouped:
    """A matrix (q - zero) · scale, in which groups of columns share scale and zero point."""

    # integers (rows, columns), not negative
    q: Tensor
    # both fp32, (rows, groups)
    scale: Tensor
    zero: Tensor
    # the group of each column; None: groups are runs of consecutive columns
    group: Tensor | None = None

    def matrix(self) -> Tensor:
        """The weight (rows, columns) in fp32."""
        rows, columns = self.q.shape
        if self.group is not None:
            index = self.group.long()
            return (self.q - self.zero[:, index]) * self.scale[:, index]
        groups = self.q.float().view(rows, self.scale.size(1), -1)
        return ((groups - self.zero[:, :, None]) * self.scale[:, :, None]).view(rows, columns)


def unpack(words: Tensor, bits: int) -> Tensor:
    """int32 words (..., n) -> the `bits`-bit numbers in them (..., ⌊32 n / bits⌋), int32; numbers may cross words."""
    if 32 % bits == 0:
        shifts = torch.arange(0, 32, bits, dtype=torch.int32)
        return ((words[..., None] >> shifts) & (1 << bits) - 1).flatten(-2)
    each = ((words[..., None] >> torch.arange(32, dtype=torch.int32)) & 1).flatten(-2)
    count = each.size(-1) // bits
    places = torch.tensor([1 << bit for bit in range(bits)], dtype=torch.int32)
    return (each[..., : count * bits].unflatten(-1, (count, bits)) * places).sum(-1, dtype=torch.int32)


def awq(qweight: Tensor, qzeros: Tensor, scales: Tensor) -> Grouped:
    """AWQ's `gemm` version: qweight (in, out / 8), qzeros (groups, out / 8), scales (groups, out)."""

    def numbers(words: Tensor) -> Tensor:
        return unpack(words, 4).unflatten(-1, (-1, 8))[..., list(AWQ_ORDER)].flatten(-2).T

    return Grouped(numbers(qweight).contiguous(), scales.float().T, numbers(qzeros).float())


def gptq(parts: dict[str, Tensor], bits: int, is_v2: bool) -> Grouped:
    """GPTQ: qweight (in · bits / 32, out), qzeros (groups, out · bits / 32), scales (groups, out), g_idx (in).

    Files of version 1 store each zero point minus one.
    """
    q = unpack(parts["qweight"].T.contiguous(), bits)
    zeros = unpack(parts["qzeros"], bits).T
    zeros = zeros if is_v2 else (zeros + 1) & (1 << bits) - 1
    scales, index = parts["scales"].float().T, parts.get("g_idx")
    columns, groups = q.size(1), scales.size(1)
    if index is not None and torch.equal(index.long(), torch.arange(columns) // -(-columns // groups)):
        index = None  # the groups are runs of columns, which `matrix` handles faster
    return Grouped(q, scales, zeros.float(), index)


def spread(scale: Tensor, shape: tuple[int, int]) -> Tensor:
    """Expands factors per matrix, row, group or block to broadcast against `shape`; the last group or block may be shorter."""
    if scale.ndim < 2:
        return scale.view(-1, 1) if scale.numel() == shape[0] else scale
    for dim, size in enumerate(shape):
        if scale.size(dim) not in (1, size):
            scale = scale.repeat_interleave(-(-size // scale.size(dim)), dim).narrow(dim, 0, size)
    return scale
