"""Hugging Face `config.json` to ModelConfig and back, for the families finback runs. No torch here.

What finback would have to guess or could not run is refused with the field's name.
"""

import json
from pathlib import Path
from typing import Any

from finback.checkpoint.hf_families import FAMILIES, FULL, GROUPS, INDEXER, MLA, MOE, REFUSED, SLIDING
from finback.checkpoint.hf_fields import Fields
from finback.checkpoint.hf_rope import raw_rope, read_rope
from finback.checkpoint.hf_v4 import check_v4, raw_v4
from finback.config import UserError, did_you_mean
from finback.model.config import ModelConfig
from finback.model.rope_scaling import LongRope

# fields that are called alike in a config.json and in ModelConfig
SIZES = ("vocab_size", "hidden_size", "num_hidden_layers", "num_attention_heads", "intermediate_size")
COMMON = (*SIZES, "max_position_embeddings", "rms_norm_eps", "tie_word_embeddings", "initializer_range")
GATE = (*GROUPS, "scoring_func", "norm_topk_prob", "routed_scaling_factor")
LAYERS = ("first_k_dense_replace", "num_nextn_predict_layers")
PARTLY_ROTATED = ("glm4_moe", "phi3")


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
    name = raw.get("model_type")
    if not isinstance(name, str) or name not in FAMILIES:
        raise _unknown(raw, name)
    family = FAMILIES[name]
    if name == "deepseek_v4":  # which has no dense layers
        raw = {"intermediate_size": raw.get("moe_intermediate_size", family.defaults["moe_intermediate_size"])} | raw
    fields = Fields(raw, family.defaults)
    fields.demand("hidden_act", "silu")
    fields.demand("mlp_bias", False)
    common: dict[str, Any] = {name: fields.integer(name) for name in SIZES} | {
        "max_position_embeddings": fields.integer("max_position_embeddings", 4096),
        "rms_norm_eps": fields.number("rms_norm_eps", 1e-6),
        "tie_word_embeddings": fields.flag("tie_word_embeddings", False),
        "initializer_range": fields.number("initializer_range", 0.02),
    }
    # which have one for each kind of layers
    found = {} if name in ("olmo3", "deepseek_v4") else read_rope(fields)
    if found.get("partial_rotary_factor", 1.0) != 1.0 and name not in PARTLY_ROTATED:
        fields.refuse("partial_rotary_factor", f"{name} rotates whole heads", "Use another checkpoint.")
    return ModelConfig(**common | found | family.read(fields))


def _unknown(raw: dict[str, Any], name: Any) -> UserError:
    """The error of a family that finback does not run, with the reason where it is known."""
    reason = REFUSED.get(name) if isinstance(name, str) else None
    if reason is not None:
        return UserError("config.json model_type", name, f"not run: {reason}", f"finback runs {', '.join(FAMILIES)}.")
    own_code = " and brings its own code, which finback never runs" if "auto_map" in raw else ""
    problem = f"not a family that finback knows{own_code}"
    return UserError("config.json model_type", name, problem, did_you_mean(str(name), FAMILIES))


def raw_config(config: ModelConfig, dtype: str) -> dict[str, Any]:
    """The config.json of a model, in the releases' spelling; `model_config` reads it back to the same ModelConfig."""
    family = family_of(config)
    raw: dict[str, Any] = {
        "architectures": [FAMILIES[family].architecture],
        "model_type": family,
        "torch_dtype": dtype,
        "hidden_act": "silu",
        "attention_dropout": 0.0,
        "use_cache": True,
        "rope_theta": config.rope_theta,
    }
    raw |= {name: getattr(config, name) for name in COMMON}
    if config.attention == "compressed":
        return {name: value for name, value in raw.items() if name != "intermediate_size"} | raw_v4(config)
    if config.rope_scaling is not None:
        raw["rope_scaling"] = raw_rope(config.rope_scaling)
    return raw | (_raw_latent(config, family) if config.attention == "mla" else _raw_grouped(config, family))


