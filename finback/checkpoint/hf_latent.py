"""Config fields of latent attention (MLA) and of DeepSeek's gates. Does not import torch."""

from collections.abc import Callable
from typing import Any

from finback.checkpoint.hf_fields import Fields

MLA = ("kv_lora_rank", "qk_nope_head_dim", "qk_rope_head_dim", "v_head_dim")
MOE = ("n_routed_experts", "n_shared_experts", "num_experts_per_tok", "moe_intermediate_size")
GROUPS = ("n_group", "topk_group")
INDEXER = ("index_topk", "index_n_heads", "index_head_dim")
Found = dict[str, Any]


def latent(fields: Fields, is_moe: Callable[[Fields, Found], Found], mtp: bool, halves: bool = True) -> Found:
    """Reads DeepSeek's fields; `is_moe` reads the experts' fields. halves: rope_interleave may be false."""
    if not halves:
        fields.demand("rope_interleave", True)
    fields.demand("attention_bias", False)
    fields.demand("moe_layer_freq", 1)
    rank = fields.raw.get("q_lora_rank")
    found: Found = {name: fields.integer(name) for name in MLA} | {
        "attention": "mla",
        "q_lora_rank": None if rank is None else fields.integer("q_lora_rank"),
        "rope_interleaved": fields.flag("rope_interleave", True),
    }
    found["num_nextn_predict_layers"] = mtp_depth(fields) if mtp else 0
    return found | is_moe(fields, found)


def mtp_depth(fields: Fields) -> int:
    """Returns the number of multi-token prediction layers, under either of its names."""
    return fields.integer("num_nextn_predict_layers", fields.raw.get("num_mtp_layers") or 0)


def _experts(fields: Fields, dense: int, found: Found) -> Found:
    """Reads the experts' counts and sizes; empty where the first `dense` layers are all layers."""
    every = fields.integer("num_hidden_layers") + found.get("num_nextn_predict_layers", 0)
    if not fields.raw.get("n_routed_experts") or dense >= every:
        return {}
    sizes = {name: fields.integer(name) for name in MOE} | {"first_k_dense_replace": dense}
    return sizes | {"routed_scaling_factor": fields.number("routed_scaling_factor")}


def v2_gate(fields: Fields, found: Found) -> Found:
    """Reads V2's gate: softmax affinities, greedy or group-limited top-k, weights not normalised."""
    experts = _experts(fields, fields.integer("first_k_dense_replace"), found)
    if not experts:
        return {}
    fields.demand("scoring_func", "softmax")
    fields.demand("norm_topk_prob", False)
    method = fields.raw.get("topk_method", "greedy")
    if method not in ("greedy", "group_limited_greedy"):
        fields.refuse("topk_method", "V2 knows greedy and group_limited_greedy")
    groups = {"n_group": 1, "topk_group": 1} if method == "greedy" else {n: fields.integer(n) for n in GROUPS}
    return experts | {"scoring_func": "softmax", "norm_topk_prob": False} | groups


def v3_gate(fields: Fields, found: Found, dense: int | None = None) -> Found:
    """Reads V3's gate: sigmoid affinities with a selection bias."""
    first = fields.integer("first_k_dense_replace") if dense is None else dense
    experts = _experts(fields, first, found)
    if not experts:
        return {}
    fields.demand("scoring_func", "sigmoid")
    fields.demand("topk_method", "noaux_tc")
    normalised = fields.flag("norm_topk_prob", True)
    groups = {n: fields.integer(n) for n in GROUPS}
    return experts | {"scoring_func": "sigmoid", "norm_topk_prob": normalised} | groups


def sparse(fields: Fields, interleaved: bool) -> Found:
    """Reads DSA's indexer, in addition to V3's fields; several layers may share one in GLM-5, the family that is `interleaved`."""
    indexer: Found = {name: fields.integer(name) for name in INDEXER} | {"index_rope_interleaved": interleaved}
    if interleaved:
        indexer["shared_indexers"] = shared_layers(fields)
    dense = list(range(fields.integer("first_k_dense_replace")))
    return latent(fields, lambda f, found: listed_gate(f, found, dense), mtp=True, halves=False) | indexer


def shared_layers(fields: Fields) -> tuple[int, ...]:
    """Layers that take another's selection, by the first of GLM-5's three ways of saying so that is there."""
    kinds = "full", "shared"
    if fields.raw.get("indexer_types") is not None:
        types = fields.words("indexer_types", kinds)
    elif (pattern := fields.raw.get("index_topk_pattern")) is not None:
        spelled = dict(zip("FS", kinds, strict=True)) if isinstance(pattern, str) else {}
        types = [spelled.get(letter, letter) for letter in pattern]
        if not set(types) <= set(kinds):
            fields.refuse("index_topk_pattern", "not made of F and S")
    else:
        every, first = max(fields.integer("index_topk_freq", 1), 1), fields.integer("index_skip_topk_offset", 2)
        layers = range(fields.integer("num_hidden_layers"))
        types = [kinds[max(layer - first + 1, 0) % every > 0] for layer in layers]
    return tuple(layer for layer, kind in enumerate(types) if kind == "shared")


def listed_gate(fields: Fields, found: Found, dense: list[int]) -> Found:
    """Reads V3's gate with a list of each layer's kind; without a list, the layers in `dense` have no experts."""
    kinds = fields.words("mlp_layer_types", ("dense", "sparse"))
    first, further = first_run([i for i, kind in enumerate(kinds) if kind == "dense"] if kinds else dense)
    return v3_gate(fields, found, first) | {"dense_layers": further}


def first_run(dense: list[int]) -> tuple[int, tuple[int, ...]]:
    """Returns how many of the first layers are dense, and the indices of the other dense layers."""
    first = next((i for i, layer in enumerate(sorted(dense)) if i != layer), len(dense))
    return first, tuple(sorted(dense)[first:])
