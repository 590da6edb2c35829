"""Expert parallelism under a given popularity of experts: load per rank, and traffic per wire.

Does not import torch. Tokens choose experts by popularity with V3's group limit; experts are on ranks in order, groups on nodes.
"""

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from finback.config import UserError
from finback.model.config import ModelConfig


@dataclass(frozen=True)
class Load:
    """Averages over sampled tokens of one MoE layer."""

    # load of the fullest rank over the mean; all ranks wait for it
    max_over_mean: float
    # each rank's share of all choices
    per_rank: tuple[float, ...]
    # number of nodes with a token's experts
    nodes: float
    # of these, other nodes: copies sent over the network
    remote_nodes: float
    # copies sent within nodes, to ranks with a chosen expert
    forwarded: float
    max_over_mean_expert: float


def popularity(experts: int, zipf: float, seed: int) -> tuple[float, ...]:
    """Shares proportional to 1 / rank^zipf, in random order; 0: equal."""
    shares = 1 / np.arange(1, experts + 1) ** zipf
    return tuple(np.random.default_rng(seed).permutation(shares / shares.sum()).tolist())


def simulate(
    c: ModelConfig, ranks: int, node: int, shares: Sequence[float] | None = None, tokens: int = 8192, seed: int = 0
) -> Load:
    """Routes `tokens` tokens by expert popularity (default: equal) over `ranks` ranks, `node` per node."""
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
    reached = met_ranks.sum() - met_ranks[row, own].sum()  # copies that must reach another rank
    # a copy that arrives at the right rank (the same position on the other node) needs no second hop; if the last node is
    # not full this does not happen
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
    """Top-k among the best topk_group groups: affinities (tokens, experts) -> (tokens, k), as in model/moe.py's Router."""
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
    """index (tokens, k) -> bool (tokens, size): which of `size` places each token uses."""
    met = np.zeros((len(index), size), dtype=bool)
    met[np.arange(len(index))[:, None], index] = True
    return met
