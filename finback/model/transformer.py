"""The decoder: embedding, blocks, final norm, head, and multi-token-prediction modules.

One definition serves training, rollouts and serving: the cache is an argument.
"""

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from finback.kernels.documents import Mask, mask_of
from finback.model.biased_experts import BiasedMoE, BiasedRouter
from finback.model.cache import Cache, LayerCache
from finback.model.config import CSA as CSA_LAYER
from finback.model.config import HCA as HCA_LAYER
from finback.model.config import ModelConfig
from finback.model.csa import CSA
from finback.model.dsa import DSA, SharedDSA, share_selections
from finback.model.gqa import GQA, SinkGQA
from finback.model.hash_routing import HashRouter
from finback.model.hca import HCA
from finback.model.layers import GeGLU, Linear, NoNorm, Normed, OffsetNorm, RMSNorm, SwiGLU, initialise
from finback.model.mhc import HyperConnection, OneStream, StreamMerge
from finback.model.mla import MLA
from finback.model.moe import ClampedMoE, MoE, Router, take_balance_losses
from finback.model.mtp import MTP, StreamMTP
from finback.model.rope import first_row, rotation
from finback.model.rope_scaling import LongRope
from finback.model.swa import SWA


def attention_of(config: ModelConfig, layer: int) -> MLA | GQA | SWA:
    """The attention that a config specifies."""
    if config.attention == "gqa":
        return (SinkGQA if config.attention_sinks else GQA)(config, layer)
    if config.attention == "mla":
        if not config.index_topk:
            return MLA(config)
        return (SharedDSA if layer in config.shared_indexers else DSA)(config)
    kinds: dict[str, type[SWA]] = {CSA_LAYER: CSA, HCA_LAYER: HCA}
    return kinds.get(config.layer_type(layer), SWA)(config, layer)


def feed_forward_of(config: ModelConfig, layer: int) -> MoE | SwiGLU | GeGLU:
    """The feed-forward that a config specifies, with the router of its experts."""
    if config.activation == "gelu_tanh":
        return GeGLU(config.hidden_size, config.intermediate_size)
    if not config.is_moe(layer):
        return SwiGLU(config.hidden_size, config.intermediate_size, config.swiglu_limit)
    if config.swiglu_alpha is not None:
        return BiasedMoE(config, BiasedRouter(config))
    router = HashRouter(config) if layer < config.num_hash_layers else Router(config)
    return (MoE if config.swiglu_limit is None else ClampedMoE)(config, router)


class Block(nn.Module):
    """Pre-norm residual block: x + attention(norm x), then x + feed-forward(norm x)."""

    def __init__(self, config: ModelConfig, layer: int) -> None:
        super().__init__()
        feed_forward = feed_forward_of(config, layer)
        self.attention_norm, self.attention = normed(attention_of(config, layer), config)
        self.feed_forward_norm, self.feed_forward = normed(feed_forward, config)

    def forward(
        self,
        x: Tensor,
        cos: Tensor,
        sin: Tensor,
        cache: LayerCache | None = None,
        padding_mask: Tensor | None = None,
        attention_mask: Mask = None,
        tokens: Tensor | None = None,
    ) -> Tensor:
        """x (b, t, d) -> (b, t, d); for cos, sin, cache, attention_mask see MLA.forward, for the others MoE.forward."""
        x, h = self.attend(x, cos, sin, cache, attention_mask)
        return x + self.feed(h, padding_mask, tokens)

    def feed(self, h: Tensor, padding_mask: Tensor | None, tokens: Tensor | None) -> Tensor:
        """The feed-forward's output for its normed input (b, t, d)."""
        is_moe = isinstance(self.feed_forward, MoE)
        y: Tensor = self.feed_forward(h, padding_mask, tokens) if is_moe else self.feed_forward(h)
        return y

    def attend(
        self, x: Tensor, cos: Tensor, sin: Tensor, cache: LayerCache | None, attention_mask: Mask
    ) -> tuple[Tensor, Tensor]:
        """x + attention(norm x), and its norm, the feed-forward's input."""
        attended = self.attention(self.attention_norm(x), cos, sin, cache, attention_mask)
        return self.feed_forward_norm.add(x, attended)


class StreamBlock(Block):
    """The same with mHC's streams (b, t, n, d) instead of x: each part reads a mixture of them, see mhc.py."""

    def __init__(self, config: ModelConfig, layer: int) -> None:
        super().__init__(config, layer)
        self.attention_mix, self.feed_forward_mix = HyperConnection(config), HyperConnection(config)

    def forward(
        self,
        x: Tensor,
        cos: Tensor,
        sin: Tensor,
        cache: LayerCache | None = None,
        padding_mask: Tensor | None = None,
        attention_mask: Mask = None,
        tokens: Tensor | None = None,
    ) -> Tensor:
        read, *mixtures = self.attention_mix(x)
        attended = self.attention(self.attention_norm(read), cos, sin, cache, attention_mask)
        x = HyperConnection.add(x, attended, *mixtures)
        read, *mixtures = self.feed_forward_mix(x)
        return HyperConnection.add(x, self.feed(self.feed_forward_norm(read), padding_mask, tokens), *mixtures)


