"""Config fields of families with grouped-query attention: windows, norms, bases, experts. Does not import torch."""

from finback.checkpoint.hf_fields import Fields
from finback.checkpoint.hf_latent import Found, first_run, mtp_depth, v3_gate
from finback.checkpoint.hf_rope import read_rope
from finback.model.rope_scaling import LongRope

FULL, SLIDING = "full_attention", "sliding_attention"


def grouped(fields: Fields) -> Found:
    """Llama's attention: grouped queries, halves of a head rotated; other families add to it."""
    heads = fields.integer("num_attention_heads")
    return {
        "attention": "gqa",
        "num_key_value_heads": fields.integer("num_key_value_heads", heads),
        "head_dim": fields.integer("head_dim", fields.integer("hidden_size") // max(heads, 1)),
        "attention_bias": "all" if fields.flag("attention_bias", False) else "none",
        "rope_interleaved": False,
    }


def _windows(fields: Fields) -> Found:
    """Reads Qwen's windows: with use_sliding_window, as layer_types lists, or from layer max_window_layers on."""
    kinds = fields.words("layer_types", (FULL, SLIDING))
    if not fields.flag("use_sliding_window", False) or fields.raw.get("sliding_window", 4096) is None:
        if SLIDING in kinds:
            fields.refuse(
                "layer_types", "names sliding layers while use_sliding_window is off", "Correct one of the two."
            )
        return {}
    layers = fields.integer("num_hidden_layers")
    first = fields.integer("max_window_layers", 28)
    kinds = kinds or [SLIDING if layer >= first else FULL for layer in range(layers)]
    return _slide(fields.integer("sliding_window", 4096), kinds)


def _slide(window: int, kinds: list[str]) -> Found:
    """Returns the window of some layers or of all; empty if no layer slides."""
    if SLIDING not in kinds:
        return {}
    return {"sliding_window": window, "layer_types": () if FULL not in kinds else tuple(kinds)}


def window_of_all(fields: Fields, default: int | None) -> Found:
    """Reads a window that all layers share; null means none, an absent field the class's default."""
    window = fields.raw.get("sliding_window", default)
    if (SLIDING if window is None else FULL) in fields.words("layer_types", (FULL, SLIDING)):
        fields.refuse("layer_types", "this family has a window in all layers or in none", "Use another checkpoint.")
    return {} if window is None else {"sliding_window": fields.integer("sliding_window", default)}


def qwen2(fields: Fields) -> Found:
    """Llama's attention with biases on queries, keys and values, and sliding windows."""
    return grouped(fields) | {"attention_bias": "qkv"} | _windows(fields)


def qwen3(fields: Fields) -> Found:
    """Llama's attention with norms on each head's query and key, and sliding windows."""
    return grouped(fields) | {"qk_norm": True} | _windows(fields)


def qwen3_moe(fields: Fields) -> Found:
    """Softmax over all experts, then top-k; a window covers every layer."""
    found = grouped(fields) | {"qk_norm": True}
    if fields.flag("use_sliding_window", False):
        found |= window_of_all(fields, 4096)
    experts = fields.integer("num_experts", fields.raw.get("num_local_experts") or 128)
    layers, step = fields.integer("num_hidden_layers"), max(1, fields.integer("decoder_sparse_step", 1))
    alone = fields.integers("mlp_only_layers", [])
    dense = [layer for layer in range(layers) if layer in alone or (layer + 1) % step]
    if not experts or len(dense) == layers:
        return found
    first, further = first_run(dense)
    return found | {
        "n_routed_experts": experts,
        "num_experts_per_tok": fields.integer("num_experts_per_tok", 8),
        "moe_intermediate_size": fields.integer("moe_intermediate_size"),
        "first_k_dense_replace": first,
        "dense_layers": further,
        "scoring_func": "softmax",
        "norm_topk_prob": fields.flag("norm_topk_prob", False),
    }


def smollm3(fields: Fields) -> Found:
    """Some layers, by default every fourth, have no rotary embedding; by default these are the sliding ones."""
    layers, step = fields.integer("num_hidden_layers"), max(1, fields.integer("no_rope_layer_interval", 4))
    rotated = fields.integers("no_rope_layers", [int((i + 1) % step != 0) for i in range(layers)])
    if len(rotated) < layers:
        fields.refuse("no_rope_layers", f"not one for each of {layers} layers")
    nope = tuple(i for i in range(layers) if not rotated[i])
    found = grouped(fields) | {"nope_layers": nope}
    window = fields.raw.get("sliding_window")
    if not fields.flag("use_sliding_window", False) or window is None:
        return found
    kinds = fields.words("layer_types", (FULL, SLIDING)) or [SLIDING if i in nope else FULL for i in range(layers)]
    return found | _slide(fields.integer("sliding_window"), kinds[:layers])


def glm4_moe(fields: Fields) -> Found:
    """V3's gate with grouped-query attention; half of each head is rotated by default."""
    found = grouped(fields) | {"qk_norm": fields.flag("use_qk_norm", False)}
    found["attention_bias"] = "qkv" if found["attention_bias"] == "all" else "none"
    found["num_nextn_predict_layers"] = mtp_depth(fields)
    return found | v3_gate(fields, found)


def phi3(fields: Fields) -> Found:
    """Its files fuse queries, keys and values into one matrix, gate and up into another; see stored_names.py."""
    fields.demand("attention_bias", False)
    if not isinstance(read_rope(fields)["rope_scaling"], LongRope | None):
        fields.refuse("rope_scaling", "phi3 has longrope or none")
    return grouped(fields) | window_of_all(fields, None)


def olmo2(fields: Fields) -> Found:
    """Llama's attention with norms on whole projections, and block norms after attention and feed-forward."""
    return grouped(fields) | {"qk_norm": True, "qk_norm_over": "projection", "norms": "post"}


def _two_rotations(fields: Fields, kinds: list[str], local_theta: float) -> Found:
    """Reads the bases of full and sliding layers, and the scaling, which applies to full layers only."""
    nested = fields.object("rope_parameters")
    full = Fields(nested).object(FULL) | fields.object("rope_scaling")
    full |= {"truncate": nested.get("truncate", True)}  # transformers reads it from this level only
    local = Fields(nested).object(SLIDING)
    if (local.get("rope_type") or "default") != "default":
        fields.refuse("rope_parameters", "scales the sliding layers too", "Use another checkpoint.")
    rope = read_rope(fields, full | {"partial_rotary_factor": full.get("partial_rotary_factor") or 1.0})
    if rope["partial_rotary_factor"] != 1.0:
        fields.refuse(
            "rope_parameters", "rotates parts of heads, but this family rotates whole heads", "Use another checkpoint."
        )
    theta = Fields(local, fields.defaults | {"rope_theta": local_theta}).number("rope_theta")
    is_one = rope["rope_scaling"] is None and theta == rope["rope_theta"]
    slides = _slide(fields.integer("sliding_window", 4096), kinds)
    return rope | slides | {"local_rope_theta": None if is_one or not slides else theta}


def olmo3(fields: Fields) -> Found:
    """OLMo 2 with three sliding layers for each full one."""
    layers = fields.integer("num_hidden_layers")
    kinds = fields.words("layer_types", (FULL, SLIDING)) or [SLIDING if (i + 1) % 4 else FULL for i in range(layers)]
    return olmo2(fields) | _two_rotations(fields, kinds, 500000.0)


def gemma3(fields: Fields) -> Found:
    """Norms before and after, gains stored minus 1; GeGLU; five sliding layers for each full one, with other bases."""
    for name in ("attn_logit_softcapping", "final_logit_softcapping"):
        if fields.raw.get(name) is not None:
            fields.refuse(name, "finback does not support softcapping", "Use another checkpoint.")
    fields.demand("use_bidirectional_attention", False)
    fields.demand("hidden_activation", "gelu_pytorch_tanh")
    layers, step = fields.integer("num_hidden_layers"), max(1, fields.integer("sliding_window_pattern", 6))
    kinds = fields.words("layer_types", (FULL, SLIDING)) or [SLIDING if (i + 1) % step else FULL for i in range(layers)]
    local = fields.number("rope_local_base_freq", 10000.0)
    return (
        grouped(fields)
        | {"norms": "both", "norm_offset": True, "scale_embeddings": True, "activation": "gelu_tanh", "qk_norm": True}
        | {"query_pre_attn_scalar": fields.integer("query_pre_attn_scalar", 256)}
        | _two_rotations(fields, kinds, local)
    )


def mixtral(fields: Fields) -> Found:
    """Softmax over all experts, then top-k with weights normalised to sum to 1."""
    return (
        grouped(fields)
        | window_of_all(fields, None)
        | {
            "attention_bias": "none",
            "n_routed_experts": fields.integer("num_local_experts", 8),
            "num_experts_per_tok": fields.integer("num_experts_per_tok", 2),
            "moe_intermediate_size": fields.integer("intermediate_size"),
            "scoring_func": "softmax",
        }
    )


# gpt-oss's default, for configs without rotary settings
_OSS_ROPE = {"rope_type": "yarn", "factor": 32.0, "original_max_position_embeddings": 4096, "truncate": False}


def gpt_oss(fields: Fields) -> Found:
    """Sinks, a window in every other layer, biased experts with clamped SwiGLU; stacked_experts.py has their layout."""
    layers = fields.integer("num_hidden_layers")
    kinds = fields.words("layer_types", (FULL, SLIDING)) or [FULL if i % 2 else SLIDING for i in range(layers)]
    window = fields.raw.get("sliding_window", 128)
    raw = fields.raw
    rope = read_rope(fields, fields.object("rope_scaling") or fields.object("rope_parameters") or _OSS_ROPE)
    if rope.pop("partial_rotary_factor") != 1.0:
        fields.refuse("partial_rotary_factor", "gpt_oss rotates whole heads", "Use another checkpoint.")
    return (
        grouped(fields)
        | rope
        | ({} if window is None else _slide(fields.integer("sliding_window", 128), kinds))
        | {
            "attention_sinks": True,
            "n_routed_experts": fields.integer("num_local_experts", raw.get("num_experts") or 128),
            "num_experts_per_tok": fields.integer("num_experts_per_tok", 4),
            "moe_intermediate_size": fields.integer("intermediate_size"),
            "scoring_func": "softmax",
            "swiglu_alpha": fields.number("swiglu_alpha", 1.702),
            "swiglu_limit": fields.number("swiglu_limit", 7.0),
        }
    )
