"""DeepSeek-V4's config.json to ModelConfig and back, in the release's spelling or transformers'. Does not import torch.

The release lists `compress_ratios`, one for each layer and a 0 for the MTP module; transformers lists `layer_types`.
"""

from typing import Any

from finback.checkpoint.hf_fields import Fields
from finback.checkpoint.hf_rope import read_rope
from finback.config import UserError
from finback.model.config import CSA, HCA, SLIDING, ModelConfig
from finback.model.rope_scaling import Yarn

DEFAULTS = {  # those of transformers' config class, which are V4-Flash's
    "head_dim": 512,
    "q_lora_rank": 1024,
    "n_routed_experts": 256,
    "n_shared_experts": 1,
    "num_experts_per_tok": 6,
    "moe_intermediate_size": 2048,
    "routed_scaling_factor": 1.5,
    "max_position_embeddings": 1048576,
    "sliding_window": 128,
    "o_groups": 8,
    "o_lora_rank": 1024,
    "index_n_heads": 64,
    "index_head_dim": 128,
    "index_topk": 512,
    "hc_mult": 4,
    "hc_sinkhorn_iters": 20,
    "hc_eps": 1e-6,
    "swiglu_limit": 10.0,
    "num_hash_layers": 3,
    "num_nextn_predict_layers": 1,
}
SIZES = ("head_dim", "q_lora_rank", "o_groups", "o_lora_rank", "sliding_window", "hc_mult", "hc_sinkhorn_iters")
EXPERTS = ("n_routed_experts", "n_shared_experts", "num_experts_per_tok", "moe_intermediate_size")
INDEXER = ("index_topk", "index_n_heads", "index_head_dim")
NUMBERS = ("routed_scaling_factor", "hc_eps", "swiglu_limit")
RATES = {CSA: 4, HCA: 128}
# fields that vary in other families, with the values that V4 requires
_V4 = {
    "scoring_func": "sqrtsoftplus",
    "norm_topk_prob": True,
    "n_shared_experts": 1,
    "n_group": 1,
    "first_k_dense_replace": 0,
    "dense_layers": (),
    "norms": "pre",
}


def read_v4(fields: Fields) -> dict[str, Any]:
    """Reads the fields of a V4 config beyond the common ones."""
    for name, wanted in (("attention_bias", False), ("scoring_func", "sqrtsoftplus"), ("norm_topk_prob", True)):
        fields.demand(name, wanted)
    fields.demand("num_key_value_heads", 1)
    fields.demand("n_shared_experts", 1)  # transformers builds one, whatever the file says
    layers = fields.integer("num_hidden_layers")
    kinds, rates = _layers(fields, layers)
    found: dict[str, Any] = {name: fields.integer(name) for name in (*SIZES, *EXPERTS, *INDEXER)}
    found |= {name: fields.number(name) for name in NUMBERS}
    if fields.flag("index_fp4", False) and found["index_head_dim"] & found["index_head_dim"] - 1:
        fields.refuse("index_fp4", "indexers whose width is no power of two have no Hadamard matrix")
    return found | {
        "attention": "compressed",
        "qk_rope_head_dim": _rotated(fields),
        "layer_types": kinds,
        "compress_rate_csa": rates[CSA],
        "compress_rate_hca": rates[HCA],
        "num_hash_layers": _hashed(fields, layers),
        "scoring_func": "sqrtsoftplus",
        "num_nextn_predict_layers": fields.integer("num_nextn_predict_layers"),
        "index_fp4": fields.flag("index_fp4", False),
        **_rope(fields),
    }


def _layers(fields: Fields, layers: int) -> tuple[tuple[str, ...], dict[str, int]]:
    """Returns each layer's kind, by default in V4-Pro's order, and how many tokens an entry of each kind compresses."""
    words = fields.words("layer_types", (SLIDING, CSA, HCA))
    if not words:
        ratios = {0: SLIDING} | {rate: kind for kind, rate in RATES.items()}
        default = [128 if i < 2 or i % 2 == 0 else 4 for i in range(layers)]
        given = fields.integers("compress_ratios", default)
        if not set(given) <= set(ratios):
            fields.refuse("compress_ratios", f"not a list of {', '.join(map(str, ratios))}")
        words = [ratios[n] for n in given]
    if len(words) < layers:
        name = "layer_types" if fields.raw.get("layer_types") else "compress_ratios"
        fields.refuse(name, f"not one for each of {layers} layers")
    named = fields.object("compress_rates")
    old = {CSA: fields.raw.get("compress_rate_csa"), HCA: fields.raw.get("compress_rate_hca")}
    rates = {kind: Fields({kind: old[kind] or named.get(kind)}).integer(kind, rate) for kind, rate in RATES.items()}
    return tuple(words[:layers]), rates


