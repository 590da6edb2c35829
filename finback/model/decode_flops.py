"""FLOPs of decoding one token after a long text, in FP8 equivalents, as in V4's report. Does not import torch.

A FLOP counts 2 in BF16, 1 in FP8 and 1/2 in FP4. Products with weights count 1, also with FP4 experts, since they run in
FP8. The head and attention's products with cached entries (in MLA, with the latents) count 2, an indexer's products 1 in
V3.2 and 1/2 in V4, where they run in FP4. Routers, compressors and mHC are negligible and count like other weights.
"""

from finback.model.config import CSA, HCA, ModelConfig
from finback.model.count import parameters


def fp8_flops(c: ModelConfig, before: int) -> float:
    """FP8 FLOPs of one token after `before` others, without MTP."""
    head, embeddings = c.vocab_size * c.hidden_size, 1 if c.tie_word_embeddings else 2
    weights = parameters(c, active=True, mtp=False) - embeddings * head
    layers = range(c.num_hidden_layers)
    return 2 * (weights + 2 * head + sum(_read(c, layer, before) for layer in layers))


def _read(c: ModelConfig, layer: int, before: int) -> float:
    """One layer's multiplications with cached entries, weighted by precision."""
    heads, indexer = c.num_attention_heads, c.index_n_heads * c.index_head_dim
    if c.attention == "mla":
        seen, indexed = min(before, c.index_topk or before), before * indexer * c.has_indexer(layer)
        return 2.0 * seen * heads * (2 * c.kv_lora_rank + c.qk_rope_head_dim) + indexed
    if c.attention == "gqa":
        return 4.0 * min(before, c.window(layer) or before) * heads * c.head_dim
    assert c.sliding_window is not None, "compressed attention has a window"
    near, kind = min(before, c.sliding_window), c.layer_type(layer)
    if kind == CSA:
        entries = before / c.compress_rate_csa
        return 4 * (near + min(entries, c.index_topk)) * heads * c.head_dim + entries * indexer / 2
    return 4 * (near + (before / c.compress_rate_hca if kind == HCA else 0)) * heads * c.head_dim
