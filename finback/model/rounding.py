"""Rounding to FP4's numbers in a pass, and V4's indexers that were trained with it.

A Hadamard matrix mixes an indexer's queries and keys first, so that no element stands out (V4, post-training).
"""

from typing import Any

import torch
from torch import Tensor

from finback.kernels.formats import MXFP4_BLOCK, round_mxfp4
from finback.model.dsa import IndexerQueries


def rounded(x: Tensor, block: int = MXFP4_BLOCK) -> Tensor:
    """x (..., columns) in MXFP4's numbers; the gradient is that of x itself (straight-through)."""
    return _Rounded.apply(x, block)


class RoundedIndexer(IndexerQueries):
    """An indexer whose queries and keys pass through a Hadamard matrix and MXFP4 before they are multiplied."""

    @staticmethod
    def scores(query: Tensor, weight: Tensor, key: Tensor) -> Tensor:
        """As IndexerQueries.scores. Heads narrower than a block, as toy models have, are one block."""
        return IndexerQueries.scores(_mixed(query), weight, _mixed(key))


def _mixed(x: Tensor) -> Tensor:
    """x (..., e) through the Hadamard matrix and MXFP4, in fp32."""
    width = x.size(-1)
    return rounded(x.float() @ _hadamard(width, x.device), min(width, MXFP4_BLOCK))


def _hadamard(width: int, device: torch.device) -> Tensor:
    """The symmetric orthogonal matrix of Sylvester's construction, (width, width)."""
    assert width & width - 1 == 0, "widths are powers of two"
    matrix = torch.ones(1, 1)
    while len(matrix) < width:
        matrix = torch.cat([torch.cat([matrix, matrix], dim=1), torch.cat([matrix, -matrix], dim=1)])
    return (matrix * width**-0.5).to(device)


class _Rounded(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, block: int) -> Tensor:
        return round_mxfp4(x, block)

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor | None, ...]:
        return grads[0], None