def _raw_latent(config: ModelConfig, family: str) -> dict[str, Any]:
    raw: dict[str, Any] = {name: getattr(config, name) for name in ("q_lora_rank", *MLA, *MOE, *GATE, *LAYERS)}
    raw |= {
        "num_key_value_heads": config.num_attention_heads,
        "attention_bias": False,
        "moe_layer_freq": 1,
        "rope_interleave": config.rope_interleaved,
        "topk_method": "group_limited_greedy" if family == "deepseek_v2" else "noaux_tc",
    }
    if config.index_topk:
        raw |= {name: getattr(config, name) for name in INDEXER}
    if family == "glm4_moe_lite":
        layers = range(config.num_hidden_layers)
        raw["mlp_layer_types"] = ["sparse" if config.is_moe(layer) else "dense" for layer in layers]
    if not config.n_routed_experts:
        # the format has no dense models: every layer is among the dense first ones
        every = config.num_hidden_layers + config.num_nextn_predict_layers
        raw |= {"first_k_dense_replace": every, "n_routed_experts": 1, "num_experts_per_tok": 1}
        raw |= {"moe_intermediate_size": config.intermediate_size, "n_shared_experts": 1}
    return raw


def _raw_grouped(config: ModelConfig, family: str) -> dict[str, Any]:
    layers = range(config.num_hidden_layers)
    raw: dict[str, Any] = {"num_key_value_heads": config.num_key_value_heads, "head_dim": config.head_dim}
    if family in ("smollm3", "olmo2", "olmo3"):  # whose classes have ids of their own vocabularies as defaults
        raw |= dict.fromkeys(("bos_token_id", "eos_token_id", "pad_token_id"))
    if family not in ("qwen2", "mistral"):
        raw["attention_bias"] = config.attention_bias != "none"
    if family == "phi3":
        window = getattr(config.rope_scaling, "original_max_position_embeddings", config.max_position_embeddings)
        raw |= {"partial_rotary_factor": config.partial_rotary_factor, "original_max_position_embeddings": window}
        raw |= dict.fromkeys(("bos_token_id", "eos_token_id", "pad_token_id"))
    if family in ("phi3", "mistral", "olmo3", "qwen3_moe") or config.sliding_window is not None:
        raw["sliding_window"] = config.sliding_window
    if config.sliding_window is not None and family.startswith(("qwen", "smollm")):
        raw["use_sliding_window"] = True
    if config.sliding_window is not None and family not in ("mistral", "qwen3_moe", "phi3"):
        raw["layer_types"] = list(config.layer_types) or [SLIDING] * len(layers)
    if family == "smollm3":
        raw["no_rope_layers"] = [int(layer not in config.nope_layers) for layer in layers]
    if family == "qwen3_moe":
        raw |= {"num_experts": config.n_routed_experts, "num_experts_per_tok": config.num_experts_per_tok}
        raw |= {name: getattr(config, name) for name in ("moe_intermediate_size", "norm_topk_prob")}
        raw |= {"decoder_sparse_step": 1, "mlp_only_layers": [n for n in layers if not config.is_moe(n)]}
    if family == "glm4_moe":
        raw |= {name: getattr(config, name) for name in (*MOE, *GATE, *LAYERS, "partial_rotary_factor")}
        raw |= {"use_qk_norm": config.qk_norm, "topk_method": "noaux_tc"}
    if family == "olmo3":
        full = {"rope_type": "default"} | (raw_rope(config.rope_scaling) if config.rope_scaling else {})
        truncate = full.pop("truncate", True)
        local = config.rope_theta if config.local_rope_theta is None else config.local_rope_theta
        raw["rope_parameters"] = {
            FULL: full | {"rope_theta": config.rope_theta},
            SLIDING: {"rope_type": "default", "rope_theta": local},
        } | ({} if truncate else {"truncate": False})
    return raw


