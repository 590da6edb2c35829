"""One forward and backward pass of pre-training: next token, multi-token prediction, balance."""

from dataclasses import dataclass

import torch
from torch import Tensor

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
    depths = len(model.mtp)
    length = tokens.size(1) - 1 - depths
    hidden = model(tokens[:, :length])
    main = cross_entropy(hidden.flatten(0, 1), model.head.weight, tokens[:, 1 : length + 1].flatten())
    further = model.predict_further(hidden, tokens[:, : length + depths]) if mtp_weight else []
    mtp = torch.zeros(())
    for depth, state in enumerate(further, start=1):
        targets = tokens[:, 1 + depth : 1 + depth + length]
        # averaged over depths, not summed
        mtp = mtp + cross_entropy(state.flatten(0, 1), model.head.weight, targets.flatten()) / depths
    balance = model.balance_loss()
    (main + mtp_weight * mtp + balance_alpha * balance).backward()
    return Losses(main.detach(), mtp.detach(), balance.detach())
