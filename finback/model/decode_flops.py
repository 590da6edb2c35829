"""Products of one token that decodes behind a long text, in units of FP8, as V4's report compares models. Does not import torch.

A product in BF16 counts 2, one in FP8 1, one in FP4 1/2. Weights count 1, experts in FP4 too, whose products run in FP8; the head and
attention's products with what is cached count 2 (of MLA on the latents themselves); those of an indexer 1 in V3.2 and 1/2 in V4,
whose indexer is FP4. Routers, compressors and mHC, next to nothing, count as the other weights do.
"""

from finback.model.config import CSA, HCA, ModelConfig
from finback.model.count import parameters


def fp8_flops(c: ModelConfig, before: int) -> float:
    """Of a token behind `before` others, MTP left out."""
    head, embeddings = c.vocab_size * c.hidden_size, 1 if c.tie_word_embeddings else 2
    weights = parameters(c, active=True, mtp=False) - embeddings * head
    layers = range(c.num_hidden_layers)
    return 2 * (weights + 2 * head + sum(_read(c, layer, before) for layer in layers))


def _read(c: ModelConfig, layer: int, before: int) -> float:
    """Multiplications of one layer with what is cached, times what they count."""
    heads, indexer = c.num_attention_heads, c.index_n_heads * c.index_head_dim
    if c.attention == "mla":
        seen, indexed = min(before, c.index_topk or before), before * indexer * c.has_indexer(layer)
        return 2.0 * seen * heads * (2 * c.kv_lora_rank + c.qk_rope_head_dim) + indexed
    if c.attention == "gqa":
        return 4.0 * min(before, c.window(layer) or before) * heads * c.head_dim
    assert c.sliding_window is not None, "of compressed attention"
    near, kind = min(before, c.sliding_window), c.layer_type(layer)
    if kind == CSA:
        entries = before / c.compress_rate_csa
        return 4 * (near + min(entries, c.index_topk)) * heads * c.head_dim + entries * indexer / 2
    return 4 * (near + (before / c.compress_rate_hca if kind == HCA else 0)) * heads * c.head_dim