def family_of(config: ModelConfig) -> str:
    """The model_type under which transformers knows such a model; UserError when it knows none."""
    if config.attention == "compressed":
        return check_v4(config)
    for name, plain in (("hc_mult", 0), ("swiglu_limit", None), ("num_hash_layers", 0)):
        if getattr(config, name) != plain:
            raise _no_family(config, name, "V4 alone has it, with compressed attention")
    if config.n_routed_experts and config.scoring_func == "sqrtsoftplus":
        raise _no_family(config, "scoring_func", "V4 alone has it, with compressed attention")
    if config.attention == "mla":
        return _latent_family(config)
    if config.n_routed_experts:
        return _experts_family(config)
    for name, is_plain in (
        ("num_nextn_predict_layers", not config.num_nextn_predict_layers),
        ("dense_layers", not config.dense_layers),
    ):
        if not is_plain:
            raise _no_family(config, name, "no dense family has it")
    if config.partial_rotary_factor != 1.0 or isinstance(config.rope_scaling, LongRope):
        return _long_family(config)
    if config.norms == "post":
        return _post_norm_family(config)
    if config.local_rope_theta is not None:
        raise _no_family(config, "local_rope_theta", "no family has it with norms before attention")
    if config.nope_layers:
        if config.qk_norm or config.attention_bias == "qkv":
            raise _no_family(config, "nope_layers", "no family has them with qk_norm or biases of queries alone")
        return "smollm3"
    if config.qk_norm:
        if config.attention_bias == "qkv":
            raise UserError("model.attention_bias", "qkv", "no family has it with qk_norm", "Use none or all.")
        if config.qk_norm_over != "head":
            raise _no_family(config, "qk_norm_over", "no family has it with norms before attention")
        return "qwen3"
    if config.attention_bias == "qkv":
        return "qwen2"
    if config.sliding_window is None:
        return "llama"
    if config.layer_types or config.attention_bias != "none":
        raise _no_family(config, "sliding_window", "no family has it in some layers, or with biases")
    return "mistral"


def _latent_family(config: ModelConfig) -> str:
    softmax = config.n_routed_experts and config.scoring_func == "softmax"
    if softmax and (config.norm_topk_prob or config.num_nextn_predict_layers):
        problem = "DeepSeek-V2 has neither normalised weights nor MTP"
        raise UserError("model.scoring_func", "softmax", problem, "Train with sigmoid affinities.")
    if softmax and not config.rope_interleaved:
        raise UserError("model.rope_interleaved", False, "DeepSeek-V2 is interleaved", "Use sigmoid affinities.")
    if config.norms != "pre":
        raise _no_family(config, "norms", "DeepSeek's stand before attention")
    if config.index_topk:
        if softmax:
            raise UserError("model.scoring_func", "softmax", "models with an indexer use sigmoid", "Use it.")
        if config.dense_layers:
            raise _no_family(config, "dense_layers", "no family has them with an indexer")
        return "glm_moe_dsa" if config.index_rope_interleaved else "deepseek_v32"
    if softmax:
        return "deepseek_v2"
    return "glm4_moe_lite" if config.dense_layers else "deepseek_v3"


def _experts_family(config: ModelConfig) -> str:
    """Of experts with grouped-query attention."""
    softmax = config.scoring_func == "softmax"
    absent: dict[str, Any] = {"norms": "pre", "nope_layers": (), "local_rope_theta": None, "qk_norm_over": "head"}
    if softmax:
        absent |= {"n_shared_experts": 0, "n_group": 1, "routed_scaling_factor": 1.0, "partial_rotary_factor": 1.0}
        absent |= {"num_nextn_predict_layers": 0, "qk_norm": True, "layer_types": ()}
    else:
        absent |= {"sliding_window": None, "dense_layers": ()}
    for name, value in absent.items():
        if getattr(config, name) != value:
            raise _no_family(config, name, f"the family of such experts has {value!r}")
    if config.attention_bias == ("qkv" if softmax else "all"):
        raise _no_family(config, "attention_bias", "the family of such experts has another")
    return "qwen3_moe" if softmax else "glm4_moe"


def _long_family(config: ModelConfig) -> str:
    """Of dense models with partial rotation or LongRoPE."""
    plain = {"norms": "pre", "nope_layers": (), "local_rope_theta": None, "qk_norm": False, "layer_types": ()}
    for name, value in (plain | {"attention_bias": "none"}).items():
        if getattr(config, name) != value:
            raise _no_family(config, name, f"Phi-3, whose rotation this is, has {value!r}")
    if not isinstance(config.rope_scaling, LongRope | None):
        raise _no_family(config, "rope_scaling", "Phi-3, whose partial rotation this is, has LongRoPE or none")
    return "phi3"


def _post_norm_family(config: ModelConfig) -> str:
    if not config.qk_norm or config.qk_norm_over != "projection" or config.nope_layers:
        raise _no_family(config, "norms", "OLMo 2 has them with qk_norm over the whole projection")
    if config.attention_bias == "qkv":
        raise _no_family(config, "attention_bias", "OLMo 2 has none or all")
    return "olmo2" if config.sliding_window is None else "olmo3"


def _no_family(config: ModelConfig, name: str, problem: str) -> UserError:
    return UserError(f"model.{name}", getattr(config, name), problem, "Export a model of another shape.")
