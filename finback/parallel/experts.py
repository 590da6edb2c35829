"""Expert parallelism: each rank of a group holds some of the experts, and tokens are sent to the experts that they chose.

A token is sent to a rank once, however many experts it chose there, and returns as one weighted sum. With several nodes
there are two hops: the token goes once to each node, to the rank with the sender's local number, and from there once to
each rank of that node. If each expert group is on one node, these are at most topk_group nodes (V3 3.2.2). Twin:
moe_gemm.routed_experts with all experts on one rank.
"""

from collections.abc import Callable, Sequence
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed.tensor import DTensor

from finback.kernels import moe_gemm
from finback.kernels.frozen import Product
from finback.model.biased_experts import BiasedMoE
from finback.model.frozen import FrozenMoE
from finback.model.moe import MoE
from finback.model.quantized import QuantizedMoE, matrices_product
from finback.model.replace import recast
from finback.parallel.mesh import Mesh, swap


def spread_experts(model: nn.Module, mesh: Mesh) -> None:
    """Makes every MoE of a model exchange tokens along the ep axis; the model already holds only this rank's experts."""
    axes = [axis for axis in (mesh.node, mesh.local) if axis.size() > 1]
    for module in model.modules():
        if isinstance(module, MoE):
            groups = [axis.get_group() for axis in axes]
            if isinstance(module, FrozenMoE):
                count = module.config.n_routed_experts // mesh.ep.size()
                first = mesh.ep.get_local_rank() * count
                recast(module, FrozenExpertsHere).local_experts = slice(first, first + count)
            beside: Callable[[], Sequence[Tensor]] = tuple
            if isinstance(module, BiasedMoE):
                beside = recast(module, BiasedExpertsHere).biases
            module.experts = Exchange(groups, module.config.n_routed_experts, module.experts, beside)


class FrozenExpertsHere(FrozenMoE):
    """A frozen mixture of experts, some of which are on this rank."""

    def product(self, name: str) -> Product:
        return matrices_product(self, name, _here)

    def experts(self, x: Tensor, index: Tensor, weight: Tensor, gate_up: Tensor, down: Tensor) -> Tensor:  # type: ignore[override]
        if isinstance(self, QuantizedMoE):  # its own form expects the factors of all experts
            return self.by_products(x, index, weight, len(gate_up), self.product("gate_up"), self.product("down"))
        return super().experts(x, index, weight, gate_up, down)


class BiasedExpertsHere(BiasedMoE):
    """A mixture of experts with biases, some of which are on this rank."""

    def biases(self) -> tuple[Tensor, Tensor]:
        gate_up, down = super().biases()
        return _here(gate_up), _here(down)


class Exchange:
    """Routed experts on several ranks; called like `form`, which computes the local experts."""

    def __init__(
        self,
        axes: list[dist.ProcessGroup],
        experts: int,
        form: moe_gemm.Experts = moe_gemm.routed_experts,
        beside: Callable[[], Sequence[Tensor]] = tuple,
    ) -> None:
        """axes: the widest first. `beside`: returns the tensors of local experts that `form` reads besides the two matrices."""
        self.axes, self.experts, self.form, self.beside = axes, experts, form, beside

    def __call__(self, x: Tensor, index: Tensor, weight: Tensor, gate_up: Tensor, down: Tensor) -> Tensor:
        """x (n, d), index and weight (n, k) over all experts, gate_up and down of the local ones -> (n, d)."""
        return self._along(0, self.experts, x, index, weight, [_here(gate_up), _here(down)])

    def _along(self, level: int, span: int, x: Tensor, index: Tensor, weight: Tensor, local: list[Tensor]) -> Tensor:
        """Experts 0..span, distributed over the axes from `level` on; -1 in `index` is a choice that another rank computes."""
        if level == len(self.axes):
            return self._chosen_here(x, index, weight, *local)
        group = self.axes[level]
        per_member = span // group.size()
        member, token = copies(index, group.size(), per_member)
        there = index[token] - member[:, None] * per_member
        there = there.where((there >= 0) & (there < per_member) & (index[token] >= 0), -1)
        sent = torch.bincount(member, minlength=group.size())
        received = torch.empty_like(sent)
        dist.all_to_all_single(received, sent, group=group)
        splits = sent.tolist(), received.tolist()
        rows, weights = _Swap.apply(group, *splits, x[token], weight[token])
        chosen = swap(there, *splits, group)
        y = self._along(level + 1, per_member, rows, chosen, weights, local)
        (back,) = _Swap.apply(group, *reversed(splits), y)
        return torch.zeros_like(x).index_add(0, token, back)

    def _chosen_here(self, x: Tensor, index: Tensor, weight: Tensor, gate_up: Tensor, down: Tensor) -> Tensor:
        """Routed experts on one rank for those choices that are not -1."""
        row, slot = (index >= 0).nonzero(as_tuple=True)
        if not len(row):  # no tokens: the weights still need a zero gradient, and the exchange its backward pass
            some = sum(t.flatten()[0] for t in self.beside())
            return x + 0 * (gate_up[0, 0, 0] + down[0, 0, 0] + some).to(x.dtype)
        y = self.form(x[row], index[row, slot][:, None], weight[row, slot][:, None], gate_up, down)
        return torch.zeros_like(x).index_add(0, row, y)


def _here(weights: Tensor) -> Tensor:
    """The weights of this rank's experts."""
    return weights.to_local() if isinstance(weights, DTensor) else weights


def copies(index: Tensor, members: int, per_member: int) -> tuple[Tensor, Tensor]:
    """The tokens to send to each member of a group, as distinct (member, token) pairs sorted by member.

    index (n, k) are experts, -1 for none; member m holds `per_member` experts from m · per_member on.
    """
    wanted = index.new_zeros(len(index), members + 1, dtype=torch.bool)
    wanted.scatter_(1, torch.where(index < 0, members, index // per_member), True)
    member, token = wanted[:, :members].T.nonzero(as_tuple=True)
    return member, token


class _Swap(torch.autograd.Function):
    """Sends rows of several tensors to other ranks, and their gradients back.

    One autograd function exchanges all of them, so that backward passes run the same collectives in the same order on
    every rank.
    """

    @staticmethod
    def forward(
        ctx: Any, group: dist.ProcessGroup, sent: list[int], received: list[int], *tensors: Tensor
    ) -> tuple[Tensor, ...]:
        ctx.way = sent, received, group
        return tuple(swap(t, sent, received, group) for t in tensors)

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Any, ...]:
        sent, received, group = ctx.way
        return None, None, None, *(swap(g, received, sent, group) for g in grads)
