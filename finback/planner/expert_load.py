"""Expert parallelism under real or given routing skew: how full each rank gets, and what goes over which wire.

No torch here. Tokens draw experts by popularity with V3's group limit; experts lie on ranks in order, groups on nodes.
"""

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from finback.config import UserError
from finback.model.config import ModelConfig


@dataclass(frozen=True)
class Load:
    """Averages over sampled tokens of one MoE layer."""

    # of the fullest rank; it decides how long all wait
    max_over_mean: float
    # share of all choices
    per_rank: tuple[float, ...]
    # nodes a token's experts lie on
    nodes: float
    # of these, other than its own: copies sent over the network
    remote_nodes: float
    # copies sent over the link within nodes, to ranks that hold a chosen expert
    forwarded: float
    max_over_mean_expert: float


def popularity(experts: int, zipf: float, seed: int) -> tuple[float, ...]:
    """Shares 1 / place^zipf, experts in random places; 0 makes all equal."""
    shares = 1 / np.arange(1, experts + 1) ** zipf
    return tuple(np.random.default_rng(seed).permutation(shares / shares.sum()).tolist())


def simulate(
    c: ModelConfig, ranks: int, node: int, shares: Sequence[float] | None = None, tokens: int = 8192, seed: int = 0
) -> Load:
    """Route `tokens` tokens by expert popularity (equal by default) over `ranks` ranks, `node` of them to a node."""
    experts, k = c.n_routed_experts, c.num_experts_per_tok
    assert experts % ranks == 0, f"{ranks} ranks do not share {experts} experts evenly"
    given = np.full(experts, 1 / experts) if shares is None else np.asarray(shares, dtype=float)
    if given.shape != (experts,) or not np.isfinite(given).all() or (given <= 0).any():
        raise UserError("--skew", f"{given.size} shares", f"not {experts} numbers above 0", "Give one per expert.")
    rng = np.random.default_rng(seed)
    chosen = route(c, rng.gumbel(size=(tokens, experts)) + np.log(given / given.sum()))
    counts = np.bincount(chosen.ravel(), minlength=experts)
    per_rank = counts.reshape(ranks, -1).sum(axis=1) / (tokens * k)
    rank_of = chosen // (experts // ranks)
    nodes = -(-ranks // node)
    met_ranks, met_nodes = _met(rank_of, ranks), _met(rank_of // node, nodes)
    own = rng.integers(ranks, size=tokens)
    row = np.arange(tokens)
    on_own_node = met_nodes[row, own // node].sum()
    reached = met_ranks.sum() - met_ranks[row, own].sum()  # copies that must get to another rank
    # some land at their first stop, the same place on the other node, and need no second; where the last node is not full
    # nothing lands by luck
    steps = range(1, nodes) if nodes * node == ranks else ()
    landed = sum(met_ranks[row, (own + step * node) % ranks].sum() for step in steps)
    return Load(
        max_over_mean=float(per_rank.max() * ranks),
        per_rank=tuple(per_rank.tolist()),
        nodes=float(met_nodes.sum() / tokens),
        remote_nodes=float((met_nodes.sum() - on_own_node) / tokens),
        forwarded=float((reached - landed) / tokens),
        max_over_mean_expert=float(counts.max() / counts.mean()),
    )


def route(c: ModelConfig, affinities: np.ndarray) -> np.ndarray:
    """Top-k among the best topk_group groups: affinities (tokens, experts) -> (tokens, k), as model/moe.py's Router."""
    tokens, experts = affinities.shape
    if c.topk_group < c.n_group:
        grouped = affinities.reshape(tokens, c.n_group, -1)
        top = 2 if c.scoring_func == "sigmoid" else 1
        best = np.partition(grouped, -top, axis=-1)[..., -top:].sum(axis=-1)
        out = np.argsort(-best, axis=-1)[:, c.topk_group :]
        grouped = grouped.copy()
        np.put_along_axis(grouped, out[..., None], -np.inf, axis=1)
        affinities = grouped.reshape(tokens, experts)
    return np.argpartition(-affinities, c.num_experts_per_tok - 1, axis=-1)[:, : c.num_experts_per_tok]


def _met(index: np.ndarray, size: int) -> np.ndarray:
    """index (tokens, k) -> which of `size` places each token meets (tokens, size)."""
    met = np.zeros((len(index), size), dtype=bool)
    met[np.arange(len(index))[:, None], index] = True
    return met
