"""DeepSeek-V4's name table: our names and the release's, which differ from those of the other families.

Folders written by transformers use a third spelling and its modules a fourth; `released` accepts both.
"""

import re

from finback.model.config import CSA, SLIDING, ModelConfig

_Names = dict[str, tuple[str, ...]]

_SWA: _Names = {
    "q_down.weight": ("wq_a.weight",),
    "q_norm.weight": ("q_norm.weight",),
    "q_up.weight": ("wq_b.weight",),
    "entry.weight": ("wkv.weight",),
    "entry_norm.weight": ("kv_norm.weight",),
    "out_down.weight": ("wo_a.weight",),
    "out.weight": ("wo_b.weight",),
    "sink": ("attn_sink",),
}
_COMPRESSOR: _Names = {
    "compressor.value.weight": ("compressor.wkv.weight",),
    "compressor.gate.weight": ("compressor.wgate.weight",),
    "compressor.position_bias": ("compressor.ape",),
    "compressor.norm.weight": ("compressor.norm.weight",),
}
_INDEXER: _Names = {"query.weight": ("wq_b.weight",), "weight.weight": ("weights_proj.weight",), **_COMPRESSOR}
_MIXTURE = {"weight": "fn", "bias": "base", "scale": "scale"}
MTP = "mtp."  # the prefix of MTP tensors' names
BIAS = "ffn.gate.bias"
TABLE = "tid2eid"  # the only integer tensor
# stored in fp32 whatever the file's dtype
PRECISE = ("attn_sink", "compressor.ape", BIAS, *(f"_{part}" for part in _MIXTURE.values()))


# matrices that the release stores in FP8 and in FP4
_FP8 = re.compile(r".*\.(attn(\.indexer)?\.(w[qo]_[ab]|wkv)|ffn\.shared_experts\.w[123]|[eh]_proj)\.weight")
_FP4 = re.compile(r".*\.ffn\.experts\.\d+\.w[123]\.weight")


def is_fp8(name: str) -> bool:
    """Whether the release stores a tensor of this name in FP8."""
    return _FP8.fullmatch(name) is not None


def is_fp4(name: str) -> bool:
    """Whether the release stores a tensor of this name in MXFP4."""
    return _FP4.fullmatch(name) is not None


def table(config: ModelConfig) -> dict[str, tuple[str, ...]]:
    """Maps every tensor of a V4 model to the release's tensors that it consists of, in row order."""
    names: _Names = {"embed": ("embed.weight",), "norm.weight": ("norm.weight",)} | _merge("merge.", "hc_head")
    if not config.tie_word_embeddings:
        names["head.weight"] = ("head.weight",)
    for layer in range(config.num_hidden_layers):
        names |= _block(config, f"blocks.{layer}.", f"layers.{layer}.", layer)
    for depth in range(config.num_nextn_predict_layers):
        ours, theirs, layer = f"mtp.{depth}.", f"{MTP}{depth}.", config.num_hidden_layers + depth
        names |= _block(config, ours + "block.", theirs, layer) | _under(ours, theirs, _MTP)
    return names


def _block(config: ModelConfig, ours: str, theirs: str, layer: int) -> _Names:
    kind = config.layer_type(layer)
    names: _Names = {
        "attention_norm.weight": ("attn_norm.weight",),
        "feed_forward_norm.weight": ("ffn_norm.weight",),
        **_merge("attention_mix.", "hc_attn"),
        **_merge("feed_forward_mix.", "hc_ffn"),
        **_under("attention.", "attn.", _SWA | ({} if kind == SLIDING else _COMPRESSOR)),
        **(_under("attention.indexer.", "attn.indexer.", _INDEXER) if kind == CSA else {}),
        "feed_forward.router.weight": ("ffn.gate.weight",),
        **_swiglu("feed_forward.shared.", "ffn.shared_experts."),
    }
    is_hashed = layer < config.num_hash_layers
    names["feed_forward.router." + ("table" if is_hashed else "bias")] = (f"ffn.gate.{TABLE if is_hashed else 'bias'}",)
    experts = [f"ffn.experts.{e}." for e in range(config.n_routed_experts)]
    names["feed_forward.gate_up"] = tuple(f"{expert}{part}.weight" for expert in experts for part in ("w1", "w3"))
    names["feed_forward.down"] = tuple(f"{expert}w2.weight" for expert in experts)
    return _under(ours, theirs, names)


