"""What the families of open checkpoints say beyond the common fields of a config.json, read into ModelConfig. No torch here.

Defaults are those of transformers' classes, which count where a file says nothing.
"""

from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

from finback.checkpoint.hf_fields import Fields
from finback.checkpoint.hf_rope import read_rope
from finback.checkpoint.hf_v4 import DEFAULTS as V4_DEFAULTS
from finback.checkpoint.hf_v4 import read_v4

MLA = ("kv_lora_rank", "qk_nope_head_dim", "qk_rope_head_dim", "v_head_dim")
MOE = ("n_routed_experts", "n_shared_experts", "num_experts_per_tok", "moe_intermediate_size")
GROUPS = ("n_group", "topk_group")
INDEXER = ("index_topk", "index_n_heads", "index_head_dim")
FULL, SLIDING = "full_attention", "sliding_attention"
Found = dict[str, Any]


@dataclass(frozen=True)
class Family:
    """A `model_type`: transformers' class for it, what its config says beyond the common fields, and its defaults."""

    architecture: str
    read: Callable[[Fields], Found]
    defaults: dict[str, Any] = field(default_factory=dict)


# ---- latent attention


def _latent(fields: Fields, is_moe: Callable[[Fields, Found], Found], mtp: bool) -> Found:
    """DeepSeek's fields; is_moe reads those of the experts, unless all layers are dense."""
    fields.demand("attention_bias", False)
    fields.demand("moe_layer_freq", 1)
    rank = fields.raw.get("q_lora_rank")
    found: Found = {name: fields.integer(name) for name in MLA} | {
        "attention": "mla",
        "q_lora_rank": None if rank is None else fields.integer("q_lora_rank"),
        "rope_interleaved": fields.flag("rope_interleave", True),
    }
    found["num_nextn_predict_layers"] = _depth(fields) if mtp else 0
    return found | is_moe(fields, found)


def _depth(fields: Fields) -> int:
    """Layers of multi-token prediction, by either name."""
    return fields.integer("num_nextn_predict_layers", fields.raw.get("num_mtp_layers") or 0)


def _experts(fields: Fields, dense: int, found: Found) -> Found:
    """The experts' numbers and sizes; nothing where every layer is among the `dense` first ones."""
    every = fields.integer("num_hidden_layers") + found.get("num_nextn_predict_layers", 0)
    if not fields.raw.get("n_routed_experts") or dense >= every:
        return {}
    sizes = {name: fields.integer(name) for name in MOE} | {"first_k_dense_replace": dense}
    return sizes | {"routed_scaling_factor": fields.number("routed_scaling_factor")}


def _v2_gate(fields: Fields, found: Found) -> Found:
    """Softmax affinities, chosen greedily or within the best groups; weights are not normalised."""
    experts = _experts(fields, fields.integer("first_k_dense_replace"), found)
    if not experts:
        return {}
    fields.demand("scoring_func", "softmax")
    fields.demand("norm_topk_prob", False)
    method = fields.raw.get("topk_method", "greedy")
    if method not in ("greedy", "group_limited_greedy"):
        fields.refuse("topk_method", "V2 has greedy and group_limited_greedy")
    groups = {"n_group": 1, "topk_group": 1} if method == "greedy" else {n: fields.integer(n) for n in GROUPS}
    return experts | {"scoring_func": "softmax", "norm_topk_prob": False} | groups


def _v3_gate(fields: Fields, found: Found, dense: int | None = None) -> Found:
    """Sigmoid affinities with a selection bias."""
    first = fields.integer("first_k_dense_replace") if dense is None else dense
    experts = _experts(fields, first, found)
    if not experts:
        return {}
    fields.demand("scoring_func", "sigmoid")
    fields.demand("topk_method", "noaux_tc")
    normalised = fields.flag("norm_topk_prob", True)
    groups = {n: fields.integer(n) for n in GROUPS}
    return experts | {"scoring_func": "sigmoid", "norm_topk_prob": normalised} | groups


def _sparse(fields: Fields, interleaved: bool) -> Found:
    """DSA's indexer, one for each layer, beside V3's fields."""
    # GLM-5 may give several layers one indexer, by any of three fields
    for name, shared in (("indexer_types", "shared"), ("index_topk_pattern", "S")):
        if shared in (fields.raw.get(name) or ()):
            fields.refuse(name, "finback gives each layer an indexer of its own", "Use another checkpoint.")
    fields.demand("index_topk_freq", 1)
    indexer = {name: fields.integer(name) for name in INDEXER} | {"index_rope_interleaved": interleaved}
    return _latent(fields, _v3_gate, mtp=True) | indexer


def _lite_gate(fields: Fields, found: Found) -> Found:
    """GLM-4.7-Flash: V3's gate, and a list of the layers that have experts."""
    kinds = fields.words("mlp_layer_types", ("dense", "sparse"))
    first, further = _run([i for i, kind in enumerate(kinds) if kind == "dense"] if kinds else [0])
    return _v3_gate(fields, found, first) | {"dense_layers": further}


