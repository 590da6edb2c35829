"""DeepSeekMoE: a router balanced by a selection-only bias, routed experts, shared experts."""

from functools import partial

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from finback.kernels import frozen, moe_gemm
from finback.kernels.frozen import Product
from finback.kernels.swiglu import swiglu
from finback.model.config import ModelConfig
from finback.model.layers import SwiGLU


class Router(nn.Module):
    """Chooses num_experts_per_tok experts for each token (V3 eq. 12-16; V2's and V4's affinities by scoring_func).

    `bias` affects which experts are chosen, never their weights; it has no gradient and changes only in `update_bias`.
    `load` counts the tokens of each expert since the last update.
    """

    bias: Tensor
    load: Tensor
    # names of its buffers that are part of a model's weights
    kept: tuple[str, ...] = ("bias",)

    def __init__(self, config: ModelConfig) -> None:
        super().__init__()
        self.config = config
        self.weight = nn.Parameter(torch.empty(config.n_routed_experts, config.hidden_size))
        fp32 = torch.float32  # whatever dtype the weights have
        self.register_buffer("bias", torch.zeros(config.n_routed_experts, dtype=fp32))
        self.register_buffer("load", torch.zeros(config.n_routed_experts, dtype=fp32), persistent=False)

    def forward(self, x: Tensor, tokens: Tensor | None = None) -> tuple[Tensor, Tensor, Tensor]:
        """x (n, d) -> chosen experts (n, k), their weights (n, k), all affinities (n, experts); all in fp32.

        tokens (n,): ids of the input tokens, for routers that select by id.
        """
        c = self.config
        affinity = affinities(self.logits(x), c.scoring_func)
        index = self.select(affinity.detach(), tokens)
        weight = affinity.gather(1, index)
        if c.norm_topk_prob:
            weight = weight / (weight.sum(dim=-1, keepdim=True) + 1e-20)
        return index, weight * c.routed_scaling_factor, affinity

    def logits(self, x: Tensor) -> Tensor:
        """x (n, d) -> (n, experts), in fp32 as in V3."""
        return x.float() @ self.weight.float().T

    def select(self, affinity: Tensor, tokens: Tensor | None = None) -> Tensor:
        """Top-k of affinity + bias among the best topk_group groups of experts: (n, experts) -> (n, k).

        A group's score is the sum of its two best biased affinities (V3) or its best one (V2). Excluded groups get -inf, not 0:
        biased affinities can be negative, and 0 would let an excluded expert in.
        """
        c = self.config
        biased = affinity + self.bias
        if c.topk_group < c.n_group:
            groups = biased.unflatten(1, (c.n_group, -1))
            best = groups.topk(2 if c.scoring_func == "sigmoid" else 1, dim=-1).values.sum(dim=-1)
            allowed = torch.zeros_like(best, dtype=torch.bool).scatter(1, best.topk(c.topk_group, dim=-1).indices, True)
            biased = groups.masked_fill(~allowed[:, :, None], float("-inf")).flatten(1)
        return biased.topk(c.num_experts_per_tok, dim=-1).indices

    def count(self, index: Tensor, padding_mask: Tensor | None) -> None:
        """Adds the choices (n, k) to `load`; `padding_mask` (n,) is False for padding, which must not affect balancing."""
        chosen = index if padding_mask is None else index[padding_mask]
        self.load += torch.bincount(chosen.flatten(), minlength=self.load.numel())

    @torch.no_grad()
    def update_bias(self, speed: float) -> None:
        """b_i += speed · sign(mean load - load_i), then resets the load (V3 2.1.2); at speed 0 no bias changes.

        The load must be that of the whole global batch: sum it over ranks first. The bias is centered, since a common offset
        changes no choice and would only lose precision.
        """
        if speed:
            self.bias += speed * torch.sign(self.load.mean() - self.load)
            self.bias -= self.bias.mean()
        self.load.zero_()


def router_buffers(model: nn.Module) -> dict[str, Tensor]:
    """The routers' buffers that are part of a model's weights, by name: biases, and the tables of hash routing."""
    found = [(name, router) for name, router in model.named_modules() if isinstance(router, Router)]
    return {f"{name}.{leaf}": router.get_buffer(leaf) for name, router in found for leaf in router.kept}


def affinities(logits: Tensor, scoring_func: str) -> Tensor:
    """Affinities from a router's logits (n, experts): V2's softmax, V3's sigmoid or V4's sqrt(softplus)."""
    if scoring_func == "softmax":
        return logits.softmax(dim=-1)
    return logits.sigmoid() if scoring_func == "sigmoid" else F.softplus(logits).sqrt()


def max_violation(load: Tensor) -> float:
    """(max load - mean load) / mean load, 0 when perfectly balanced (arXiv 2408.15664)."""
    mean = load.float().mean()
    return ((load.max() - mean) / mean).item() if mean > 0 else 0.0


