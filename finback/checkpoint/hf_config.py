"""Hugging Face `config.json` to ModelConfig and back, for the families finback runs. No torch here.

Both spellings of rotary settings are read: `rope_theta` + `rope_scaling` of the releases and `rope_parameters` of
transformers 5. What finback would have to guess or could not run is refused with the field's name.
"""

import json
from dataclasses import asdict
from pathlib import Path
from typing import Any, Literal

from finback.checkpoint.hf_fields import Fields
from finback.config import UserError, did_you_mean
from finback.model.config import ModelConfig
from finback.model.rope_scaling import LinearRope, Llama3Rope, RopeScaling, Yarn

ARCHITECTURES = {
    "deepseek_v2": "DeepseekV2ForCausalLM",
    "deepseek_v3": "DeepseekV3ForCausalLM",
    "deepseek_v32": "DeepseekV32ForCausalLM",
    "glm_moe_dsa": "GlmMoeDsaForCausalLM",
    "llama": "LlamaForCausalLM",
    "qwen2": "Qwen2ForCausalLM",
    "qwen3": "Qwen3ForCausalLM",
}
SPARSE = ("deepseek_v32", "glm_moe_dsa")
LATENT = ("deepseek_v2", "deepseek_v3", *SPARSE)
# fields that are called alike in a config.json and in ModelConfig
SIZES = ("vocab_size", "hidden_size", "num_hidden_layers", "num_attention_heads", "intermediate_size")
COMMON = (*SIZES, "max_position_embeddings", "rms_norm_eps", "tie_word_embeddings", "initializer_range")
MLA = ("kv_lora_rank", "qk_nope_head_dim", "qk_rope_head_dim", "v_head_dim")
MOE = ("n_routed_experts", "n_shared_experts", "num_experts_per_tok", "moe_intermediate_size")
GROUPS = ("n_group", "topk_group")
GATE = (*GROUPS, "scoring_func", "norm_topk_prob", "routed_scaling_factor")
INDEXER = ("index_topk", "index_n_heads", "index_head_dim")
LAYERS = ("first_k_dense_replace", "num_nextn_predict_layers")


def read_config(folder: Path) -> dict[str, Any]:
    """The raw config.json of a folder."""
    path = folder / "config.json"
    try:
        raw = json.loads(path.read_text(encoding="utf-8"))
    except FileNotFoundError:
        raise UserError("model", str(folder), "has no config.json", "Name the folder that holds config.json.") from None
    except OSError as error:
        problem = f"cannot be read ({error.strerror})"
        raise UserError("config.json", str(path), problem, "Give yourself the right to read it.") from None
    except (UnicodeDecodeError, json.JSONDecodeError) as error:
        raise UserError("config.json", str(path), f"not JSON ({error})", "Download the file again.") from None
    if not isinstance(raw, dict):
        raise UserError("config.json", str(path), "not a JSON object", "Download the file again.")
    return raw


def model_config(raw: dict[str, Any]) -> ModelConfig:
    """The ModelConfig that a raw config.json describes; UserError for what finback does not run."""
    family = raw.get("model_type")
    if family not in ARCHITECTURES:
        own_code = " and brings its own code, which finback never runs" if "auto_map" in raw else ""
        problem = f"not a family that finback knows{own_code}"
        raise UserError("config.json model_type", family, problem, did_you_mean(str(family), ARCHITECTURES))
    fields = Fields(raw)
    fields.demand("hidden_act", "silu")
    fields.demand("mlp_bias", False)
    common: dict[str, Any] = {name: fields.integer(name) for name in SIZES} | {
        "max_position_embeddings": fields.integer("max_position_embeddings", 4096),
        "rms_norm_eps": fields.number("rms_norm_eps", 1e-6),
        "tie_word_embeddings": fields.flag("tie_word_embeddings", False),
        "initializer_range": fields.number("initializer_range", 0.02),
    }
    theta, scaling = _rope(fields)
    common |= {"rope_theta": theta, "rope_scaling": scaling}
    family_fields = _latent(fields, family) if family in LATENT else _grouped(fields, family)
    return ModelConfig(**common | family_fields)


