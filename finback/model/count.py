"""Closed-form parameter and FLOP counts of a model (spec 2.3 and 2.4); builds nothing. Does not import torch."""

import dataclasses
from collections.abc import Iterable
from dataclasses import dataclass

from finback.model.config import CSA, HCA, ModelConfig


def attending_densely(c: ModelConfig) -> ModelConfig:
    """The same model with indexers that select everything."""
    return dataclasses.replace(c, index_topk=max(c.index_topk, c.max_position_embeddings)) if c.index_topk else c


def attention_parameters(c: ModelConfig, layer: int = 0) -> int:
    """One layer's attention, including the norms of the latents; layers differ in compressed attention and where indexers are shared."""
    if c.attention == "compressed":
        return _compressed_matrices(c, layer) + _compressed_vectors(c, layer)
    if c.attention == "gqa":
        kv = 2 * c.num_key_value_heads
        matrices = c.hidden_size * c.head_dim * (2 * c.num_attention_heads + kv)
        qkv = c.head_dim * (c.num_attention_heads + kv)
        biases = {"none": 0, "qkv": qkv, "all": qkv + c.hidden_size}
        normed = 2 * c.head_dim if c.qk_norm_over == "head" else qkv - c.num_key_value_heads * c.head_dim
        return (
            matrices
            + biases[c.attention_bias]
            + (normed if c.qk_norm else 0)
            + c.attention_sinks * c.num_attention_heads
        )
    heads, d = c.num_attention_heads, c.hidden_size
    query = d * heads * c.qk_head_dim
    if c.q_lora_rank is not None:
        query = d * c.q_lora_rank + c.q_lora_rank + c.q_lora_rank * heads * c.qk_head_dim
    latent = d * (c.kv_lora_rank + c.qk_rope_head_dim) + c.kv_lora_rank
    main = query + latent + c.kv_lora_rank * heads * (c.qk_nope_head_dim + c.v_head_dim) + heads * c.v_head_dim * d
    return main + (_indexer_matrices(c) + 2 * c.index_head_dim if c.has_indexer(layer) else 0)


def _compressed_matrices(c: ModelConfig, layer: int) -> int:
    """V4's projections: queries and entries, grouped outputs, and those of the compressor."""
    assert c.q_lora_rank is not None, "compressed attention has a query latent"
    d, all_heads = c.hidden_size, c.num_attention_heads * c.head_dim
    window = (d + all_heads) * c.q_lora_rank + d * c.head_dim + c.o_lora_rank * (all_heads + c.o_groups * d)
    kind = c.layer_type(layer)
    if kind == HCA:
        return window + 2 * d * c.head_dim
    if kind != CSA:
        return window
    asked = c.index_n_heads * (c.q_lora_rank * c.index_head_dim + d)
    return window + 4 * d * (c.head_dim + c.index_head_dim) + asked


def _compressed_vectors(c: ModelConfig, layer: int) -> int:
    """Norm weights, sinks, and position biases of windows."""
    assert c.q_lora_rank is not None, "compressed attention has a query latent"
    window = c.q_lora_rank + c.head_dim + c.num_attention_heads
    kind = c.layer_type(layer)
    if kind == HCA:
        return window + (1 + c.compress_rate_hca) * c.head_dim
    return window + ((1 + 2 * c.compress_rate_csa) * (c.head_dim + c.index_head_dim) if kind == CSA else 0)


def _mixture(c: ModelConfig, rows: int, scales: int) -> int:
    """mHC's projection of all streams to `rows` values, with biases and scales."""
    return rows * (c.hc_mult * c.hidden_size + 1) + scales if c.hc_mult else 0


def _indexer_matrices(c: ModelConfig) -> int:
    """DSA's projections: queries from the query latent, and one key and a weight per head from the hidden state."""
    assert c.q_lora_rank is not None, "an indexer's queries come from the query latent"
    heads, width = c.index_n_heads, c.index_head_dim
    return c.q_lora_rank * heads * width + c.hidden_size * (width + heads)


def layer_parameters(c: ModelConfig, layer: int, active: bool) -> int:
    """One block; `active` counts only the experts used per token. Router biases are not parameters."""
    d = c.hidden_size
    block = (
        attention_parameters(c, layer)
        + (4 if c.norms == "both" else 2) * d
        + 2 * _mixture(c, c.hc_mult * (2 + c.hc_mult), 3)
    )
    if not c.is_moe(layer):
        return block + 3 * d * c.intermediate_size
    experts = c.num_experts_per_tok if active else c.n_routed_experts
    biases = (experts * (2 * c.moe_intermediate_size + d) + c.n_routed_experts) if c.swiglu_alpha is not None else 0
    matrices = 3 * d * c.moe_intermediate_size * (experts + c.n_shared_experts) + c.n_routed_experts * d
    return block + matrices + biases