def _hashed(fields: Fields, layers: int) -> int:
    """Returns how many of the first layers route by hashed token ids."""
    words = fields.words("mlp_layer_types", ("hash_moe", "moe"))
    if not words:
        return min(layers, fields.integer("num_hash_layers"))
    count = words.index("moe") if "moe" in words else len(words)
    if "hash_moe" in words[count:]:
        fields.refuse("mlp_layer_types", "has hash_moe above moe", "Use another checkpoint.")
    return min(layers, count)


def _rotated(fields: Fields) -> int:
    """Returns how many dimensions of a head are rotated, given as a number or as a fraction."""
    if fields.raw.get("qk_rope_head_dim") is not None:
        return fields.integer("qk_rope_head_dim")
    return int(fields.integer("head_dim") * fields.number("partial_rotary_factor", 64 / 512))


def _rope(fields: Fields) -> dict[str, Any]:
    """Returns the sliding layers' base, and the others' base and YaRN, whose gain is 1 unless the config sets it."""
    given = fields.object("rope_parameters")
    nested = Fields(given if "compress" in given else {})
    flat = fields.object("rope_scaling") or ({} if nested.raw else given)
    main = nested.object("main") or {"rope_theta": fields.raw.get("rope_theta")}
    local = Fields(main).number("rope_theta", 10000.0)
    base = fields.number("compress_rope_theta", 160000.0)
    given = {"rope_theta": base} | (nested.object("compress") or flat | {"rope_theta": base})
    if (given.get("rope_type") or given.get("type")) == "yarn":
        given = {"attention_factor": 1.0} | given
    rope = read_rope(fields, given)
    return {name: rope[name] for name in ("rope_theta", "rope_scaling")} | {"local_rope_theta": local}


def raw_v4(config: ModelConfig) -> dict[str, Any]:
    """Returns the fields of a V4 config.json beyond the common ones, in the release's spelling."""
    c = config
    raw: dict[str, Any] = {name: getattr(c, name) for name in (*SIZES, *EXPERTS, *INDEXER, *NUMBERS)}
    raw |= {
        name: getattr(c, name) for name in ("scoring_func", "norm_topk_prob", "qk_rope_head_dim", "num_hash_layers")
    }
    raw |= {"index_fp4": True} if c.index_fp4 else {}  # finback's own key
    raw |= {
        "num_key_value_heads": 1,
        "attention_bias": False,
        "num_nextn_predict_layers": c.num_nextn_predict_layers,
        "topk_method": "noaux_tc",
        "rope_theta": c.local_rope_theta,
        "compress_rope_theta": c.rope_theta,
        **dict.fromkeys(("bos_token_id", "eos_token_id", "pad_token_id")),
    }
    rates = {CSA: c.compress_rate_csa, HCA: c.compress_rate_hca}
    kinds = list(c.layer_types[: c.num_hidden_layers])
    if rates == RATES:
        raw["compress_ratios"] = [rates.get(kind, 0) for kind in kinds] + [0] * c.num_nextn_predict_layers
    else:
        raw |= {"layer_types": kinds, "compress_rates": rates}
    if isinstance(c.rope_scaling, Yarn):
        yarn = c.rope_scaling
        names = "factor", "beta_fast", "beta_slow", "original_max_position_embeddings"
        raw["rope_scaling"] = {"type": "yarn", "rope_type": "yarn"} | {name: getattr(yarn, name) for name in names}
        raw["rope_scaling"] |= {} if yarn.gain == 1.0 else {"attention_factor": yarn.gain}
        raw["rope_scaling"] |= {} if yarn.truncate else {"truncate": False}
    return raw


def check_v4(config: ModelConfig) -> str:
    """Returns the model_type of compressed attention; UserError where another field differs from V4's."""
    for name, wanted in _V4.items():
        if getattr(config, name) != wanted:
            problem = f"the only family with compressed attention, V4, has {wanted!r}"
            raise UserError(f"model.{name}", getattr(config, name), problem, "Export a model of another shape.")
    for name in ("n_routed_experts", "hc_mult", "swiglu_limit"):
        if not getattr(config, name):
            problem = "the only family with compressed attention, V4, has it in every layer"
            raise UserError(f"model.{name}", getattr(config, name), problem, "Export a model of another shape.")
    return "deepseek_v4"