def normed(module: nn.Module, config: ModelConfig) -> tuple[RMSNorm | NoNorm, nn.Module]:
    """The norm before a part of a block, and the part itself, with a norm after it if the config has one."""
    size, eps = config.hidden_size, config.rms_norm_eps
    norm = OffsetNorm if config.norm_offset else RMSNorm
    before = NoNorm() if config.norms == "post" else norm(size, eps)
    return before, module if config.norms == "pre" else Normed(module, norm(size, eps))


class Transformer(nn.Module):
    """DeepSeek's decoder (V2 to V4), or a dense student's, from a ModelConfig.

    Created without values; call `initialise` or load weights. `compute` is the dtype of activations, `param_dtype` that of the
    parameters: fp32 masters for training; bf16 halves the memory of an inference-only model.
    """

    cos: Tensor
    sin: Tensor

    def __init__(
        self, config: ModelConfig, compute: torch.dtype = torch.float32, param_dtype: torch.dtype = torch.float32
    ) -> None:
        super().__init__()
        self.config, self.compute = config, compute
        default = torch.get_default_dtype()
        torch.set_default_dtype(param_dtype)
        try:
            self._build(config)
        finally:
            torch.set_default_dtype(default)

    def _build(self, config: ModelConfig) -> None:
        self.embed = nn.Parameter(torch.empty(config.vocab_size, config.hidden_size))
        block: type[Block] = StreamBlock if config.hc_mult else Block
        self.blocks = nn.ModuleList(block(config, layer) for layer in range(config.num_hidden_layers))
        share_selections(self.blocks.children())
        self.merge = StreamMerge(config) if config.hc_mult else OneStream()
        self.norm = (OffsetNorm if config.norm_offset else RMSNorm)(config.hidden_size, config.rms_norm_eps)
        self.head = Linear(config.hidden_size, config.vocab_size)
        if config.tie_word_embeddings:
            self.head.weight = self.embed
        depths = range(config.num_nextn_predict_layers)
        mtp: type[MTP | StreamMTP] = StreamMTP if config.hc_mult else MTP
        self.mtp = nn.ModuleList(mtp(config, block(config, config.num_hidden_layers + d)) for d in depths)
        cos, sin = rotation(config, config.max_position_embeddings)
        self.register_buffer("cos", cos, persistent=False)
        self.register_buffer("sin", sin, persistent=False)

    def initialise(self, seed: int) -> "Transformer":
        """Random weights as V3's (normal, std initializer_range), the same for the same seed."""
        initialise(self, self.config.initializer_range, torch.Generator().manual_seed(seed))
        return self

    def forward(
        self,
        tokens: Tensor,
        cache: Cache | None = None,
        padding_mask: Tensor | None = None,
        document_ids: Tensor | None = None,
        prefixes: Tensor | None = None,
    ) -> Tensor:
        """tokens (b, t) -> final hidden states (b, t, d) after the last norm; `logits` maps them to logits.

        With a cache the tokens continue its rows. `padding_mask` (b, t) is True for tokens, False for padding, which is at the
        end of a row, so attention needs no mask for it. `document_ids` (b, t) are the contiguous documents that share a row:
        they do not see each other, and each counts its positions from 0. With `prefixes` (b,), that many tokens at the
        start of a row, its document 0, precede each of the others.
        """
        x = self.streams(tokens)
        cos, sin, attention_mask = self._positions(tokens.size(1), cache, document_ids, prefixes)
        x = self.through(x, cos, sin, cache, padding_mask, attention_mask, tokens)
        if len(self.mtp) and (cache is None or cache.pool.drafts):
            self.merge.leave(x)
        return self.norm(self.merge(x))

    def through(self, x: Tensor, cos: Tensor, sin: Tensor, cache: Cache | None, *context: Any) -> Tensor:
        """The last block's output; may overwrite x. `context` is what `Block.forward` takes after its layer's cache."""
        for index, block in enumerate(self.blocks):
            x = block(x, cos, sin, cache.layer(index) if cache is not None else None, *context)
        return x

    def streams(self, tokens: Tensor) -> Tensor:
        """The first block's input for tokens (b, t): (b, t, d), or mHC's streams (b, t, n, d), which start equal."""
        x, n = self.embedded(tokens), self.config.hc_mult
        return x[:, :, None].expand(-1, -1, n, -1) if n else x

    def embedded(self, tokens: Tensor) -> Tensor:
        """tokens (b, t) -> (b, t, d) in the dtype of activations."""
        found = self.lookup(tokens).to(self.compute)
        return found * found.new_tensor(self.config.hidden_size**0.5) if self.config.scale_embeddings else found

    def lookup(self, tokens: Tensor) -> Tensor:
        """Embedding rows of tokens (b, t): (b, t, d)."""
        # indexing would sum gradients in an order that depends on CPU threads; this keeps the tokens' order and is faster
        return F.embedding(tokens, self.embed)

    def _positions(
        self, length: int, cache: Cache | None, document_ids: Tensor | None, prefixes: Tensor | None = None
    ) -> tuple[Tensor, Tensor, Mask]:
        """cos and sin (b or 1, t, r / 2) of the positions read, with document_ids (b, t) those within each document; and the
        attention mask."""
        if cache is not None:
            rows = cache.positions + first_row(self.config, cache.reaches[:, None])
            return self.cos[rows], self.sin[rows], None
        if document_ids is None:
            first = first_row(self.config, length)
            return self.cos[None, first : first + length], self.sin[None, first : first + length], None
        index = torch.arange(length, device=document_ids.device)
        begins = torch.ones_like(document_ids, dtype=torch.bool)
        begins[:, 1:] = document_ids[:, 1:] != document_ids[:, :-1]
        positions = index - torch.where(begins, index, 0).cummax(dim=1).values
        if prefixes is not None:  # padding may be beyond the last position
            positions = (positions + prefixes[:, None] * (document_ids > 0)).clamp(
                max=self.config.max_position_embeddings - 1
            )
        rows = positions
        if isinstance(self.config.rope_scaling, LongRope):
            documents = begins.cumsum(dim=1) - 1
            ends = torch.zeros_like(positions).scatter_reduce(1, documents, positions, "amax")
            rows = positions + first_row(self.config, ends.gather(1, documents) + 1)
        return self.cos[rows], self.sin[rows], mask_of(document_ids, prefixes)

    def logits(self, hidden: Tensor) -> Tensor:
        """hidden (..., d) -> logits (..., vocab) in fp32."""
        return self.head(hidden).float()

    def mtp_hidden_states(
        self, hidden: Tensor, tokens: Tensor, padding_mask: Tensor | None = None, document_ids: Tensor | None = None
    ) -> list[Tensor]:
        """MTP hidden states for each depth k = 1, 2, … (V3 eq. 21-23); `logits` maps them to logits.

        hidden (b, t, d): the trunk's latest outputs for positions i; tokens (b, t + depths) extend beyond the trunk's input, so that
        depth k sees token i + k and, at position i, predicts token i + k + 1. padding_mask and document_ids (b, t) as in `forward`;
        near a document's end a prediction is of the next document and must have no loss.
        """
        length = hidden.size(1)
        assert tokens.size(1) >= length + len(self.mtp), "MTP needs one more token per depth than the trunk"
        outputs: list[Tensor] = []
        if not len(self.mtp):
            return outputs
        carried = self.merge.carried(hidden)
        cos, sin, attention_mask = self._positions(length, None, document_ids)
        for depth, module in enumerate(self.mtp, start=1):
            embedded = self.embedded(tokens[:, depth : depth + length])
            assert isinstance(module, MTP | StreamMTP), "the two kinds of MTP modules"
            carried = module(carried, embedded, cos, sin, None, padding_mask, attention_mask)
            outputs.append(module.states(carried))
        return outputs

    def carried(self, hidden: Tensor) -> Tensor:
        """MTP's input for hidden (b, t, d), the trunk's latest output: that output, or its streams (b, t, n, d)."""
        return self.merge.carried(hidden)

    def hidden_of(self, carried: Tensor) -> Tensor:
        """The hidden states (b, d) for what `carried` returned for b tokens."""
        return self.norm(self.merge(carried[None]))[0] if self.config.hc_mult else carried

    def draft(self, carried: Tensor, tokens: Tensor, cache: Cache) -> Tensor:
        """The first MTP module's hidden states, continuing its own entries in the cache's last layer.

        carried (b, t, …): MTP's input at the cache's positions; tokens (b, t): the token after each; the result (b, t, d)
        predicts the token after those.
        """
        cos, sin, _ = self._positions(tokens.size(1), cache, None)
        module = self.mtp[0]
        assert isinstance(module, MTP | StreamMTP), "the two kinds of MTP modules"
        return module.states(module(carried, self.embedded(tokens), cos, sin, cache.layer(-1)))

    def with_config(self, config: ModelConfig, compute: torch.dtype) -> "Transformer":
        """A model sharing the weights, with a config that differs only in window and rope scaling."""
        other = Transformer(config, compute)
        other.load_state_dict(self.state_dict(), assign=True)
        if config.tie_word_embeddings:
            other.head.weight = other.embed
        return other

    def routers(self) -> list[Router]:
        """All routers from bottom to top, the MTP modules' last."""
        return [m for m in self.modules() if isinstance(m, Router)]

    def balance_loss(self) -> Tensor:
        """Mean over MoE layers of this training pass's sequence-wise balance loss, without alpha; 0 if dense."""
        losses = take_balance_losses(self)
        return torch.stack(losses).mean() if losses else torch.zeros((), device=self.embed.device)
