"""How often the trunk accepts the MTP module's drafts."""

import torch
from torch import Tensor

from finback.model.logprobs import in_chunks, rows_at_once
from finback.model.transformer import Transformer
from finback.rollouts.rollouts import Rollout


@torch.no_grad()
def mtp_acceptance(model: Transformer, rollouts: list[Rollout]) -> tuple[int, int]:
    """(accepted, drafted): how many of the MTP module's drafts equal the trunk's greedy choice, and how many there were.

    At each generated position the module sees the next token and drafts the one after it. The trunk, once it has read that
    next token too, makes its own greedy choice. This is the acceptance rate of greedy speculative decoding.
    """
    if not model.mtp:
        return 0, 0
    accepted = drafts = 0
    for start in range(0, len(rollouts), 64):
        rows = [r.prompt + r.completion.tokens for r in rollouts[start : start + 64]]
        longest = max(map(len, rows))
        tokens = torch.tensor([row + [0] * (longest - len(row)) for row in rows]).to(model.embed.device)
        hidden = model(tokens)
        trunk = _likeliest(model, hidden)
        behind = tokens.new_zeros(len(rows), len(model.mtp) - 1)  # only the first depth is measured
        further = model.mtp_hidden_states(hidden[:, :-1], torch.cat([tokens, behind], dim=1))
        draft = _likeliest(model, further[0])
        for row, r in enumerate(rollouts[start : start + 64]):
            # draft i predicts token i + 2, as the trunk does at i + 1
            first, last = len(r.prompt) - 1, len(rows[row]) - 2
            agree = draft[row, first:last] == trunk[row, first + 1 : last + 1]
            accepted, drafts = accepted + int(agree.sum()), drafts + max(0, last - first)
    return accepted, drafts


def _likeliest(model: Transformer, hidden: Tensor) -> Tensor:
    """The likeliest next token (b, t) of each hidden state (b, t, d)."""
    rows = rows_at_once(model.config.vocab_size)
    (ids,) = in_chunks(lambda states: (model.logits(states).argmax(dim=-1),), rows, hidden.flatten(0, 1))
    return ids.view(hidden.shape[:2])