def balance_loss(affinity: Tensor, index: Tensor, experts_per_token: int, padding_mask: Tensor | None) -> Tensor:
    """Sequence-wise balance loss Σ_i f_i P_i, averaged over sequences (V3 eq. 17-20), without its factor alpha.

    affinity (b, t, experts), index (b, t, k), padding_mask (b, t) or None. The gradient flows through P only.
    """
    chosen, share = expert_shares(affinity, index, padding_mask)
    if padding_mask is None:
        return balance_of(chosen.mean(dim=1), share.mean(dim=1), experts_per_token)
    length = padding_mask.sum(dim=1, keepdim=True).to(affinity.dtype).clamp(min=1)
    return balance_of(chosen.sum(dim=1) / length, share.sum(dim=1) / length, experts_per_token)


def expert_shares(affinity: Tensor, index: Tensor, padding_mask: Tensor | None) -> tuple[Tensor, Tensor]:
    """For each token, 1 for its chosen experts, and every expert's share of the affinities: (b, t, experts) both.

    0 for padding; arguments as in balance_loss.
    """
    share = affinity / (affinity.sum(dim=-1, keepdim=True) + 1e-20)
    chosen = torch.zeros_like(affinity).scatter(2, index, 1.0)
    if padding_mask is None:
        return chosen, share
    keep = padding_mask[:, :, None].to(affinity.dtype)
    return chosen * keep, share * keep


def balance_of(f: Tensor, p: Tensor, experts_per_token: int) -> Tensor:
    """Σ_i f_i P_i with f scaled by experts / k, from (b, experts) both; the mean over sequences."""
    return (f * (f.size(-1) / experts_per_token) * p).sum(dim=-1).mean()


def take_balance_losses(model: nn.Module) -> list[Tensor]:
    """Balance losses of the MoE layers in this training pass, bottom first.

    They are removed from the layers, so that a layer that the next pass skips (MTP's at weight 0) does not return an old one.
    """
    met = [m for m in model.modules() if isinstance(m, MoE) and m.balance is not None]
    losses = [m.balance for m in met if m.balance is not None]
    for moe in met:
        moe.balance = None
    return losses


class MoE(nn.Module):
    """y = Σ_shared FFN(x) + Σ_topk g_i FFN_i(x) (V3 eq. 12); no token is ever dropped."""

    # replaced by another form if experts are quantized, train in FP8 or are spread over several ranks
    experts: moe_gemm.Experts = staticmethod(moe_gemm.routed_experts)

    def __init__(self, config: ModelConfig, router: Router) -> None:
        super().__init__()
        c = self.config = config
        self.router = router
        self.gate_up = nn.Parameter(torch.empty(c.n_routed_experts, 2 * c.moe_intermediate_size, c.hidden_size))
        self.down = nn.Parameter(torch.empty(c.n_routed_experts, c.hidden_size, c.moe_intermediate_size))
        if c.n_shared_experts:
            self.shared = SwiGLU(c.hidden_size, c.n_shared_experts * c.moe_intermediate_size, c.swiglu_limit)
        self.balance: Tensor | None = None  # balance loss of the last training pass, without alpha

    def forward(self, x: Tensor, padding_mask: Tensor | None = None, tokens: Tensor | None = None) -> Tensor:
        """x (b, t, d) -> (b, t, d); `padding_mask` (b, t) is True for tokens, False for padding; tokens (b, t) are ids.

        In training mode it also counts the load and stores the balance loss in `self.balance`.
        """
        rows, ids = x.flatten(0, 1), None if tokens is None else tokens.flatten()
        if self.training:
            index, weight, self.balance = self.route(x, padding_mask, ids)
            self.router.count(index, None if padding_mask is None else padding_mask.flatten())
        else:
            index, weight, _ = self.router(rows, ids)
        y = self.experts(rows, index, weight, self.gate_up, self.down).view_as(x)
        # the sum, not a view of it: the result may get hooks
        return y + self.shared(rows).view_as(x) if self.config.n_shared_experts else y

    def by_products(
        self, x: Tensor, index: Tensor, weight: Tensor, experts: int, gate_up: Product, down: Product
    ) -> Tensor:
        """The experts' sum by two products of rows sorted by expert; see kernels/frozen.py.

        There may be several blocks per expert, numbered consecutively.
        """
        return frozen.routed_experts(x, index, weight, experts, gate_up, down)

    def route(
        self, x: Tensor, padding_mask: Tensor | None, tokens: Tensor | None = None
    ) -> tuple[Tensor, Tensor, Tensor]:
        """x (b, t, d), tokens (b·t,) -> chosen experts (b·t, k), their weights (b·t, k), the balance loss."""
        index, weight, affinity = self.router(x.flatten(0, 1), tokens)
        shape = x.shape[:2]
        balance = balance_loss(
            affinity.unflatten(0, shape), index.unflatten(0, shape), self.config.num_experts_per_tok, padding_mask
        )
        return index, weight, balance


class ClampedMoE(MoE):
    """A mixture of experts with clamped gate and up (V4 2.1)."""

    def experts(self, x: Tensor, index: Tensor, weight: Tensor, gate_up: Tensor, down: Tensor) -> Tensor:  # type: ignore[override]
        return moe_gemm.routed_experts(x, index, weight, gate_up, down, self.config.swiglu_limit)

    def by_products(
        self, x: Tensor, index: Tensor, weight: Tensor, experts: int, gate_up: Product, down: Product
    ) -> Tensor:
        clamped = partial(swiglu, limit=self.config.swiglu_limit)
        return frozen.routed_experts(x, index, weight, experts, gate_up, down, clamped)