def parameters(c: ModelConfig, active: bool = False, mtp: bool = True) -> int:
    """All parameters, or those used per token; the input embedding counts once, the head once unless tied."""
    layers = sum(layer_parameters(c, layer, active) for layer in range(c.num_hidden_layers))
    embeddings = c.vocab_size * c.hidden_size * (1 if c.tie_word_embeddings else 2)
    merge = _mixture(c, c.hc_mult, 1)
    return layers + embeddings + merge + c.hidden_size + (mtp_parameters(c, active) if mtp else 0)


def mtp_parameters(c: ModelConfig, active: bool = False) -> int:
    """The MTP modules without the shared embedding and head."""
    layers = range(c.num_hidden_layers, c.num_hidden_layers + c.num_nextn_predict_layers)
    extra = 2 * c.hidden_size**2 + 3 * c.hidden_size + _mixture(c, c.hc_mult, 1)
    return sum(layer_parameters(c, layer, active) + extra for layer in layers)


def router_biases(c: ModelConfig) -> int:
    """Elements of the trunk's selection biases: not parameters, but included in V3's files and its 671,026,419,200."""
    moe = sum(c.is_moe(layer) for layer in range(c.num_hash_layers, c.num_hidden_layers))
    return moe * c.n_routed_experts if c.scoring_func != "softmax" else 0


def forward_flops(c: ModelConfig, context: float, mtp: bool = False) -> float:
    """FLOPs per token that attends to `context` keys on average (T / 2 for causal training on rows of T)."""
    head = c.vocab_size * c.hidden_size
    embedding = 0 if c.tie_word_embeddings else head
    met = parameters(c, active=True, mtp=mtp) - embedding
    layers = c.num_hidden_layers
    if mtp:
        met += head * c.num_nextn_predict_layers  # the head runs once more per depth
        layers += c.num_nextn_predict_layers
    return 2 * met + sum(_score_flops(c, context, layer) for layer in range(layers))


