"""Teaching DSA's indexers, which no loss on tokens reaches (V3.2 2.1.1).

An indexer learns where the main attention looks. Its target for a token is the main attention's weights summed over heads
and divided by their sum; its loss the divergence KL(target || softmax(scores)), summed over layers and averaged over tokens.
Hidden states come to it without gradient and the target goes out without one, so the loss of tokens and this one share no
parameter.

  dense   every earlier token is looked at, and the target is of all of them: for a model that is not sparse yet
  sparse  those that are picked alone, as when answering
"""

import torch
from torch import Tensor

from finback.kernels.attention import torch_attention
from finback.kernels.documents import Mask, visible
from finback.model.cache import LayerCache
from finback.model.config import ModelConfig
from finback.model.dsa import DSA, pick
from finback.model.replace import recast
from finback.model.transformer import Transformer


def teach_indexers(model: Transformer, dense: bool = False) -> Transformer:
    """Have a model's training passes leave what its indexers are to learn, in place; answering stays as it is."""
    for module in list(model.modules()):
        if isinstance(module, DSA):
            recast(module, TaughtDSA).dense = dense
    return model


def with_indexers(model: Transformer, config: ModelConfig, compute: torch.dtype, seed: int) -> Transformer:
    """A model's weights, shared, with random indexers where it has none; `config` is its own but for the indexers."""
    other = Transformer(config, compute).initialise(seed)
    missing, unexpected = other.load_state_dict(model.state_dict(), strict=False, assign=True)
    assert not unexpected and all(".indexer." in name for name in missing), "the config differs in indexers alone"
    if config.tie_word_embeddings:
        other.head.weight = other.embed
    return other


def take_divergences(model: Transformer) -> Tensor | None:
    """Σ over layers of what the last training pass's indexers are off by, in nats per token; None where none is taught.

    It is taken once; `divergence` keeps the number.
    """
    taught = [m for m in model.modules() if isinstance(m, TaughtDSA) and m.loss is not None]
    losses = [m.loss for m in taught if m.loss is not None]
    for module in taught:
        module.loss = None
    return torch.stack(losses).sum() if losses else None


def divergence(model: Transformer) -> float:
    """The last training pass's, averaged over layers, in nats per token."""
    found = [m.measured for m in model.modules() if isinstance(m, TaughtDSA)]
    return sum(found) / max(len(found), 1)


class TaughtDSA(DSA):
    """DSA whose training passes compare the indexer's scores with the main attention's weights."""

    dense: bool
    # of the last training pass, with its gradient, until it is taken
    loss: Tensor | None = None
    measured: float = 0.0

    def forward(
        self, x: Tensor, cos: Tensor, sin: Tensor, cache: LayerCache | None = None, attention_mask: Mask = None
    ) -> Tensor:
        """As DSA.forward; in training it leaves `loss`."""
        if cache is not None or not self.training or not torch.is_grad_enabled():
            return super().forward(x, cos, sin, cache, attention_mask)
        q_latent, kv = self.inputs(x)
        query = torch.cat(self.queries(self.q_of(q_latent), cos, sin), dim=-1).transpose(1, 2)
        key, value = self.expanded(*self.latents(kv, cos, sin))
        indexer_key = self.indexer.keys(x.detach(), cos, sin)
        asked, weight = self.indexer.queries(x.detach(), q_latent.detach(), cos, sin)
        read, total = [], torch.zeros((), device=x.device)
        for part in self.parts(query.size(2), key.size(2), len(query)):
            seen = visible(attention_mask, part, key.size(2), x.device)
            scores = self.indexer.scores(asked[:, part], weight[:, part], indexer_key)
            looked = seen if self.dense else pick(scores.detach(), seen, self.config.index_topk)
            read.append(torch_attention(query[:, :, part], key, value, self.scale, looked))
            total = total + divergences(self._target(query[:, :, part], key, looked), scores, looked).sum()
        self.loss = total / (len(query) * query.size(2))
        self.measured = float(self.loss.detach())
        return self.out(torch.cat(read, dim=2).transpose(1, 2).flatten(2))

    @torch.no_grad()
    def _target(self, query: Tensor, key: Tensor, looked: Tensor) -> Tensor:
        """The main attention's weights, averaged over heads: query (b, h, t, d), key (b, h, s, d) -> (b, t, s)."""
        total = torch.zeros(*query.shape[:1], query.size(2), key.size(2), device=query.device)
        for head in range(query.size(1)):  # one matrix at a time
            scores = (query[:, head] @ key[:, head].transpose(1, 2)).float() * self.scale
            total += scores.masked_fill(~looked, float("-inf")).softmax(dim=-1)
        return total / query.size(1)


def divergences(target: Tensor, scores: Tensor, looked: Tensor) -> Tensor:
    """KL(target || softmax of the scores among those that are looked at): (b, t, s) each -> (b, t)."""
    logp = scores.masked_fill(~looked, float("-inf")).log_softmax(dim=-1).masked_fill(~looked, 0.0)
    return (torch.special.xlogy(target, target) - target * logp).sum(dim=-1)