def _latent(fields: Fields, family: str) -> dict[str, Any]:
    """What DeepSeek's configs say beyond the common fields."""
    fields.demand("attention_bias", False)
    fields.demand("moe_layer_freq", 1)
    rank = fields.raw.get("q_lora_rank")
    found: dict[str, Any] = {name: fields.integer(name) for name in MLA} | {
        "attention": "mla",
        "q_lora_rank": None if rank is None else fields.integer("q_lora_rank"),
        "rope_interleaved": fields.flag("rope_interleave", True),
    }
    layers, dense = fields.integer("num_hidden_layers"), fields.integer("first_k_dense_replace")
    declared = fields.raw.get("num_mtp_layers") or 0
    mtp = 0 if family == "deepseek_v2" else fields.integer("num_nextn_predict_layers", declared)
    found["num_nextn_predict_layers"] = mtp
    if family in SPARSE:
        found |= _indexer(fields, family)
    if not fields.raw.get("n_routed_experts") or dense >= layers + mtp:
        return found
    found |= {name: fields.integer(name) for name in MOE} | {"first_k_dense_replace": dense}
    found["routed_scaling_factor"] = fields.number("routed_scaling_factor")
    return found | (_v2_gate(fields) if family == "deepseek_v2" else _v3_gate(fields))


def _indexer(fields: Fields, family: str) -> dict[str, Any]:
    """DSA's indexer, one for each layer."""
    # GLM-5 may give several layers one indexer, by any of three fields
    for name, shared in (("indexer_types", "shared"), ("index_topk_pattern", "S")):
        if shared in (fields.raw.get(name) or ()):
            fields.refuse(name, "finback gives each layer an indexer of its own", "Use another checkpoint.")
    fields.demand("index_topk_freq", 1)
    return {name: fields.integer(name) for name in INDEXER} | {"index_rope_interleaved": family == "glm_moe_dsa"}


def _v2_gate(fields: Fields) -> dict[str, Any]:
    """Softmax affinities, chosen greedily or within the best groups; weights are not normalised."""
    fields.demand("scoring_func", "softmax")
    fields.demand("norm_topk_prob", False)
    method = fields.raw.get("topk_method", "greedy")
    if method not in ("greedy", "group_limited_greedy"):
        fields.refuse("topk_method", "V2 has greedy and group_limited_greedy")
    found: dict[str, Any] = {"scoring_func": "softmax", "norm_topk_prob": False}
    return found | ({"n_group": 1, "topk_group": 1} if method == "greedy" else {n: fields.integer(n) for n in GROUPS})


def _v3_gate(fields: Fields) -> dict[str, Any]:
    """Sigmoid affinities with a selection bias."""
    fields.demand("scoring_func", "sigmoid")
    fields.demand("topk_method", "noaux_tc")
    normalised = fields.flag("norm_topk_prob", True)
    return {"scoring_func": "sigmoid", "norm_topk_prob": normalised} | {n: fields.integer(n) for n in GROUPS}


