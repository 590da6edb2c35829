"""The name table: our parameter names and Hugging Face's, used in both directions; V4's is in v4_names.py.

Our names are the papers' terms; Hugging Face's define the file format. A fused tensor of ours lists its parts in row
order; all its parts have the same number of rows.
"""

from finback.checkpoint import v4_names
from finback.checkpoint.v4_names import TABLE as TABLE
from finback.model.config import ModelConfig

_Names = dict[str, tuple[str, ...]]

BIASES = ("e_score_correction_bias", v4_names.BIAS)  # the endings of router biases' names

_MLA: _Names = {
    "q_down.weight": ("self_attn.q_a_proj.weight",),
    "q_norm.weight": ("self_attn.q_a_layernorm.weight",),
    "q_up.weight": ("self_attn.q_b_proj.weight",),
    "kv_down.weight": ("self_attn.kv_a_proj_with_mqa.weight",),
    "kv_norm.weight": ("self_attn.kv_a_layernorm.weight",),
    "kv_up.weight": ("self_attn.kv_b_proj.weight",),
    "out.weight": ("self_attn.o_proj.weight",),
}
_DSA: _Names = {
    "indexer.query.weight": ("self_attn.indexer.wq_b.weight",),
    "indexer.key.weight": ("self_attn.indexer.wk.weight",),
    "indexer.key_norm.weight": ("self_attn.indexer.k_norm.weight",),
    "indexer.key_norm.bias": ("self_attn.indexer.k_norm.bias",),
    "indexer.weight.weight": ("self_attn.indexer.weights_proj.weight",),
}
_GQA: _Names = {
    "query.weight": ("self_attn.q_proj.weight",),
    "key_value.weight": ("self_attn.k_proj.weight", "self_attn.v_proj.weight"),
    "out.weight": ("self_attn.o_proj.weight",),
}

# the experts' module, and the names of gate, up and down in it
EXPERTS = "mlp", "gate_proj", "up_proj", "down_proj"
MIXTRAL = "block_sparse_moe", "w1", "w3", "w2"

_PRE_NORMS: _Names = {
    "attention_norm.weight": ("input_layernorm.weight",),
    "feed_forward_norm.weight": ("post_attention_layernorm.weight",),
}
_BOTH_NORMS: _Names = {
    "attention_norm.weight": ("input_layernorm.weight",),
    "attention.norm.weight": ("post_attention_layernorm.weight",),
    "feed_forward_norm.weight": ("pre_feedforward_layernorm.weight",),
    "feed_forward.norm.weight": ("post_feedforward_layernorm.weight",),
}
_POST_NORMS: _Names = {
    "attention.norm.weight": ("post_attention_layernorm.weight",),
    "feed_forward.norm.weight": ("post_feedforward_layernorm.weight",),
}


def table(config: ModelConfig, biases: bool = False) -> dict[str, tuple[str, ...]]:
    """Maps every tensor of a model, buffers included, to the Hugging Face tensors that it consists of, in row order.

    biases: include all router biases. Published files of softmax gates have none; models trained here do.
    """
    if config.attention == "compressed":
        return v4_names.table(config)
    names: dict[str, tuple[str, ...]] = {"embed": ("model.embed_tokens.weight",), "norm.weight": ("model.norm.weight",)}
    if not config.tie_word_embeddings:
        names["head.weight"] = ("lm_head.weight",)
    for layer in range(config.num_hidden_layers):
        names |= _block(config, f"blocks.{layer}.", layer, biases)
    for depth in range(config.num_nextn_predict_layers):
        layer = config.num_hidden_layers + depth
        prefix, theirs = f"mtp.{depth}.", f"model.layers.{layer}."
        names |= _block(config, prefix + "block.", layer, biases)
        names |= {
            prefix + "embed_norm.weight": (theirs + "enorm.weight",),
            prefix + "hidden_norm.weight": (theirs + "hnorm.weight",),
            prefix + "project.weight": (theirs + "eh_proj.weight",),
            prefix + "norm.weight": (theirs + "shared_head.norm.weight",),
        }
    return names


def modules(config: ModelConfig) -> dict[str, tuple[str, ...]]:
    """The table with the names of transformers' modules, which PEFT uses; only V4's differ from those in its files."""
    if config.attention != "compressed":
        return table(config)
    return {ours: tuple(map(v4_names.of_modules, theirs)) for ours, theirs in v4_names.table(config).items()}


