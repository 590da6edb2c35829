"""Log-probabilities of tokens, without materializing the logits (tokens x vocabulary) of long rows.

Up to ELEMENTS values (tokens times vocabulary) are computed at once. Beyond that, one chunk of rows is computed at a time, and
recomputed in the backward pass if gradients are needed.
"""

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor
from torch.utils.checkpoint import checkpoint

from finback.kernels import native
from finback.model.transformer import Transformer

ELEMENTS = 2**25  # elements in a matrix of logits: 128 MB in fp32, 259 rows of V3's vocabulary

Chunked = Callable[..., tuple[Tensor, ...]]


def rows_at_once(vocab_size: int) -> int:
    """Number of rows of logits in memory at a time."""
    return max(1, ELEMENTS // vocab_size)


def in_chunks(function: Chunked, rows: int, *tensors: Tensor) -> tuple[Tensor, ...]:
    """function(*tensors) on at most `rows` rows at a time; results are concatenated along the first dimension.

    All tensors have the same number of rows. With several chunks, intermediate results are not kept for the backward pass.
    """
    if len(tensors[0]) <= rows:
        return function(*tensors)
    options: dict[str, Any] = {"use_reentrant": False, "preserve_rng_state": False}
    again = torch.is_grad_enabled()
    pieces = zip(*(t.split(rows) for t in tensors), strict=True)
    made = [checkpoint(function, *piece, **options) if again else function(*piece) for piece in pieces]
    return tuple(torch.cat(parts) for parts in zip(*made, strict=True))


def token_logprobs(
    model: Transformer, hidden: Tensor, tokens: Tensor, temperature: float = 1.0, kept: Tensor | None = None
) -> tuple[Tensor, Tensor]:
    """log softmax(logits / temperature) of the given tokens, and the entropy of that distribution (without gradient).

    hidden (n, d): the model's last hidden states; tokens (n,) -> (n,), (n,), both fp32. kept (n, any), padded with -1: the ids to
    which the distribution is restricted.
    """

    def picked(states: Tensor, ids: Tensor, *kept: Tensor) -> tuple[Tensor, Tensor]:
        logits = model.head(states)
        if not kept and native.serves(logits):
            pair: tuple[Tensor, Tensor] = _Picked.apply(logits, ids, 1 / temperature)
            return pair
        logits = logits.float() / temperature
        for allowed in kept:
            logits = only(logits, allowed)
        logp = logits.log_softmax(dim=-1)
        with torch.no_grad():
            entropy = -(logp.exp() * logp).sum(dim=-1)
        return logp.gather(1, ids[:, None]).squeeze(1), entropy

    tensors = (hidden, tokens) if kept is None else (hidden, tokens, kept)
    logp, entropy = in_chunks(picked, rows_at_once(model.config.vocab_size), *tensors)
    return logp, entropy


class _Picked(torch.autograd.Function):
    """token_logprobs of logits (n, vocab) in one pass, backwards as well."""

    @staticmethod
    def forward(ctx: Any, logits: Tensor, ids: Tensor, inverse_temperature: float) -> tuple[Tensor, Tensor]:
        logits, ids = logits.contiguous(), ids.contiguous()
        logp, entropy, sums = (torch.empty(len(ids)) for _ in range(3))
        ctx.save_for_backward(logits, ids, sums)
        ctx.inverse_temperature = inverse_temperature
        is_bf16 = logits.dtype == torch.bfloat16
        native.call("token_logprobs", is_bf16, logits, ids, logp, entropy, sums, *logits.shape, inverse_temperature)
        ctx.mark_non_differentiable(entropy)
        return logp, entropy

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor | None, ...]:
        logits, ids, sums = ctx.saved_tensors
        d_logits, given = torch.empty_like(logits), (logits, ids, sums, grads[0].contiguous())
        sizes = *logits.shape, ctx.inverse_temperature
        native.call("token_logprobs_backward", logits.dtype == torch.bfloat16, *given, d_logits, *sizes)
        return d_logits, None, None


def only(logits: Tensor, kept: Tensor) -> Tensor:
    """logits (n, vocab) set to the lowest finite value where an id is not in `kept` (n, any), which is padded with -1."""
    vocab = logits.size(1)
    allowed = torch.zeros(len(logits), vocab + 1, dtype=torch.bool, device=logits.device)
    allowed.scatter_(1, kept.long().masked_fill(kept < 0, vocab), True)
    return logits.masked_fill(~allowed[:, :vocab], torch.finfo(logits.dtype).min)


@torch.no_grad()
def text_logprobs(model: Transformer, tokens: Tensor) -> Tensor:
    """tokens (n, t + 1), on any device -> the log-probability (n, t) of each but the first, without gradients."""
    was_training, tokens = model.training, tokens.to(model.embed.device)
    model.eval()
    logp, _ = token_logprobs(model, model(tokens[:, :-1]).flatten(0, 1), tokens[:, 1:].flatten())
    model.train(was_training)
    return logp.view(len(tokens), -1)
