"""Chooses the transformers family that a model is exported as, or says why none fits. Does not import torch."""

from typing import Any

from finback.checkpoint import names
from finback.checkpoint.hf_v4 import check_v4
from finback.config import UserError
from finback.model.config import ModelConfig
from finback.model.rope_scaling import LongRope


def family_of(config: ModelConfig) -> str:
    """Returns transformers' model_type for such a model; UserError when none fits."""
    if config.attention == "compressed":
        return check_v4(config)
    if config.attention_sinks or config.swiglu_alpha is not None:
        return _gpt_oss_family(config)
    for name, plain in (("hc_mult", 0), ("swiglu_limit", None), ("num_hash_layers", 0)):
        if getattr(config, name) != plain:
            raise _no_family(config, name, "only V4 has it, with compressed attention")
    if config.n_routed_experts and config.scoring_func == "sqrtsoftplus":
        raise _no_family(config, "scoring_func", "only V4 has it, with compressed attention")
    if config.attention == "mla":
        return _latent_family(config)
    if config.norms == "both" or config.norm_offset or config.scale_embeddings or config.activation != "silu":
        return _gemma_family(config)
    if config.query_pre_attn_scalar is not None:
        raise _no_family(config, "query_pre_attn_scalar", "only Gemma has it")
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
            raise _no_family(config, "nope_layers", "no family has them with qk_norm or attention_bias 'qkv'")
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
        raise _no_family(config, "sliding_window", "no such family has it in some layers only, or with biases")
    return "mistral"


def _latent_family(config: ModelConfig) -> str:
    softmax = config.n_routed_experts and config.scoring_func == "softmax"
    if softmax and (config.norm_topk_prob or config.num_nextn_predict_layers):
        problem = "DeepSeek-V2 has neither normalised weights nor MTP"
        raise UserError("model.scoring_func", "softmax", problem, "Train with sigmoid affinities.")
    if softmax and not config.rope_interleaved:
        raise UserError("model.rope_interleaved", False, "DeepSeek-V2 is interleaved", "Use sigmoid affinities.")
    if config.norms != "pre":
        raise _no_family(config, "norms", "DeepSeek's families normalise before attention and feed-forward")
    if config.index_topk:
        if softmax:
            raise UserError("model.scoring_func", "softmax", "models with an indexer use sigmoid", "Use it.")
        if config.dense_layers:
            raise _no_family(config, "dense_layers", "no family has them with an indexer")
        if not config.rope_interleaved:
            raise _no_family(config, "rope_interleaved", "families with an indexer rotate neighbouring pairs")
        if config.shared_indexers and not config.index_rope_interleaved:
            raise _no_family(config, "shared_indexers", "GLM-5 alone has them, with index_rope_interleaved")
        return "glm_moe_dsa" if config.index_rope_interleaved else "deepseek_v32"
    if softmax:
        return "deepseek_v2"
    return "glm4_moe_lite" if config.dense_layers else "deepseek_v3"


def _experts_family(config: ModelConfig) -> str:
    """The family of a model with experts and grouped-query attention."""
    if names.is_mixtral(config):
        return _mixtral_family(config)
    softmax = config.scoring_func == "softmax"
    absent: dict[str, Any] = {"norms": "pre", "nope_layers": (), "local_rope_theta": None, "qk_norm_over": "head"}
    if softmax:
        absent |= {"n_shared_experts": 0, "n_group": 1, "routed_scaling_factor": 1.0, "partial_rotary_factor": 1.0}
        absent |= {"num_nextn_predict_layers": 0, "qk_norm": True, "layer_types": ()}
    else:
        absent |= {"sliding_window": None, "dense_layers": ()}
    _demand(config, absent, "the family with such experts")
    if config.attention_bias == ("qkv" if softmax else "all"):
        raise _no_family(config, "attention_bias", "the family with such experts has other biases")
    return "qwen3_moe" if softmax else "glm4_moe"


