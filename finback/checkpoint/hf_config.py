"""Hugging Face `config.json` to ModelConfig and back, for the supported families. Does not import torch.

A field that finback would have to guess or cannot run is refused by name.
"""

import json
from pathlib import Path
from typing import Any

from finback.checkpoint.hf_export_as import family_of
from finback.checkpoint.hf_families import FAMILIES, REFUSED
from finback.checkpoint.hf_fields import Fields
from finback.checkpoint.hf_grouped import FULL, SLIDING
from finback.checkpoint.hf_latent import GROUPS, INDEXER, MLA, MOE
from finback.checkpoint.hf_rope import raw_rope, read_rope
from finback.checkpoint.hf_v4 import raw_v4
from finback.config import UserError, did_you_mean
from finback.model.config import ModelConfig

# fields with the same name in config.json and ModelConfig
SIZES = ("vocab_size", "hidden_size", "num_hidden_layers", "num_attention_heads", "intermediate_size")
COMMON = (*SIZES, "max_position_embeddings", "rms_norm_eps", "tie_word_embeddings", "initializer_range")
GATE = (*GROUPS, "scoring_func", "norm_topk_prob", "routed_scaling_factor")
LAYERS = ("first_k_dense_replace", "num_nextn_predict_layers")
PARTLY_ROTATED = ("glm4_moe", "phi3")


def read_config(folder: Path) -> dict[str, Any]:
    """Reads the raw config.json of a folder."""
    path = folder / "config.json"
    try:
        raw = json.loads(path.read_text(encoding="utf-8"))
    except FileNotFoundError:
        raise UserError("model", str(folder), "has no config.json", "Name the folder that holds config.json.") from None
    except OSError as error:
        problem = f"cannot be read ({error.strerror})"
        raise UserError("config.json", str(path), problem, "Check the file's permissions.") from None
    except (UnicodeDecodeError, json.JSONDecodeError) as error:
        raise UserError("config.json", str(path), f"not JSON ({error})", "Download the file again.") from None
    if not isinstance(raw, dict):
        raise UserError("config.json", str(path), "not a JSON object", "Download the file again.")
    return raw


def model_config(raw: dict[str, Any]) -> ModelConfig:
    """Returns the ModelConfig that a raw config.json describes; UserError for what finback does not run."""
    name = raw.get("model_type")
    if not isinstance(name, str) or name not in FAMILIES:
        raise _unknown(raw, name)
    family = FAMILIES[name]
    if name == "deepseek_v4":  # it has no dense layers, and no intermediate_size
        raw = {"intermediate_size": raw.get("moe_intermediate_size", family.defaults["moe_intermediate_size"])} | raw
    fields = Fields(raw, family.defaults)
    if name != "gemma3_text":
        fields.demand("hidden_act", "silu")
    fields.demand("mlp_bias", False)
    fields.demand("is_causal", True)
    common: dict[str, Any] = {name: fields.integer(name) for name in SIZES} | {
        "max_position_embeddings": fields.integer("max_position_embeddings", 4096),
        "rms_norm_eps": fields.number("rms_norm_eps", 1e-6),
        "tie_word_embeddings": fields.flag("tie_word_embeddings", False),
        "initializer_range": fields.number("initializer_range", 0.02),
    }
    for size in (*SIZES[:4], "max_position_embeddings"):
        if common[size] == 0:
            fields.refuse(size, "not above 0")
    found = {} if family.reads_rope else read_rope(fields)
    if found.get("partial_rotary_factor", 1.0) != 1.0 and name not in PARTLY_ROTATED:
        fields.refuse("partial_rotary_factor", f"{name} rotates whole heads", "Use another checkpoint.")
    return ModelConfig(**common | found | family.read(fields))


def _unknown(raw: dict[str, Any], name: Any) -> UserError:
    """Returns the error for a family that finback does not run, with the reason where it is known."""
    reason = REFUSED.get(name) if isinstance(name, str) else None
    if reason is not None:
        return UserError("config.json model_type", name, f"not run: {reason}", f"finback runs {', '.join(FAMILIES)}.")
    own_code = " and brings its own code, which finback never runs" if "auto_map" in raw else ""
    problem = f"not a supported family{own_code}"
    return UserError("config.json model_type", name, problem, did_you_mean(str(name), FAMILIES))


