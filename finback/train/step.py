"""One forward and backward pass of pre-training: next token, multi-token prediction, balance."""

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from finback.data.rows import Rows
from finback.model.transformer import Transformer
from finback.train.loss import cross_entropy


@dataclass
class Losses:
    """The parts of a training loss, as tensors without gradient."""

    main: Tensor
    mtp: Tensor
    balance: Tensor


def backward(model: Transformer, tokens: Tensor, mtp_weight: float, balance_alpha: float) -> Losses:
    """Add the gradients of L_main + λ/D Σ_k L_mtp^k + α L_bal (V3 eq. 24-25 and 17) over rows of tokens.

    tokens (rows, length + 1 + mtp depth): the trunk reads the first `length`.
    """
    hidden = model(tokens[:, : tokens.size(1) - 1 - len(model.mtp)])
    main, mtp = next_tokens(model, hidden, tokens, bool(mtp_weight))
    return _finish(model, main, mtp, mtp_weight, balance_alpha)


def next_tokens(model: Transformer, hidden: Tensor, tokens: Tensor, further: bool) -> tuple[Tensor, Tensor]:
    """The main loss and, with `further`, MTP's, averaged over its depths, from the trunk's last states (rows, length, d)."""
    depths, length, head = len(model.mtp), hidden.size(1), model.head.weight
    main = cross_entropy(hidden.flatten(0, 1), head, tokens[:, 1 : length + 1].flatten())
    mtp = torch.zeros((), device=hidden.device)
    states = model.mtp_hidden_states(hidden, tokens[:, : length + depths]) if further else []
    for depth, state in enumerate(states, start=1):
        targets = tokens[:, 1 + depth : 1 + depth + length]
        # averaged over depths, not summed
        mtp = mtp + cross_entropy(state.flatten(0, 1), head, targets.flatten()) / depths
    return main, mtp


def backward_rows(
    model: Transformer, rows: Rows, mtp_weight: float, balance_alpha: float, shares: Sequence[float]
) -> Losses:
    """As `backward`, over rows that hold padding or several documents that may not see each other.

    shares: for the trunk and each depth, how many of the step's targets are here over what an even split would give
    (`counts` here, over their mean over ranks): the mean over ranks is then the mean over all targets of the step.
    """
    length, depths = rows.length, len(model.mtp)
    padding_mask = None if bool(rows.real.all()) else rows.real[:, :length]
    document_ids = None if rows.documents is None else rows.documents[:, :length]
    hidden = model(rows.tokens[:, :length], padding_mask=padding_mask, document_ids=document_ids)
    head = model.head.weight
    main = cross_entropy(hidden.flatten(0, 1), head, rows.targets.flatten()) * shares[0]
    tokens = rows.tokens[:, : length + depths]
    further = model.mtp_hidden_states(hidden, tokens, padding_mask, document_ids) if mtp_weight else []
    mtp = torch.zeros((), device=hidden.device)
    for depth, state in enumerate(further, start=1):
        loss = cross_entropy(state.flatten(0, 1), head, rows.further(depth).flatten())
        mtp = mtp + loss * (shares[depth] / depths)
    return _finish(model, main, mtp, mtp_weight, balance_alpha)


def counts(rows: Rows, depths: int) -> Tensor:
    """How many targets the trunk and each MTP depth have in these rows, (1 + depths,)."""
    return torch.tensor([int((rows.further(depth) >= 0).sum()) for depth in range(depths + 1)], dtype=torch.float64)


def _finish(model: Transformer, main: Tensor, mtp: Tensor, mtp_weight: float, balance_alpha: float) -> Losses:
    balance = model.balance_loss()
    (main + mtp_weight * mtp + balance_alpha * balance).backward()
    return Losses(main.detach(), mtp.detach(), balance.detach())