def _run(dense: list[int]) -> tuple[int, tuple[int, ...]]:
    """How many dense layers are at the bottom, and which are further up."""
    first = next((i for i, layer in enumerate(sorted(dense)) if i != layer), len(dense))
    return first, tuple(sorted(dense)[first:])


# ---- grouped-query attention


def _grouped(fields: Fields) -> Found:
    heads = fields.integer("num_attention_heads")
    return {
        "attention": "gqa",
        "num_key_value_heads": fields.integer("num_key_value_heads", heads),
        "head_dim": fields.integer("head_dim", fields.integer("hidden_size") // max(heads, 1)),
        "attention_bias": "all" if fields.flag("attention_bias", False) else "none",
        "rope_interleaved": False,
    }


def _windows(fields: Fields) -> Found:
    """Qwen's: off unless use_sliding_window, then in the layers from max_window_layers on, or in those that are listed."""
    kinds = fields.words("layer_types", (FULL, SLIDING))
    if not fields.flag("use_sliding_window", False) or fields.raw.get("sliding_window", 4096) is None:
        if SLIDING in kinds:
            fields.refuse(
                "layer_types", "names sliding layers while use_sliding_window is off", "Set one of them right."
            )
        return {}
    layers = fields.integer("num_hidden_layers")
    first = fields.integer("max_window_layers", 28)
    kinds = kinds or [SLIDING if layer >= first else FULL for layer in range(layers)]
    return _slide(fields.integer("sliding_window", 4096), kinds)


def _slide(window: int, kinds: list[str]) -> Found:
    """Windows of some layers, of all, or none."""
    if SLIDING not in kinds:
        return {}
    return {"sliding_window": window, "layer_types": () if FULL not in kinds else tuple(kinds)}


def _window_of_all(fields: Fields, default: int | None) -> Found:
    """A window of every layer; null means none, and a missing field what the class takes."""
    window = fields.raw.get("sliding_window", default)
    return {} if window is None else {"sliding_window": fields.integer("sliding_window", default)}


def _qwen2(fields: Fields) -> Found:
    return _grouped(fields) | {"attention_bias": "qkv"} | _windows(fields)


def _qwen3(fields: Fields) -> Found:
    return _grouped(fields) | {"qk_norm": True} | _windows(fields)


def _qwen3_moe(fields: Fields) -> Found:
    """Softmax over all experts, then the best ones; a window is of every layer."""
    found = _grouped(fields) | {"qk_norm": True}
    if fields.flag("use_sliding_window", False):
        found |= _window_of_all(fields, 4096)
    experts = fields.integer("num_experts", fields.raw.get("num_local_experts") or 128)
    layers, step = fields.integer("num_hidden_layers"), max(1, fields.integer("decoder_sparse_step", 1))
    alone = fields.integers("mlp_only_layers", [])
    dense = [layer for layer in range(layers) if layer in alone or (layer + 1) % step]
    if not experts or len(dense) == layers:
        return found
    first, further = _run(dense)
    return found | {
        "n_routed_experts": experts,
        "num_experts_per_tok": fields.integer("num_experts_per_tok", 8),
        "moe_intermediate_size": fields.integer("moe_intermediate_size"),
        "first_k_dense_replace": first,
        "dense_layers": further,
        "scoring_func": "softmax",
        "norm_topk_prob": fields.flag("norm_topk_prob", False),
    }


def _smollm3(fields: Fields) -> Found:
    """Some layers, every fourth by default, are not rotated; these alone may have windows."""
    layers, step = fields.integer("num_hidden_layers"), max(1, fields.integer("no_rope_layer_interval", 4))
    rotated = fields.integers("no_rope_layers", [int((i + 1) % step != 0) for i in range(layers)])
    if len(rotated) < layers:
        fields.refuse("no_rope_layers", f"not one for each of {layers} layers")
    nope = tuple(i for i in range(layers) if not rotated[i])
    found = _grouped(fields) | {"nope_layers": nope}
    window = fields.raw.get("sliding_window")
    if not fields.flag("use_sliding_window", False) or window is None:
        return found
    kinds = fields.words("layer_types", (FULL, SLIDING)) or [SLIDING if i in nope else FULL for i in range(layers)]
    return found | _slide(fields.integer("sliding_window"), kinds[:layers])


def _glm4_moe(fields: Fields) -> Found:
    """V3's gate on grouped-query attention of which half of each head is rotated."""
    found = _grouped(fields) | {"qk_norm": fields.flag("use_qk_norm", False)}
    found["attention_bias"] = "qkv" if found["attention_bias"] == "all" else "none"
    found["num_nextn_predict_layers"] = _depth(fields)
    return found | _v3_gate(fields, found)


def _phi3(fields: Fields) -> Found:
    """Its files have queries, keys and values in one matrix, gate and up in another; see stored_names.py."""
    fields.demand("attention_bias", False)
    return _grouped(fields) | _window_of_all(fields, None)


def _olmo2(fields: Fields) -> Found:
    return _grouped(fields) | {"qk_norm": True, "qk_norm_over": "projection", "norms": "post"}


def _olmo3(fields: Fields) -> Found:
    """OLMo 2 with three sliding layers to a full one; scaling is of the full ones alone."""
    layers, raw = fields.integer("num_hidden_layers"), fields.raw
    kinds = fields.words("layer_types", (FULL, SLIDING)) or [SLIDING if (i + 1) % 4 else FULL for i in range(layers)]
    nested = raw.get("rope_parameters") or {}
    if not isinstance(nested, dict):
        fields.refuse("rope_parameters", "not an object")
    full = (nested.get(FULL) or {}) | (raw.get("rope_scaling") or {})
    full |= {"truncate": nested.get("truncate", True)}  # which transformers looks for beside the kinds of layers alone
    local = nested.get(SLIDING) or {}
    if (local.get("rope_type") or "default") != "default":
        fields.refuse("rope_parameters", "scales the sliding layers too", "Use another checkpoint.")
    rope = read_rope(fields, full)
    theta = Fields(local, fields.defaults).number("rope_theta", 500000.0)
    is_one = rope["rope_scaling"] is None and theta == rope["rope_theta"]
    slides = _slide(fields.integer("sliding_window", 4096), kinds)
    return _olmo2(fields) | rope | slides | {"local_rope_theta": None if is_one or not slides else theta}


FAMILIES: dict[str, Family] = {
    "deepseek_v2": Family("DeepseekV2ForCausalLM", lambda f: _latent(f, _v2_gate, mtp=False)),
    "deepseek_v3": Family("DeepseekV3ForCausalLM", lambda f: _latent(f, _v3_gate, mtp=True)),
    "deepseek_v32": Family("DeepseekV32ForCausalLM", lambda f: _sparse(f, interleaved=False)),
    "glm_moe_dsa": Family("GlmMoeDsaForCausalLM", lambda f: _sparse(f, interleaved=True)),
    "deepseek_v4": Family("DeepseekV4ForCausalLM", read_v4, V4_DEFAULTS),
    "kimi_k2": Family("DeepseekV3ForCausalLM", lambda f: _latent(f, _v3_gate, mtp=True)),
    "glm4_moe_lite": Family(
        "Glm4MoeLiteForCausalLM", lambda f: _latent(f, _lite_gate, mtp=True), {"rms_norm_eps": 1e-5}
    ),
    "llama": Family("LlamaForCausalLM", _grouped),
    "mistral": Family(
        "MistralForCausalLM",
        lambda f: _grouped(f) | _window_of_all(f, 4096),
        {"max_position_embeddings": 131072, "attention_bias": False},
    ),
    "qwen2": Family("Qwen2ForCausalLM", _qwen2),
    "qwen3": Family("Qwen3ForCausalLM", _qwen3, {"head_dim": 128}),
    "qwen3_moe": Family("Qwen3MoeForCausalLM", _qwen3_moe),
    "smollm3": Family(
        "SmolLM3ForCausalLM",
        _smollm3,
        {"tie_word_embeddings": True, "rope_theta": 2000000.0, "max_position_embeddings": 32768},
    ),
    "glm4_moe": Family(
        "Glm4MoeForCausalLM",
        _glm4_moe,
        {"rms_norm_eps": 1e-5, "partial_rotary_factor": 0.5, "first_k_dense_replace": 1, "n_group": 1, "topk_group": 1},
    ),
    "phi3": Family("Phi3ForCausalLM", _phi3, {"rms_norm_eps": 1e-5}),
    "olmo2": Family("Olmo2ForCausalLM", _olmo2, {"rms_norm_eps": 1e-5, "max_position_embeddings": 2048}),
    "olmo3": Family(
        "Olmo3ForCausalLM", _olmo3, {"rms_norm_eps": 1e-5, "max_position_embeddings": 2048, "rope_theta": 500000.0}
    ),
}
# families that people ask for, and what of them is missing here
REFUSED = {
    "qwen3_next": "three of its four layers are gated delta nets, which keep a state and no keys",
    "qwen3_5": "three of its four layers are gated delta nets, which keep a state and no keys",
    "qwen3_5_text": "three of its four layers are gated delta nets, which keep a state and no keys",
    "qwen3_5_moe": "three of its four layers are gated delta nets, which keep a state and no keys",
    "qwen2_moe": "its shared expert has a gate of its own",
    "mixtral": "its experts have other names and no norms of queries and keys",
    "gpt_oss": "its attention has sinks and its experts have biases",
    "gemma3_text": "its norms add 1 to their gains, and its feed-forward is a GeGLU",
    "gemma3": "it also reads pictures, and its text part has norms of another kind",
    "gemma2": "its attention caps scores, and its norms add 1 to their gains",
}
