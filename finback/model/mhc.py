"""Manifold-constrained hyper-connections (mHC, V4 2.2): several residual streams instead of one.

A token has n = hc_mult hidden states X (n, d), initially copies of its embedding. A part F of a block (attention or feed-forward)
reads a mixture A X, and its output is distributed over all streams:

    X' = B X + C F(norm(A X))        A = σ(a), C = 2 σ(c), B doubly stochastic

a, c and the logits of B are linear in the jointly normed streams, plus a bias. Sinkhorn steps turn B's logits into a matrix whose
rows and columns sum to 1, so that streams are mixed but never grow. After the last block the streams are merged.

Letters: b batch, t token, n stream, d hidden_size.
"""

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from finback.kernels.streams import mix, sinkhorn
from finback.model.config import ModelConfig
from finback.model.layers import OwnStart, UnweightedNorm, precise


class HyperConnection(OwnStart):
    """The mixtures of one part of a block, computed in fp32."""

    starts = ("scale",)

    def __init__(self, config: ModelConfig) -> None:
        super().__init__()
        c = self.config = config
        rows = c.hc_mult * (2 + c.hc_mult)
        self.weight = precise(rows, c.hc_mult * c.hidden_size)
        self.bias = precise(rows)
        self.scale = precise(3)  # scales of a, c and B's logits
        self.norm = UnweightedNorm(c.rms_norm_eps)

    def start(self, generator: torch.Generator) -> None:
        """Initially, mixtures hardly depend on the streams."""
        self.scale.fill_(0.01)

    def forward(self, streams: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """streams (b, t, n, d) -> the part's input (b, t, d), and C (b, t, n) and B (b, t, n, n) for `add`."""
        c, n = self.config, self.config.hc_mult
        mixed = F.linear(self.norm(streams.flatten(2).float()), self.weight.float())
        logits, biases = (x.split([n, n, n * n], dim=-1) for x in (mixed, self.bias.float()))
        read, write, exchange = (s * x + y for s, x, y in zip(self.scale.float(), logits, biases, strict=True))
        shares = read.sigmoid() + c.hc_eps
        exchanged = sinkhorn(exchange.unflatten(-1, (n, n)), c.hc_sinkhorn_iters, c.hc_eps)
        return mix(shares[..., None], streams)[:, :, 0], 2 * write.sigmoid(), exchanged

    @staticmethod
    def add(streams: Tensor, made: Tensor, shares: Tensor, exchanged: Tensor) -> Tensor:
        """B X + C F: streams (b, t, n, d), the part's output (b, t, d), C and B from `forward` -> (b, t, n, d).

        Row j of B distributes stream j over the new streams.
        """
        return mix(exchanged, streams, shares, made)


class StreamMerge(OwnStart):
    """Merges streams into one hidden state: Σ_k σ(s w_k · x + b_k) X_k."""

    starts = ("scale",)

    def __init__(self, config: ModelConfig) -> None:
        super().__init__()
        c = self.config = config
        self.weight = precise(c.hc_mult, c.hc_mult * c.hidden_size)
        self.bias = precise(c.hc_mult)
        self.scale = precise(1)
        self.norm = UnweightedNorm(c.rms_norm_eps)
        self.left: Tensor | None = None  # streams of the last pass, the input of MTP

    def start(self, generator: torch.Generator) -> None:
        """As for HyperConnection."""
        self.scale.fill_(0.01)

    def leave(self, streams: Tensor) -> None:
        """Stores the trunk's streams for the MTP modules."""
        self.left = streams

    def carried(self, hidden: Tensor) -> Tensor:
        """MTP's input: the stored streams, once, cut to the length of hidden (b, t, d)."""
        streams, self.left = self.left, None
        assert streams is not None, "MTP follows a pass of the trunk"
        return streams[:, : hidden.size(1)]

    def forward(self, streams: Tensor) -> Tensor:
        """streams (b, t, n, d) -> (b, t, d)."""
        mixed = F.linear(self.norm(streams.flatten(2).float()), self.weight.float())
        shares = (self.scale.float() * mixed + self.bias.float()).sigmoid() + self.config.hc_eps
        return mix(shares[..., None], streams)[:, :, 0]


class OneStream(nn.Module):
    """Replaces StreamMerge if the residual is a single hidden state."""

    def leave(self, streams: Tensor) -> None:
        """Does nothing: the trunk's output is all that MTP needs."""

    def carried(self, hidden: Tensor) -> Tensor:
        """The hidden states unchanged: one stream needs no merging."""
        return hidden

    def forward(self, x: Tensor) -> Tensor:
        return x
