"""The training loss: next token, multi-token prediction and balance; and the divergence of distillation.

Cross-entropy never materializes the logits of all tokens.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any, Literal

import torch
from torch import Tensor

from finback.data.messages import IGNORE
from finback.kernels import native
from finback.model.dsa_training import take_divergences
from finback.model.transformer import Transformer
from finback.train.batch import Batch

CHUNK = 256  # rows of logits in memory at once: 256 x 1024 fp32 is 1 MB, about a core's L2 cache


def cross_entropy(hidden: Tensor, head: Tensor, labels: Tensor) -> Tensor:
    """Sum of -log softmax(head · hidden)[label] over the labels; equals F.cross_entropy, which tests compare it with.

    hidden (n, d), head (vocab, d), labels (n,) with IGNORE where no loss is taken. Logits exist for one chunk at a time: the
    gradient is computed in the forward pass, while the chunk is still in the core's cache.
    """
    return _CrossEntropy.apply(hidden, head, labels)


class _CrossEntropy(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, hidden: Tensor, head: Tensor, labels: Tensor) -> Tensor:
        weight = head.to(hidden.dtype)
        d_hidden = torch.empty_like(hidden)
        # the gradient of a head is as large as the head, so skip it for a frozen one
        d_head = torch.zeros_like(head) if ctx.needs_input_grad[1] else None
        total = torch.zeros((), device=hidden.device)
        for start in range(0, hidden.size(0), CHUNK):
            rows = slice(start, start + CHUNK)
            h, label = hidden[rows], labels[rows]
            loss, gradient = _chunk(h @ weight.T, label)
            total += loss
            torch.mm(gradient, weight, out=d_hidden[rows])
            if d_head is not None:
                d_head += (gradient.T @ h).to(d_head.dtype)
        ctx.save_for_backward(d_hidden, d_head)
        return total

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor | None, ...]:
        d_hidden, d_head = ctx.saved_tensors
        return d_hidden * grads[0].to(d_hidden.dtype), None if d_head is None else d_head * grads[0], None


def _chunk(logits: Tensor, labels: Tensor) -> tuple[Tensor, Tensor]:
    """The summed loss of some logits (n, vocab), and their gradient, softmax - onehot, which may overwrite them."""
    if native.serves(logits):
        losses = torch.empty(len(labels))
        native.call("cross_entropy", logits.dtype == torch.bfloat16, logits, labels.contiguous(), losses, *logits.shape)
        return losses.sum(), logits
    dtype, valid = logits.dtype, labels != IGNORE
    logits = logits.float()
    logits -= logits.amax(dim=1, keepdim=True)
    picked = logits.gather(1, labels.clamp(min=0)[:, None]).squeeze(1)
    normaliser = logits.exp_().sum(dim=1)
    total = ((normaliser.log() - picked) * valid).sum()
    gradient = logits.mul_((valid / normaliser)[:, None])
    gradient[torch.arange(len(labels), device=labels.device), labels.clamp(min=0)] -= valid.float()
    return total, gradient.to(dtype)


# main loss summed over a batch's labels, from the trunk's last hidden states (rows, seq_len, d) and the batch
MainLoss = Callable[[Tensor, Batch], Tensor]


@dataclass(frozen=True)
class LossTerms:
    """How the parts of a step's loss are combined."""

    # divisors of the trunk's loss and of each MTP depth's: number of labels in the whole step, over all ranks
    counts: Sequence[float]
    # λ of the MTP loss (V3 eq. 25); 0: no MTP loss
    mtp_weight: float = 0.3
    # α of the sequence-wise balance loss (V3 eq. 17)
    balance_alpha: float = 1e-4
    # weight of a batch's balance loss: its share of the step's rows
    row_share: float = 1.0
    # None: cross-entropy
    main_loss: MainLoss | None = None