def forward_flops_of(c: ModelConfig, lengths: Iterable[int], mtp: bool = False) -> float:
    """FLOPs of a forward pass over whole sequences of these lengths; the i-th token of each attends to i keys."""
    lengths = list(lengths)
    tokens, pairs = sum(lengths), sum(n * (n + 1) // 2 for n in lengths)
    return tokens * forward_flops(c, pairs / tokens, mtp) if tokens else 0.0


def training_flops_of(c: ModelConfig, lengths: Iterable[int], mtp: bool = True, frozen: bool = False) -> float:
    """Forward and backward: three times the forward pass, or twice if weights are frozen, without adapters."""
    return (2 if frozen else 3) * forward_flops_of(c, lengths, mtp)


def training_flops(c: ModelConfig, context: float, mtp: bool = True) -> float:
    """Forward and backward: three times the forward pass."""
    return 3 * forward_flops(c, context, mtp)


def recomputed_flops(c: ModelConfig, context: float, policy: str, mtp: bool = True) -> float:
    """FLOPs per token recomputed in the backward pass by a policy of model/recompute.py: attention, or whole blocks."""
    p = token_flops(c, context, mtp)
    attention = p.attention_linear + p.attention_scores
    recomputed = {"none": 0.0, "attention": attention, "block": p.total - p.head - p.join}
    return recomputed[policy]


def recomputed_flops_of(c: ModelConfig, lengths: Iterable[int], policy: str, mtp: bool = True) -> float:
    """The same for whole sequences of these lengths."""
    return sum(n * recomputed_flops(c, (n + 1) / 2, policy, mtp) for n in lengths)


@dataclass(frozen=True)
class TokenFlops:
    """FLOPs of one token's matrix products in the forward pass, as a profiler counts them; norms and sums are ignored."""

    # projections into and out of attention, and mHC's mixtures of streams
    attention_linear: float
    # products of queries with keys, and of attention weights with values
    attention_scores: float
    # feed-forward of the dense layers
    dense: float
    # routed experts used per token
    experts: float
    # shared experts
    shared: float
    router: float
    # logits over the vocabulary, once more per MTP depth
    head: float
    # MTP's projection of [embedding; hidden], for every stream under mHC
    join: float

    @property
    def total(self) -> float:
        """Sum of all terms."""
        return sum(getattr(self, field.name) for field in dataclasses.fields(self))


def token_flops(c: ModelConfig, context: float, mtp: bool = False) -> TokenFlops:
    """The terms of one token's forward pass with `context` keys; equal to torch's FlopCounterMode.

    A backward pass costs twice as much. For an attention that also computes what the causal mask hides, `context` is the row's
    length T; the necessary number is (T + 1) / 2, and papers count T / 2.
    """
    depths = c.num_nextn_predict_layers if mtp else 0
    layers = c.num_hidden_layers + depths
    moe = sum(c.is_moe(layer) for layer in range(layers))
    expert = 3 * c.hidden_size * c.moe_intermediate_size
    return TokenFlops(
        attention_linear=2 * sum(_attention_matrices(c, layer) for layer in range(layers)),
        attention_scores=sum(_score_flops(c, context, layer) for layer in range(layers)),
        dense=2 * (layers - moe) * 3 * c.hidden_size * c.intermediate_size,
        experts=2 * moe * c.num_experts_per_tok * expert,
        shared=2 * moe * c.n_shared_experts * expert,
        router=2 * moe * c.n_routed_experts * c.hidden_size,
        head=2 * (1 + depths) * c.vocab_size * c.hidden_size,
        join=2 * depths * (1 + max(1, c.hc_mult)) * c.hidden_size**2,
    )


def _attention_matrices(c: ModelConfig, layer: int) -> int:
    """Matrices of one layer's attention, without norm weights and biases, plus the projections of mHC."""
    mixtures = 2 * (2 + c.hc_mult) * c.hc_mult**2 * c.hidden_size
    if c.attention == "compressed":
        return _compressed_matrices(c, layer) + mixtures
    return _plain_matrices(c, layer) + mixtures


def _plain_matrices(c: ModelConfig, layer: int) -> int:
    """The same for latent and grouped-query attention, without mHC."""
    if c.attention == "gqa":
        return c.hidden_size * c.head_dim * (2 * c.num_attention_heads + 2 * c.num_key_value_heads)
    norms = c.kv_lora_rank + (c.q_lora_rank or 0) + (2 * c.index_head_dim if c.has_indexer(layer) else 0)
    return attention_parameters(c, layer) - norms


def _score_flops(c: ModelConfig, context: float, layer: int) -> float:
    """FLOPs of one layer's attention scores and weighted values, for a token with `context` keys available.

    On average over rows of T = 2 · context tokens, DSA attends to min(i, k) of i, and its indexer to all of them once T > k.
    """
    if c.attention == "compressed":
        return _compressed_score_flops(c, context, layer)
    value = c.v_head_dim if c.attention == "mla" else c.head_dim
    k, row = c.index_topk, 2 * context
    indexed = 0.0
    if k and row > k:
        scored = context * c.has_indexer(layer)
        context, indexed = k - k * k / (2 * row), scored * c.index_n_heads * c.index_head_dim
    return 2 * (context * c.num_attention_heads * (c.qk_head_dim + value) + indexed)


def _compressed_score_flops(c: ModelConfig, context: float, layer: int) -> float:
    """The same for V4: a window, and the layer's entries; for CSA at most index_topk, plus the indexer's products."""
    assert c.sliding_window is not None, "compressed attention has a window"
    near, far, indexed = _met(context, c.sliding_window), 0.0, 0.0
    kind = c.layer_type(layer)
    if kind == HCA:
        far = context / c.compress_rate_hca
    elif kind == CSA:
        entries = context / c.compress_rate_csa
        far = _met(entries, c.index_topk)
        indexed = entries * c.index_n_heads * c.index_head_dim if 2 * entries > c.index_topk else 0.0
    return 2 * ((near + far) * c.num_attention_heads * 2 * c.head_dim + indexed)


def _met(context: float, most: int) -> float:
    """Average of min(i, most) over i = 1 … 2 · context."""
    return context if 2 * context <= most else most - most * most / (4 * context)


def cache_bytes(c: ModelConfig, bytes_per_element: float = 2) -> float:
    """Bytes per token in the cache of all trunk layers: 70,272 for V3 in bf16.

    For V4, a token's share of compressed entries; its window has a fixed size for any number of tokens.
    """
    if c.attention == "compressed":
        kinds: list[str] = [c.layer_type(layer) for layer in range(c.num_hidden_layers)]
        csa = kinds.count(CSA) * (c.head_dim + c.index_head_dim) / c.compress_rate_csa
        return (csa + kinds.count(HCA) * c.head_dim / c.compress_rate_hca) * bytes_per_element
    return c.num_hidden_layers * c.cache_elements * bytes_per_element


def choice_bytes(c: ModelConfig, experts: bool, entries: bool) -> int:
    """Bytes per token of choices that the engine records for RL to replay: experts of all layers, entries of all indexers."""
    routed = c.num_hidden_layers * c.num_experts_per_tok * (1 if c.n_routed_experts <= 256 else 2)
    selected = c.indexers * c.index_topk * (2 if c.max_position_embeddings <= 1 << 15 else 4)
    return experts * routed + entries * selected
