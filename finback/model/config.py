"""The model config: one flat dataclass with validation, and the presets of presets.json.

Field names are those of Hugging Face `config.json` files, which all implementations share. Does not import torch.
"""

import dataclasses
import json
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

from finback.config import UserError, check_fields
from finback.model.rope_scaling import KINDS, LongRope, RopeScaling, Yarn

_GQA_ONLY = (
    "partial_rotary_factor",
    "nope_layers",
    "sliding_window",
    "layer_types",
    "local_rope_theta",
    *("norm_offset", "query_pre_attn_scalar", "attention_sinks"),
    "swiglu_alpha",
)
SLIDING, CSA, HCA = "sliding_attention", "compressed_sparse_attention", "heavily_compressed_attention"


_NEEDED = {
    "mla": ("latent attention needs it", ("kv_lora_rank", "qk_nope_head_dim", "qk_rope_head_dim", "v_head_dim")),
    "gqa": ("GQA needs it", ("num_key_value_heads", "head_dim")),
    "compressed": (
        "compressed attention needs it",
        (
            *("q_lora_rank", "head_dim", "qk_rope_head_dim", "sliding_window", "o_groups", "o_lora_rank"),
            *("compress_rate_csa", "compress_rate_hca"),
        ),
    ),
}
LayerType = Literal[
    "full_attention", "sliding_attention", "compressed_sparse_attention", "heavily_compressed_attention"
]