@dataclass(frozen=True)
class Losses:
    """The parts of a training loss, as scalars."""

    main: Tensor
    mtp: Tensor
    balance: Tensor
    # loss of DSA's indexers, if they are trained; it shares no parameter with the others
    indexer: Tensor | None = None

    def total(self, terms: LossTerms) -> Tensor:
        """L_main + λ/D Σ_k L_mtp^k + α L_bal + the indexers' divergence; `mtp` is already the mean over depths."""
        total = self.main + terms.mtp_weight * self.mtp + terms.balance_alpha * self.balance
        return total if self.indexer is None else total + self.indexer

    def detached(self) -> Tensor:
        """(main, MTP, balance) without gradient: (3,) fp32 on the device of `main`."""
        return torch.stack([t.detach().float().to(self.main.device) for t in (self.main, self.mtp, self.balance)])


def training_losses(model: Transformer, batch: Batch, terms: LossTerms) -> Losses:
    """The losses of a forward pass over this rank's batch, scaled so that they can be summed over ranks."""
    tokens, padding_mask, document_ids = batch.inputs
    hidden = model(tokens, padding_mask=padding_mask, document_ids=document_ids)
    main, mtp = token_losses(model, hidden, batch, terms)
    indexer = take_divergences(model) if model.config.index_topk else None
    balance = model.balance_loss() * terms.row_share
    return Losses(main, mtp, balance, None if indexer is None else indexer * terms.row_share)


def token_losses(model: Transformer, hidden: Tensor, batch: Batch, terms: LossTerms) -> tuple[Tensor, Tensor]:
    """The main loss, and the MTP loss averaged over depths (V3 eq. 24), from the trunk's last hidden states (rows, seq_len, d)."""
    head, counts = model.head.weight, terms.counts

    def summed(states: Tensor, depth: int) -> Tensor:
        return cross_entropy(states.flatten(0, 1), head, batch.labels_at(depth).flatten())

    main = (summed(hidden, 0) if terms.main_loss is None else terms.main_loss(hidden, batch)) / counts[0]
    mtp = torch.zeros((), device=hidden.device)
    if terms.mtp_weight:
        _, padding_mask, document_ids = batch.inputs
        for depth, states in enumerate(model.mtp_hidden_states(hidden, batch.tokens, padding_mask, document_ids), 1):
            mtp = mtp + summed(states, depth) / (counts[depth] * len(model.mtp))
    return main, mtp


def distillation(student: Tensor, teacher: Tensor, form: Literal["forward", "reverse"], top_k: int = 0) -> Tensor:
    """KL divergence per row (n,) between two models' logits (n, vocab); the gradient flows to the student only.

    forward is KL(teacher || student), which covers all of the teacher's mass; reverse is KL(student || teacher), which seeks
    its modes (MiniLLM, 2306.08543). With `top_k`, only the teacher's k likeliest tokens are distinguished and all others
    count as one outcome, which gives a lower bound of the divergence.
    """
    theirs = teacher.detach().float().log_softmax(dim=-1)
    if 0 < top_k < theirs.size(-1):
        likeliest = theirs.topk(top_k, dim=-1)
        return likeliest_distillation(student, likeliest.indices, likeliest.values, form)
    return _divergence(student.float().log_softmax(dim=-1), theirs, form)


def likeliest_distillation(
    student: Tensor, ids: Tensor, logprobs: Tensor, form: Literal["forward", "reverse"]
) -> Tensor:
    """The same if only the teacher's k likeliest tokens and their log-probabilities are known, both (n, k)."""
    ours = student.float().log_softmax(dim=-1).gather(-1, ids)
    return _divergence(_with_rest(ours), _with_rest(logprobs.detach().float()), form)


def _divergence(ours: Tensor, theirs: Tensor, form: Literal["forward", "reverse"]) -> Tensor:
    """KL divergence per row between log-probabilities (n, outcomes) of the same outcomes."""
    p, difference = (theirs.exp(), theirs - ours) if form == "forward" else (ours.exp(), ours - theirs)
    return (p * difference).sum(dim=-1)


def _with_rest(logp: Tensor) -> Tensor:
    """Log-probabilities (n, k) of some outcomes -> (n, k + 1), with that of all remaining outcomes."""
    rest = (1 - logp.exp().sum(dim=-1, keepdim=True)).clamp(min=1e-7)
    return torch.cat([logp, rest.log()], dim=-1)