def raw_config(config: ModelConfig, dtype: str) -> dict[str, Any]:
    """Returns a model's config.json in the releases' spelling; `model_config` reads it back to the same ModelConfig."""
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
    if config.shared_indexers:
        layers = range(config.num_hidden_layers)
        raw["indexer_types"] = ["full" if config.has_indexer(layer) else "shared" for layer in layers]
    if family == "glm4_moe_lite":
        layers = range(config.num_hidden_layers)
        raw["mlp_layer_types"] = ["sparse" if config.is_moe(layer) else "dense" for layer in layers]
    if not config.n_routed_experts:
        # the format has no dense models: all layers count as first dense layers
        every = config.num_hidden_layers + config.num_nextn_predict_layers
        raw |= {"first_k_dense_replace": every, "n_routed_experts": 1, "num_experts_per_tok": 1}
        raw |= {"moe_intermediate_size": config.intermediate_size, "n_shared_experts": 1}
    return raw


def _raw_grouped(config: ModelConfig, family: str) -> dict[str, Any]:
    layers = range(config.num_hidden_layers)
    raw: dict[str, Any] = {"num_key_value_heads": config.num_key_value_heads, "head_dim": config.head_dim}
    if family in ("smollm3", "olmo2", "olmo3"):  # their config classes default to token ids of their own vocabularies
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
    if config.n_routed_experts:
        raw |= _raw_experts(config, family)
    if family in ("gpt_oss", "gemma3_text"):
        kinds: list[str] = list(config.layer_types)
        raw["layer_types"] = kinds or [FULL if config.sliding_window is None else SLIDING] * len(layers)
    if family == "gpt_oss" and config.rope_scaling is None:  # its config class would default to YaRN
        raw["rope_parameters"] = {"rope_type": "default", "rope_theta": config.rope_theta}
    if family == "gemma3_text":
        asked = config.query_pre_attn_scalar
        raw |= {"hidden_activation": "gelu_pytorch_tanh", "query_pre_attn_scalar": asked or config.head_dim}
        raw |= dict.fromkeys(("bos_token_id", "eos_token_id", "pad_token_id"))
    if family in ("olmo3", "gemma3_text"):
        full = {"rope_type": "default"} | (raw_rope(config.rope_scaling) if config.rope_scaling else {})
        truncate = full.pop("truncate", True)
        local = config.rope_theta if config.local_rope_theta is None else config.local_rope_theta
        raw["rope_parameters"] = {
            FULL: full | {"rope_theta": config.rope_theta},
            SLIDING: {"rope_type": "default", "rope_theta": local},
        } | ({} if truncate else {"truncate": False})
    return raw


def _raw_experts(config: ModelConfig, family: str) -> dict[str, Any]:
    """Returns counts and sizes of experts in models with grouped-query attention, under the family's field names."""
    c, dense = config, [layer for layer in range(config.num_hidden_layers) if not config.is_moe(layer)]
    if family == "glm4_moe":
        names = (*MOE, *GATE, *LAYERS, "partial_rotary_factor")
        return {n: getattr(c, n) for n in names} | {"use_qk_norm": c.qk_norm, "topk_method": "noaux_tc"}
    raw: dict[str, Any] = {"num_experts_per_tok": c.num_experts_per_tok}
    if family == "qwen3_moe":
        raw |= {"num_experts": c.n_routed_experts, "decoder_sparse_step": 1, "mlp_only_layers": dense}
        return raw | {name: getattr(c, name) for name in ("moe_intermediate_size", "norm_topk_prob")}
    raw |= {"num_local_experts": c.n_routed_experts, "intermediate_size": c.moe_intermediate_size}
    if family == "gpt_oss":
        raw |= {"swiglu_alpha": c.swiglu_alpha, "swiglu_limit": c.swiglu_limit}
    return raw
