"""The update that an adapter adds: the product of two thin matrices, for one matrix or several stored as one."""

import math

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from finback.kernels import frozen
from finback.kernels.moe_gemm import Blocks


class LowRank(nn.Module):
    """scale · B A for n matrices: a (n, rank, in), b (n, out, rank), in fp32 for any base.

    In a linear map of `parts` matrices of equal height, these belong to the ones at `places`; for experts spread over several ranks,
    to this rank's `local_experts`. A map with `groups` has one A for all groups; each group uses its rows of B.
    """

    # as in Linear
    groups: int | None = None

    def __init__(
        self,
        sizes: tuple[int, int],
        rank: int,
        scale: float,
        places: tuple[int, ...],
        parts: int,
        like: Tensor,
        local_experts: slice = slice(None),
    ) -> None:
        """sizes: (out, in) of one matrix. `like`: determines the device; for a base without values (meta) it is the CPU."""
        super().__init__()
        n, device = len(places[local_experts]), "cpu" if like.is_meta else like.device
        self.a = nn.Parameter(torch.zeros(n, rank, sizes[1], dtype=torch.float32, device=device))
        self.b = nn.Parameter(torch.zeros(n, sizes[0], rank, dtype=torch.float32, device=device))
        # DoRA's row norms, (n, out)
        self.m: nn.Parameter | None = None
        self.scale, self.is_on = scale, True
        self.places, self.parts, self.local_experts = places, parts, local_experts

    @property
    def is_part(self) -> bool:
        """Whether other ranks hold the rest of it."""
        return len(self.a) < len(self.places)

    @torch.no_grad()
    def draw(self, generator: torch.Generator) -> None:
        """Initializes A as PEFT does (Kaiming uniform with a = sqrt(5): up to 1 / sqrt(in)) and B to zero; draws all n, on any rank."""
        bound = 1 / math.sqrt(self.a.size(-1))
        drawn = torch.empty(len(self.places), *self.a.shape[1:]).uniform_(-bound, bound, generator=generator)
        self.a.copy_(drawn[self.local_experts])

    def forward(self, x: Tensor) -> Tensor:
        """x (..., in), or (..., groups, in), -> (..., parts · out)."""
        n, rank, _ = self.a.shape
        h = F.linear(x, self.a.flatten(0, 1).to(x.dtype))
        if self.parts == 1:
            return frozen.grouped_linear(h, self.b[0].to(x.dtype), self.groups) * self.scale
        y = torch.einsum("...nr,nor->...no", h.unflatten(-1, (n, rank)), self.b.to(x.dtype)) * self.scale
        return self.spread(y, -2).flatten(-2)

    def per_expert(self, rows: Tensor, blocks: Blocks) -> Tensor:
        """rows (m, in) sorted by expert, for the experts of this rank -> (m, out); matrix e belongs to the e-th expert."""
        low = frozen.learnt_per_expert(rows, self.a, blocks)
        return frozen.learnt_per_expert(low, self.b, blocks) * self.scale

    def of_expert(self, rows: Tensor, expert: int) -> Tensor:
        """rows (m, in) of one expert -> (m, out)."""
        return F.linear(F.linear(rows, self.a[expert].to(rows.dtype)), self.b[expert].to(rows.dtype)) * self.scale

    def delta(self) -> Tensor:
        """The update of the weights, (parts, out, in) in fp32."""
        return self.spread(torch.bmm(self.b, self.a) * self.scale, 0)

    def spread(self, made: Tensor, dim: int, other: float = 0.0) -> Tensor:
        """Inserts zeros (or `other`) for the parts without an adapter; `dim` is the dimension of those with one."""
        if len(self.places) == self.parts:
            return made
        shape = list(made.shape)
        shape[dim] = self.parts
        return made.new_full(shape, other).index_copy(dim, torch.tensor(self.places, device=made.device), made)
