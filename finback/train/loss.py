"""Losses over a large vocabulary without holding its logits: next-token cross-entropy and token log-probabilities."""

from typing import Any, Literal

import torch
from torch import Tensor

CHUNK = 256  # rows of logits held at once: 256 x 1024 fp32 is 1 MB, about a core's L2 cache


def cross_entropy(hidden: Tensor, head: Tensor, targets: Tensor) -> Tensor:
    """Mean of -log softmax(head · hidden)[target]; the same number as F.cross_entropy, twin in its test.

    hidden (n, d), head (vocab, d), targets (n,) with -1 where nothing is to be learnt. Scores exist one chunk at a
    time: the gradient is made in the forward pass, while a chunk is still in the core's cache.
    """
    return _CrossEntropy.apply(hidden, head, targets)


class _CrossEntropy(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, hidden: Tensor, head: Tensor, targets: Tensor) -> Tensor:
        weight = head.to(hidden.dtype)
        d_hidden, d_head = torch.empty_like(hidden), torch.zeros_like(head)
        kept = (targets >= 0).sum().clamp(min=1)
        total = torch.zeros((), device=hidden.device)
        for start in range(0, hidden.size(0), CHUNK):
            rows = slice(start, start + CHUNK)
            h, target = hidden[rows], targets[rows]
            valid = target >= 0
            logits = (h @ weight.T).float()
            logits -= logits.max(dim=1, keepdim=True).values
            picked = logits.gather(1, target.clamp(min=0)[:, None]).squeeze(1)
            normaliser = logits.exp_().sum(dim=1)
            total += ((normaliser.log() - picked) * valid).sum()
            # d loss / d logits = softmax - onehot
            gradient = logits.mul_((valid / normaliser)[:, None])
            gradient[torch.arange(len(target), device=target.device), target.clamp(min=0)] -= valid.float()
            gradient = gradient.to(h.dtype)
            torch.mm(gradient, weight, out=d_hidden[rows])
            d_head += (gradient.T @ h).to(d_head.dtype)
        ctx.save_for_backward(d_hidden, d_head, kept)
        return total / kept

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor | None, ...]:
        d_hidden, d_head, kept = ctx.saved_tensors
        factor = grads[0] / kept
        return d_hidden * factor.to(d_hidden.dtype), d_head * factor, None


def token_logprobs(hidden: Tensor, head: Tensor, tokens: Tensor, temperature: float) -> tuple[Tensor, Tensor]:
    """log softmax(logits / temperature) of the given tokens, and the entropy of that distribution (no gradient).

    hidden (n, d), head (vocab, d), tokens (n,) -> (n,), (n,), both fp32.
    """
    logits = (hidden @ head.to(hidden.dtype).T).float() / temperature
    logp = logits.log_softmax(dim=-1)
    with torch.no_grad():
        entropy = -(logp.exp() * logp).sum(dim=-1)
    return logp.gather(1, tokens[:, None]).squeeze(1), entropy


def distillation(student: Tensor, teacher: Tensor, form: Literal["forward", "reverse"], top_k: int = 0) -> Tensor:
    """KL divergence per row between two models' logits (n, vocab) -> (n,); the gradient is the student's alone.

    forward is KL(teacher || student): cover all that the teacher would say; reverse is KL(student || teacher): say only
    what it would (MiniLLM, 2306.08543). With `top_k` the teacher's k likeliest tokens are told apart and all others
    count as one outcome, which bounds the divergence from below.
    """
    ours, theirs = student.float().log_softmax(dim=-1), teacher.detach().float().log_softmax(dim=-1)
    if 0 < top_k < theirs.size(-1):
        kept = theirs.topk(top_k, dim=-1).indices
        ours, theirs = _with_rest(ours.gather(-1, kept)), _with_rest(theirs.gather(-1, kept))
    p, difference = (theirs.exp(), theirs - ours) if form == "forward" else (ours.exp(), ours - theirs)
    return (p * difference).sum(dim=-1)


def _with_rest(logp: Tensor) -> Tensor:
    """Log-probabilities (n, k) of some outcomes -> (n, k + 1) with that of all others."""
    rest = (1 - logp.exp().sum(dim=-1, keepdim=True)).clamp(min=1e-7)
    return torch.cat([logp, rest.log()], dim=-1)