@dataclass(frozen=True)
class ModelConfig:
    """A decoder with latent (MLA), compressed (V4) or grouped-query attention and dense or mixture-of-experts feed-forward."""

    vocab_size: int
    hidden_size: int
    num_hidden_layers: int
    num_attention_heads: int
    # width of the dense feed-forward layers
    intermediate_size: int
    attention: Literal["mla", "gqa", "compressed"] = "mla"
    # MLA (V2 2.1): queries and keys have a non-rotary and a rotary part; q_lora_rank None projects queries directly from the
    # hidden state (V2-Lite)
    q_lora_rank: int | None = None
    kv_lora_rank: int = 0
    qk_nope_head_dim: int = 0
    qk_rope_head_dim: int = 0
    v_head_dim: int = 0
    # DSA (V3.2 2.1): how many tokens an indexer selects for each token, its number of heads and their width; 0: no indexer. In V4,
    # CSA layers have an indexer, which selects compressed entries
    index_topk: int = 0
    index_n_heads: int = 0
    index_head_dim: int = 0
    # whether the indexer rotates pairs (0,1), (2,3), …, as in GLM-5 but not V3.2
    index_rope_interleaved: bool = False
    # V4: whether indexers round queries and keys to FP4, as they were trained to
    index_fp4: bool = False
    # GLM-5: layers (0-based) without an indexer, which take the selection of the last layer before them that has one
    shared_indexers: tuple[int, ...] = ()
    # V4 (2.3): tokens per entry of CSA and of HCA; groups of heads with separate output projections, and their width
    compress_rate_csa: int = 4
    compress_rate_hca: int = 128
    o_groups: int = 1
    o_lora_rank: int = 0
    # GQA, for dense students; V4 has one key for all heads, which is also the value
    num_key_value_heads: int = 0
    head_dim: int = 0
    # biases: "qkv" as in Qwen2; "all": also in the output projection
    attention_bias: Literal["none", "qkv", "all"] = "none"
    # RMSNorm over each head's query and key (Qwen3), or over all heads at once (OLMo 2)
    qk_norm: bool = False
    qk_norm_over: Literal["head", "projection"] = "head"
    # GQA: this share of a head's dimensions is rotated, starting with the first
    partial_rotary_factor: float = 1.0
    # GQA: layers (0-based) without rotary embedding
    nope_layers: tuple[int, ...] = ()
    # GQA: tokens in the window of a sliding layer, itself included; all layers slide if layer_types is empty. In V4 all layers
    # have this window, and layer_types gives their kind of compression
    sliding_window: int | None = None
    layer_types: tuple[LayerType, ...] = ()
    # RoPE base of sliding layers, which then have no rope_scaling; None: they rotate like the others
    local_rope_theta: float | None = None
    # DeepSeekMoE; n_routed_experts = 0 makes every layer dense
    n_routed_experts: int = 0
    n_shared_experts: int = 0
    num_experts_per_tok: int = 0
    moe_intermediate_size: int = 0
    # number of dense layers at the bottom, and further dense layers (0-based)
    first_k_dense_replace: int = 0
    dense_layers: tuple[int, ...] = ()
    n_group: int = 1
    topk_group: int = 1
    scoring_func: Literal["sigmoid", "softmax", "sqrtsoftplus"] = "sigmoid"
    norm_topk_prob: bool = True
    routed_scaling_factor: float = 1.0
    # this many layers at the bottom choose experts by token id (V4 2.1)
    num_hash_layers: int = 0
    # SwiGLU clamps the gate to at most this, and the up side to ± this; None: no clamping
    swiglu_limit: float | None = None
    # gpt-oss: whether each head has an additional softmax logit without a value; slope of the gate in experts with biases,
    # whose up side is offset by 1 and whose routers have biases too (None: plain experts)
    attention_sinks: bool = False
    swiglu_alpha: float | None = None
    # mHC (V4 2.2): number of residual streams, 0: plain residual; Sinkhorn steps, and the epsilon of their divisions
    hc_mult: int = 0
    hc_sinkhorn_iters: int = 20
    hc_eps: float = 1e-6
    # number of MTP modules
    num_nextn_predict_layers: int = 0
    rope_theta: float = 10000.0
    rope_scaling: RopeScaling | None = None
    # MLA: rotate pairs (0,1), (2,3), …; GQA is half-split as in Llama and Qwen
    rope_interleaved: bool = True
    # position of a block's norms: before attention and feed-forward, after them (OLMo 2), or both (Gemma)
    norms: Literal["pre", "post", "both"] = "pre"
    # Gemma: norms multiply by 1 + weight, embeddings by sqrt(hidden_size), and scores are scaled by this, not head_dim
    norm_offset: bool = False
    scale_embeddings: bool = False
    query_pre_attn_scalar: int | None = None
    # activation of dense feed-forwards: SwiGLU, or GeGLU with tanh GELU
    activation: Literal["silu", "gelu_tanh"] = "silu"
    max_position_embeddings: int = 4096
    rms_norm_eps: float = 1e-6
    tie_word_embeddings: bool = False
    # V3 4.2; the 0.02 in published config files is a framework default
    initializer_range: float = 0.006

    def __post_init__(self) -> None:
        check_fields(self, "model")
        is_mla = self.attention == "mla"
        asks, needed = _NEEDED[self.attention]
        for name in needed:
            self._require((getattr(self, name) or 0) > 0, name, asks, "Set it > 0.")
        rotated = "head_dim" if self.attention == "gqa" else "qk_rope_head_dim"
        self._require(self.rope_dim % 2 == 0, rotated, "rotary pairs need an even number", "Use an even number.")
        if is_mla:
            is_long = isinstance(self.rope_scaling, LongRope)
            self._require(not is_long, "rope_scaling", "LongRoPE is supported for GQA only", "Use yarn.")
            for name in _GQA_ONLY:
                is_default = getattr(self, name) == type(self).__dataclass_fields__[name].default
                self._require(is_default, name, "supported for GQA only", 'Leave it out, or use attention="gqa".')
        elif self.attention == "gqa":
            self._check_gqa()
        else:
            self._check_compressed()
        is_usual = self.activation == "silu" or not self.n_routed_experts
        self._require(is_usual, "activation", "experts support SwiGLU only", 'Use "silu".')
        asked = self.query_pre_attn_scalar
        self._require(asked is None or asked > 0, "query_pre_attn_scalar", "not above 0", "Set it > 0.")
        if self.n_routed_experts:
            self._require(self.norms == "pre", "norms", "experts support pre-norm only", 'Use "pre".')
            self._check_experts()
        if self.index_topk:
            self._check_indexer()
        hashed = "num_hash_layers", "only routed experts are chosen by token id"
        self._require(not self.num_hash_layers or self.n_routed_experts > 0, *hashed, "Use 0, or set n_routed_experts.")
        plain = self.norms == "pre" or not self.hc_mult
        self._require(plain, "norms", "residual streams support pre-norm only", 'Use "pre".')

    def _check_compressed(self) -> None:
        heads, groups, last = self.num_attention_heads, self.o_groups, self.qk_rope_head_dim
        self._require(heads % groups == 0, "o_groups", f"does not divide {heads} heads", "Use a divisor.")
        self._require(self.head_dim >= last, "head_dim", f"below the {last} rotated dimensions", "Raise it.")
        kinds = set(self.layer_types) <= {SLIDING, CSA, HCA} and len(self.layer_types) >= self.num_hidden_layers
        problem = f"not one of {SLIDING}, {CSA}, {HCA} for each layer"
        self._require(kinds, "layer_types", problem, "Name the kind of each layer.")
        picks = self.index_topk > 0 or CSA not in self.layer_types
        self._require(picks, "index_topk", "CSA layers need an indexer", "Set it > 0.")
        problem = "sliding layers need a RoPE base, different from the others'"
        self._require(self.local_rope_theta is not None, "local_rope_theta", problem, "Set it.")
        is_yarn = isinstance(self.rope_scaling, Yarn | None)
        self._require(is_yarn, "rope_scaling", "compressed attention supports YaRN only", "Use yarn.")

    def _check_indexer(self) -> None:
        latent = self.attention != "gqa" and self.q_lora_rank is not None
        problem = "an indexer needs the query latent of latent attention"
        self._require(latent, "index_topk", problem, 'Use attention="mla" and a q_lora_rank, or 0.')
        self._require(self.index_n_heads > 0, "index_n_heads", "an indexer needs heads", "Set it > 0.")
        follow = set(self.shared_indexers) <= set(range(1, self.num_hidden_layers * (self.attention == "mla")))
        self._require(follow, "shared_indexers", "not layers of latent attention from layer 1 on", "Correct it.")
        fits = self.index_head_dim >= self.qk_rope_head_dim
        self._require(fits, "index_head_dim", f"below the {self.qk_rope_head_dim} rotated dimensions", "Raise it.")

    def _check_gqa(self) -> None:
        if isinstance(self.rope_scaling, LongRope):
            pairs = {len(self.rope_scaling.short_factor), len(self.rope_scaling.long_factor)}
            problem = f"needs {self.rope_dim // 2} factors in each list, and no local_rope_theta"
            fits = pairs == {self.rope_dim // 2} and self.local_rope_theta is None
            self._require(fits, "rope_scaling", problem, "Correct it.")
        heads, shared, layers = self.num_attention_heads, self.num_key_value_heads, self.num_hidden_layers
        self._require(heads % shared == 0, "num_key_value_heads", f"does not divide {heads} heads", "Use a divisor.")
        is_share = 0 < self.partial_rotary_factor <= 1
        self._require(is_share, "partial_rotary_factor", "not above 0 and at most 1", "Correct it.")
        some = self.sliding_window is None or self.sliding_window > 0
        self._require(some, "sliding_window", "not above 0", "Set it > 0.")
        fits = not self.layer_types or len(self.layer_types) >= layers
        self._require(fits, "layer_types", f"not one for each of {layers} layers", "Name the kind of each layer.")
        fits = SLIDING not in self.layer_types or self.sliding_window is not None
        self._require(fits, "sliding_window", "sliding layers need it", "Set it.")

    def _check_experts(self) -> None:
        experts, groups, k = self.n_routed_experts, self.n_group, self.num_experts_per_tok
        self._require(groups > 0, "n_group", "not above 0", "Use 1 or more.")
        self._require(experts % groups == 0, "n_group", f"does not divide {experts} experts", "Use a divisor.")
        self._require(0 < self.topk_group <= groups, "topk_group", f"not in 1..{groups}", "Lower it.")
        reachable = experts // groups * self.topk_group
        self._require(0 < k <= reachable, "num_experts_per_tok", f"not in 1..{reachable}", "Lower it.")
        self._require(self.moe_intermediate_size > 0, "moe_intermediate_size", "experts need a width", "Set it > 0.")
        plain = self.swiglu_alpha is None or (self.swiglu_limit is not None and not self.n_shared_experts)
        self._require(plain, "swiglu_alpha", "needs clamped gates and no shared experts", "Set swiglu_limit.")
        # V3's group score is the sum of a group's two best affinities
        pairs = groups == 1 or experts // groups >= 2
        self._require(pairs, "n_group", "leaves one expert per group", "Use fewer groups.")

    def _require(self, ok: bool, name: str, problem: str, remedy: str) -> None:
        if not ok:
            raise UserError(f"model.{name}", getattr(self, name), problem, remedy)

    @property
    def qk_head_dim(self) -> int:
        """Length of one head's query and key."""
        return self.qk_nope_head_dim + self.qk_rope_head_dim if self.attention == "mla" else self.head_dim

    @property
    def rope_dim(self) -> int:
        """Number of rotated dimensions per head."""
        return int(self.head_dim * self.partial_rotary_factor) if self.attention == "gqa" else self.qk_rope_head_dim

    def layer_type(self, layer: int) -> LayerType:
        """The kind of compression in layer `layer` of compressed attention; the MTP module, after the last layer, has none."""
        return self.layer_types[layer] if layer < self.num_hidden_layers else "sliding_attention"

    def window(self, layer: int) -> int | None:
        """Number of tokens that layer `layer` attends to, None for all."""
        return self.sliding_window if not self.layer_types or SLIDING in self.layer_types[layer : layer + 1] else None

    @property
    def indexers(self) -> int:
        """Number of layers that have an indexer, without MTP modules."""
        return sum(map(self.has_indexer, range(self.num_hidden_layers)))

    def has_indexer(self, layer: int) -> bool:
        """Whether layer `layer` has its own indexer."""
        selects = self.index_topk > 0 and layer not in self.shared_indexers
        return selects and (self.attention == "mla" or self.layer_type(layer) == CSA)

    @property
    def cache_elements(self) -> int:
        """Cached elements per token and layer: latent + rotary key for MLA (V2 2.1.4), plus DSA's key; keys + values for GQA.

        0 for compressed attention, whose layers differ: see compressed_cache.py.
        """
        if self.attention == "mla":
            return self.kv_lora_rank + self.qk_rope_head_dim + (self.index_head_dim if self.index_topk else 0)
        return 2 * self.num_key_value_heads * self.head_dim

    def is_moe(self, layer: int) -> bool:
        """Whether layer `layer` (0-based; MTP modules follow the last) has routed experts."""
        is_dense = layer < self.first_k_dense_replace or layer in self.dense_layers
        return self.n_routed_experts > 0 and not is_dense


def to_json(config: ModelConfig) -> dict[str, Any]:
    """A config as plain JSON values, with the kind of rope scaling in `rope_type`; `from_json` is the inverse."""
    fields = dataclasses.asdict(config)
    if config.rope_scaling is not None:
        kind = next(name for name, cls in KINDS.items() if type(config.rope_scaling) is cls)
        fields["rope_scaling"]["rope_type"] = kind
    return fields


def from_json(fields: dict[str, Any]) -> ModelConfig:
    """A config from `to_json`; missing fields get their default."""
    scaling = fields.get("rope_scaling")
    if scaling is not None:
        scaling = dict(scaling)
        scaling = {name: tuple(value) if isinstance(value, list) else value for name, value in scaling.items()}
        scaling = KINDS[scaling.pop("rope_type", "yarn")](**scaling)
    lists = {name: tuple(value) for name, value in fields.items() if isinstance(value, list)}
    return ModelConfig(**fields | lists | {"rope_scaling": scaling})


# TINY: the quickstart's model, V3's layout at 1.4 M parameters (0.8 M active). An initializer_range of 0.006 suits width 7168; at
# width 128 it is too small. SMALL: a few hours on one GPU, 0.3 B parameters.
_PRESETS = json.loads(Path(__file__).with_name("presets.json").read_text(encoding="utf-8"))
TINY, SMALL, V2_LITE, V2, V3, V3_2, V4_FLASH, V4_PRO = (
    from_json(_PRESETS[name]) for name in ("TINY", "SMALL", "V2_LITE", "V2", "V3", "V3_2", "V4_FLASH", "V4_PRO")
)