def is_mixtral(config: ModelConfig) -> bool:
    """Whether a model has Mixtral's experts: a softmax gate, and attention without query and key norms."""
    by_softmax = config.n_routed_experts > 0 and config.scoring_func == "softmax"
    return config.attention == "gqa" and by_softmax and not config.qk_norm and config.swiglu_alpha is None


def copies(config: ModelConfig) -> dict[str, str]:
    """Maps Hugging Face names of duplicate tensors to the names of their originals.

    DeepSeek's MTP layers repeat the trunk's embedding and head; some tied models store their head as well.
    """
    if config.attention == "compressed":
        return {"head.weight": "embed.weight"} if config.tie_word_embeddings else {}
    found = {}
    for depth in range(config.num_nextn_predict_layers):
        layer = f"model.layers.{config.num_hidden_layers + depth}."
        found[layer + "embed_tokens.weight"] = "model.embed_tokens.weight"
        head = "model.embed_tokens.weight" if config.tie_word_embeddings else "lm_head.weight"
        found[layer + "shared_head.head.weight"] = head
    if config.tie_word_embeddings:
        found["lm_head.weight"] = "model.embed_tokens.weight"
    return found


def _gqa(config: ModelConfig) -> _Names:
    names = dict(_GQA)
    if config.attention_bias != "none":
        names["query.bias"] = ("self_attn.q_proj.bias",)
        names["key_value.bias"] = ("self_attn.k_proj.bias", "self_attn.v_proj.bias")
    if config.attention_bias == "all":
        names["out.bias"] = ("self_attn.o_proj.bias",)
    if config.attention_sinks:
        names["sink"] = ("self_attn.sinks",)
    if config.qk_norm:
        names["query_norm.weight"] = ("self_attn.q_norm.weight",)
        names["key_norm.weight"] = ("self_attn.k_norm.weight",)
    return names


def _block(config: ModelConfig, ours: str, layer: int, biases: bool) -> dict[str, tuple[str, ...]]:
    theirs = f"model.layers.{layer}."
    names: _Names = dict({"pre": _PRE_NORMS, "post": _POST_NORMS, "both": _BOTH_NORMS}[config.norms])
    is_pre = config.norms == "pre"
    parts = ("attention.", "feed_forward.") if is_pre else ("attention.inner.", "feed_forward.inner.")
    attention: _Names = dict(_MLA if config.attention == "mla" else _gqa(config))
    if config.attention == "mla" and config.q_lora_rank is None:
        attention = {k: v for k, v in attention.items() if k not in ("q_down.weight", "q_norm.weight")}
        attention["q_up.weight"] = ("self_attn.q_proj.weight",)
    if config.has_indexer(layer):
        attention |= _DSA
    names |= {parts[0] + k: v for k, v in attention.items()}
    if config.is_moe(layer):
        stem, gate, up, down = MIXTRAL if is_mixtral(config) else EXPERTS
        experts = [f"{stem}.experts.{e}." for e in range(config.n_routed_experts)]
        router = f"{stem}.gate"
        if config.swiglu_alpha is not None:
            router = f"{stem}.router"
            names[parts[1] + "router.logit_bias"] = (f"{router}.bias",)
            names[parts[1] + "gate_up_bias"] = tuple(f"{e}{part}.bias" for e in experts for part in (gate, up))
            names[parts[1] + "down_bias"] = tuple(f"{e}{down}.bias" for e in experts)
        names[parts[1] + "router.weight"] = (f"{router}.weight",)
        if config.scoring_func == "sigmoid" or biases:
            names[parts[1] + "router.bias"] = (f"{stem}.gate.e_score_correction_bias",)
        names[parts[1] + "gate_up"] = tuple(f"{each}{part}.weight" for each in experts for part in (gate, up))
        names[parts[1] + "down"] = tuple(f"{each}{down}.weight" for each in experts)
        if config.n_shared_experts:
            names |= _swiglu(parts[1] + "shared.", "mlp.shared_experts.")
    else:
        names |= _swiglu(parts[1], "mlp.")
    return {ours + k: tuple(theirs + part for part in v) for k, v in names.items()}


def _swiglu(ours: str, theirs: str) -> dict[str, tuple[str, ...]]:
    return {
        ours + "gate_up.weight": (theirs + "gate_proj.weight", theirs + "up_proj.weight"),
        ours + "down.weight": (theirs + "down_proj.weight",),
    }