def _under(ours: str, theirs: str, names: _Names) -> _Names:
    return {ours + name: tuple(theirs + part for part in parts) for name, parts in names.items()}


def _merge(ours: str, theirs: str) -> _Names:
    return {ours + name: (f"{theirs}_{part}",) for name, part in _MIXTURE.items()}


def _swiglu(ours: str, theirs: str) -> _Names:
    return _under(ours, theirs, {"gate_up.weight": ("w1.weight", "w3.weight"), "down.weight": ("w2.weight",)})


_MTP: _Names = {
    "embed_norm.weight": ("enorm.weight",),
    "hidden_norm.weight": ("hnorm.weight",),
    "embed_project.weight": ("e_proj.weight",),
    "hidden_project.weight": ("h_proj.weight",),
    "norm.weight": ("norm.weight",),
    **_merge("merge.", "hc_head"),
}

# transformers' names -> the release's, applied in order: an indexer's before its compressor's
_WORDS = [
    (r"^model\.", ""),
    (r"^embed_tokens\.", "embed."),
    (r"^lm_head\.", "head."),
    (r"^hc_head\.hc_", "hc_head_"),
    (r"\.(attn|ffn)_hc\.", r".hc_\1_"),
    (r"\.input_layernorm\.", ".attn_norm."),
    (r"\.post_attention_layernorm\.", ".ffn_norm."),
    (r"\.self_attn\.", ".attn."),
    (r"\.mlp\.", ".ffn."),
    (r"\.attn\.compressor\.indexer\.(scorer\.)?weights_proj\.", ".attn.indexer.weights_proj."),
    (r"\.attn\.compressor\.indexer\.q_b_proj\.", ".attn.indexer.wq_b."),
    (r"\.attn\.compressor\.indexer\.", ".attn.indexer.compressor."),
    (r"\.compressor\.kv_norm\.", ".compressor.norm."),
    (r"\.compressor\.position_bias$", ".compressor.ape"),
    (r"\.attn\.norm\.", ".attn.kv_norm."),
    (r"\.q_a_norm\.", ".q_norm."),
    (r"\.(q|o)_(a|b)_proj\.", r".w\1_\2."),
    (r"\.kv_proj\.", ".wkv."),
    (r"\.attn(.*)\.gate_proj\.", r".attn\1.wgate."),
    (r"\.attn\.sinks$", ".attn.attn_sink"),
    (r"\.gate\.e_score_correction_bias$", ".gate.bias"),
    (r"\.gate_proj\.", ".w1."),
    (r"\.down_proj\.", ".w2."),
    (r"\.up_proj\.", ".w3."),
]


# the release's names -> transformers' modules, for matrices that an adapter can target
_MODULES = [
    (r"^layers\.", "model.layers."),
    (r"\.attn\.", ".self_attn."),
    (r"\.ffn\.", ".mlp."),
    (r"\.indexer\.(compressor\.)?", ".compressor.indexer."),
    (r"\.w(q|o)_(a|b)\b", r".\1_\2_proj"),
    (r"\.wkv\b", ".kv_proj"),
    (r"\.w(gate|1)\b", ".gate_proj"),
    (r"\.w2\b", ".down_proj"),
    (r"\.w3\b", ".up_proj"),
]


def of_modules(name: str) -> str:
    """Returns transformers' module name of a block's matrix, given the release's name."""
    for words, instead in _MODULES:
        name = re.sub(words, instead, name)
    return name


def released(name: str) -> str:
    """Returns the release's name of a tensor, given any of the spellings."""
    for words, instead in _WORDS:
        name = re.sub(words, instead, name)
    return name