def _mixtral_family(config: ModelConfig) -> str:
    plain: dict[str, Any] = {"n_shared_experts": 0, "n_group": 1, "routed_scaling_factor": 1.0, "norm_topk_prob": True}
    plain |= {"partial_rotary_factor": 1.0, "num_nextn_predict_layers": 0, "layer_types": (), "nope_layers": ()}
    plain |= {"first_k_dense_replace": 0, "dense_layers": (), "local_rope_theta": None, "attention_bias": "none"}
    _demand(config, plain, "the family with such experts")
    return "mixtral"


def _gpt_oss_family(config: ModelConfig) -> str:
    wanted: dict[str, Any] = {"attention": "gqa", "attention_sinks": True, "scoring_func": "softmax", "norms": "pre"}
    wanted |= {"norm_topk_prob": True, "qk_norm": False, "partial_rotary_factor": 1.0, "nope_layers": ()}
    wanted |= {"local_rope_theta": None, "first_k_dense_replace": 0, "dense_layers": (), "n_group": 1, "hc_mult": 0}
    wanted |= {"routed_scaling_factor": 1.0, "num_nextn_predict_layers": 0, "num_hash_layers": 0}
    wanted |= {"query_pre_attn_scalar": None, "scale_embeddings": False}
    _demand(config, wanted, "the closest family, gpt-oss,")
    if config.swiglu_alpha is None or config.attention_bias == "qkv":
        name = "swiglu_alpha" if config.swiglu_alpha is None else "attention_bias"
        raise _no_family(config, name, "the closest family, gpt-oss, has another value")
    return "gpt_oss"


def _gemma_family(config: ModelConfig) -> str:
    wanted: dict[str, Any] = {"norms": "both", "norm_offset": True, "scale_embeddings": True, "activation": "gelu_tanh"}
    wanted |= {"qk_norm": True, "qk_norm_over": "head", "partial_rotary_factor": 1.0, "nope_layers": ()}
    wanted |= {"n_routed_experts": 0, "num_nextn_predict_layers": 0}
    _demand(config, wanted, "the closest family, Gemma 3,")
    if config.attention_bias == "qkv":
        raise _no_family(config, "attention_bias", "Gemma 3 has none or all")
    _demand_bases(config)
    return "gemma3_text"


def _long_family(config: ModelConfig) -> str:
    """The family of a dense model with partial rotation or LongRoPE."""
    plain: dict[str, Any] = {"norms": "pre", "nope_layers": (), "local_rope_theta": None, "qk_norm": False}
    plain |= {"layer_types": (), "attention_bias": "none"}
    _demand(config, plain, "the only family with this rotation, Phi-3,")
    if not isinstance(config.rope_scaling, LongRope | None):
        raise _no_family(config, "rope_scaling", "the only family with partial rotation, Phi-3, has LongRoPE or none")
    return "phi3"


def _post_norm_family(config: ModelConfig) -> str:
    if not config.qk_norm or config.qk_norm_over != "projection" or config.nope_layers:
        raise _no_family(config, "norms", "OLMo 2 has them with qk_norm over the whole projection")
    if config.attention_bias == "qkv":
        raise _no_family(config, "attention_bias", "OLMo 2 has none or all")
    if config.sliding_window is None:
        return "olmo2"
    _demand_bases(config)
    return "olmo3"


def _demand_bases(config: ModelConfig) -> None:
    """Raises UserError where sliding layers are scaled as the full ones are: no such family scales sliding layers."""
    if config.rope_scaling is not None and config.sliding_window is not None and config.local_rope_theta is None:
        raise _no_family(config, "local_rope_theta", "families of this shape do not scale sliding layers")


def _demand(config: ModelConfig, wanted: dict[str, Any], who: str) -> None:
    """Raises UserError for the first field whose value is not the family's."""
    for name, value in wanted.items():
        if getattr(config, name) != value:
            raise _no_family(config, name, f"{who} has {value!r}")


def _no_family(config: ModelConfig, name: str, problem: str) -> UserError:
    return UserError(f"model.{name}", getattr(config, name), problem, "Export a model of another shape.")