def _grouped(fields: Fields, family: str) -> dict[str, Any]:
    """What the dense families say beyond the common fields."""
    heads = fields.integer("num_attention_heads")
    windows = fields.raw.get("layer_types") or []
    if fields.raw.get("use_sliding_window") or "sliding_attention" in windows:
        fields.refuse("use_sliding_window", "finback attends to the whole context only", "Set it to false.")
    bias: Literal["none", "qkv", "all"] = "all" if fields.flag("attention_bias", False) else "none"
    return {
        "attention": "gqa",
        "num_key_value_heads": fields.integer("num_key_value_heads", heads),
        "head_dim": fields.integer("head_dim", fields.integer("hidden_size") // max(heads, 1)),
        "attention_bias": "qkv" if family == "qwen2" else bias,
        "qk_norm": family == "qwen3",
        "rope_interleaved": False,
    }


def _rope(fields: Fields) -> tuple[float, RopeScaling | None]:
    """Base and scaling, from either spelling."""
    raw = fields.raw
    given = raw.get("rope_parameters") or raw.get("rope_scaling") or {}
    if not isinstance(given, dict):
        fields.refuse("rope_scaling", "not an object")
    rope = Fields({name: raw.get(name) for name in ("rope_theta", "partial_rotary_factor")} | given)
    theta = rope.number("rope_theta", 10000.0)
    if theta <= 1:
        rope.refuse("rope_theta", "not above 1")
    if rope.number("partial_rotary_factor", 1.0) != 1.0:
        rope.refuse("partial_rotary_factor", "finback rotates whole heads", "Use another checkpoint.")
    kind = given.get("rope_type") or given.get("type") or "default"
    window = given.get("original_max_position_embeddings") or raw.get("max_position_embeddings", 4096)
    if kind == "default":
        return theta, None
    try:
        if kind == "linear":
            return theta, LinearRope(float(given["factor"]))
        if kind == "llama3":
            return theta, Llama3Rope(
                float(given["factor"]), float(given["low_freq_factor"]), float(given["high_freq_factor"]), int(window)
            )
        if kind == "yarn" and given.get("truncate", True):
            return theta, _yarn(given, int(window))
    except (KeyError, TypeError, ValueError) as error:
        raise UserError("config.json rope_scaling", given, f"bad or missing {error}", "Correct it.") from None
    raise UserError(
        "config.json rope_scaling", given, "not a scaling that finback knows", "It knows yarn, llama3 and linear."
    )


def _yarn(given: dict[str, Any], window: int) -> Yarn:
    """mscale and mscale_all_dim count for cos and sin only when both are there (transformers' rule)."""
    both = given.get("mscale") and given.get("mscale_all_dim")
    factor = given.get("attention_factor")
    all_dim = float(given.get("mscale_all_dim") or 0.0)
    if factor is None and not both and all_dim:
        factor = Yarn(factor=float(given["factor"]), mscale_all_dim=0.0).gain
    return Yarn(
        factor=float(given["factor"]),
        original_max_position_embeddings=window,
        beta_fast=float(given.get("beta_fast") or 32),
        beta_slow=float(given.get("beta_slow") or 1),
        mscale=float(given["mscale"]) if both else 1.0,
        mscale_all_dim=all_dim,
        attention_factor=None if factor is None else float(factor),
    )


def raw_config(config: ModelConfig, dtype: str) -> dict[str, Any]:
    """The config.json of a model, in the releases' spelling; `model_config` reads it back to the same ModelConfig."""
    family = family_of(config)
    raw: dict[str, Any] = {
        "architectures": [ARCHITECTURES[family]],
        "model_type": family,
        "torch_dtype": dtype,
        "hidden_act": "silu",
        "attention_dropout": 0.0,
        "use_cache": True,
        "rope_theta": config.rope_theta,
    }
    raw |= {name: getattr(config, name) for name in COMMON}
    if config.rope_scaling is not None:
        raw["rope_scaling"] = _raw_rope(config.rope_scaling)
    if config.attention == "gqa":
        raw |= {"num_key_value_heads": config.num_key_value_heads, "head_dim": config.head_dim}
        return raw | ({} if family == "qwen2" else {"attention_bias": config.attention_bias == "all"})
    raw |= {name: getattr(config, name) for name in ("q_lora_rank", *MLA, *MOE, *GATE, *LAYERS)}
    raw |= {
        "num_key_value_heads": config.num_attention_heads,
        "attention_bias": False,
        "moe_layer_freq": 1,
        "rope_interleave": config.rope_interleaved,
        "topk_method": "group_limited_greedy" if family == "deepseek_v2" else "noaux_tc",
    }
    if family in SPARSE:
        raw |= {name: getattr(config, name) for name in INDEXER}
    if not config.n_routed_experts:
        # the format has no dense models: every layer is among the dense first ones
        every = config.num_hidden_layers + config.num_nextn_predict_layers
        raw |= {"first_k_dense_replace": every, "n_routed_experts": 1, "num_experts_per_tok": 1}
        raw |= {"moe_intermediate_size": config.intermediate_size, "n_shared_experts": 1}
    return raw


def family_of(config: ModelConfig) -> str:
    """The model_type under which transformers knows such a model; UserError when it knows none."""
    if config.attention == "mla":
        softmax = config.n_routed_experts and config.scoring_func == "softmax"
        if softmax and (config.norm_topk_prob or config.num_nextn_predict_layers):
            problem = "DeepSeek-V2 has neither normalised weights nor MTP"
            raise UserError("model.scoring_func", "softmax", problem, "Train with sigmoid affinities.")
        if softmax and not config.rope_interleaved:
            raise UserError("model.rope_interleaved", False, "DeepSeek-V2 is interleaved", "Use sigmoid affinities.")
        if config.index_topk:
            if softmax:
                raise UserError("model.scoring_func", "softmax", "models with an indexer use sigmoid", "Use it.")
            return "glm_moe_dsa" if config.index_rope_interleaved else "deepseek_v32"
        return "deepseek_v2" if softmax else "deepseek_v3"
    if config.qk_norm:
        if config.attention_bias == "qkv":
            raise UserError("model.attention_bias", "qkv", "no family has it with qk_norm", "Use none or all.")
        return "qwen3"
    return "qwen2" if config.attention_bias == "qkv" else "llama"


def _raw_rope(scaling: RopeScaling) -> dict[str, Any]:
    raw: dict[str, Any] = asdict(scaling)
    if isinstance(scaling, Llama3Rope):
        return {"rope_type": "llama3"} | raw
    kind = "linear" if isinstance(scaling, LinearRope) else "yarn"
    if isinstance(scaling, Yarn):
        says_more = scaling.attention_factor is not None or (not scaling.mscale_all_dim and scaling.mscale != 1.0)
        del raw["attention_factor"]
        raw |= {"attention_factor": scaling.gain} if says_more else {}
    return {"type": kind, "rope_type": kind} | raw
