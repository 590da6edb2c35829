"""What a model is: one flat dataclass, its checks, and the presets as values.

Field names are those of Hugging Face `config.json` files, which all implementations share. No torch here.
"""

import dataclasses
from dataclasses import dataclass
from typing import Any, Literal

from finback.config import UserError, check_fields
from finback.model.rope_scaling import KINDS, RopeScaling, Yarn


@dataclass(frozen=True)
class ModelConfig:
    """A decoder with latent (MLA) or grouped-query attention and dense or mixture-of-experts feed-forward."""

    vocab_size: int
    hidden_size: int
    num_hidden_layers: int
    num_attention_heads: int
    # width of the dense feed-forward layers
    intermediate_size: int
    attention: Literal["mla", "gqa"] = "mla"
    # MLA (V2 2.1): queries and keys have a part without and a part with rotary position; q_lora_rank None takes queries
    # straight from the hidden state (V2-Lite)
    q_lora_rank: int | None = None
    kv_lora_rank: int = 0
    qk_nope_head_dim: int = 0
    qk_rope_head_dim: int = 0
    v_head_dim: int = 0
    # GQA, for dense students
    num_key_value_heads: int = 0
    head_dim: int = 0
    # qkv: Qwen2; all: the output projection too
    attention_bias: Literal["none", "qkv", "all"] = "none"
    # RMSNorm over each head's query and key (Qwen3)
    qk_norm: bool = False
    # DeepSeekMoE; n_routed_experts = 0 makes every layer dense
    n_routed_experts: int = 0
    n_shared_experts: int = 0
    num_experts_per_tok: int = 0
    moe_intermediate_size: int = 0
    # this many layers at the bottom stay dense
    first_k_dense_replace: int = 0
    n_group: int = 1
    topk_group: int = 1
    scoring_func: Literal["sigmoid", "softmax"] = "sigmoid"
    norm_topk_prob: bool = True
    routed_scaling_factor: float = 1.0
    # MTP depth
    num_nextn_predict_layers: int = 0
    rope_theta: float = 10000.0
    rope_scaling: RopeScaling | None = None
    # MLA: pairs (0,1), (2,3), …; GQA is half-split as Llama and Qwen are
    rope_interleaved: bool = True
    max_position_embeddings: int = 4096
    rms_norm_eps: float = 1e-6
    tie_word_embeddings: bool = False
    # V3 4.2; the 0.02 in published config files is a framework default
    initializer_range: float = 0.006

    def __post_init__(self) -> None:
        check_fields(self, "model")
        if self.attention == "mla":
            for name in ("kv_lora_rank", "qk_nope_head_dim", "qk_rope_head_dim", "v_head_dim"):
                _require(getattr(self, name) > 0, name, getattr(self, name), "latent attention needs it", "Set it > 0.")
            _even(self.qk_rope_head_dim, "qk_rope_head_dim")
        else:
            for name in ("num_key_value_heads", "head_dim"):
                _require(getattr(self, name) > 0, name, getattr(self, name), "GQA needs it", "Set it > 0.")
            _even(self.head_dim, "head_dim")
            _require(
                self.num_nextn_predict_layers == 0 and self.n_routed_experts == 0,
                "attention",
                "gqa",
                "experts and MTP come with latent attention only",
                'Use attention="mla", or leave them out.',
            )
            _require(
                self.num_attention_heads % self.num_key_value_heads == 0,
                "num_key_value_heads",
                self.num_key_value_heads,
                f"does not divide {self.num_attention_heads} heads",
                "Use a divisor.",
            )
        if self.n_routed_experts:
            self._check_experts()

    def _check_experts(self) -> None:
        experts, groups, k = self.n_routed_experts, self.n_group, self.num_experts_per_tok
        _require(groups > 0, "n_group", groups, "not above 0", "Use 1 or more.")
        _require(experts % groups == 0, "n_group", groups, f"does not divide {experts} experts", "Use a divisor.")
        _require(0 < self.topk_group <= groups, "topk_group", self.topk_group, f"not in 1..{groups}", "Lower it.")
        reachable = experts // groups * self.topk_group
        _require(0 < k <= reachable, "num_experts_per_tok", k, f"not in 1..{reachable}", "Lower it.")
        _require(self.moe_intermediate_size > 0, "moe_intermediate_size", 0, "experts need a width", "Set it > 0.")
        # V3's group score is the sum of a group's two best affinities
        _require(
            groups == 1 or experts // groups >= 2, "n_group", groups, "leaves one expert per group", "Use fewer groups."
        )

    @property
    def qk_head_dim(self) -> int:
        """Length of one head's query and key."""
        return self.qk_nope_head_dim + self.qk_rope_head_dim if self.attention == "mla" else self.head_dim

    @property
    def rope_dim(self) -> int:
        """How many dimensions of a head are rotated."""
        return self.qk_rope_head_dim if self.attention == "mla" else self.head_dim

    @property
    def cache_elements(self) -> int:
        """Cached numbers per token and layer: latent + rotary key for MLA (V2 2.1.4), keys + values for GQA."""
        if self.attention == "mla":
            return self.kv_lora_rank + self.qk_rope_head_dim
        return 2 * self.num_key_value_heads * self.head_dim

    def is_moe(self, layer: int) -> bool:
        """Whether layer `layer` (0-based; the MTP module counts on from the last) has routed experts."""
        return self.n_routed_experts > 0 and layer >= self.first_k_dense_replace


def to_json(config: ModelConfig) -> dict[str, Any]:
    """Plain values of a config, the kind of rope scaling under `rope_type`; `from_json` takes them back."""
    fields = dataclasses.asdict(config)
    if config.rope_scaling is not None:
        kind = next(name for name, cls in KINDS.items() if type(config.rope_scaling) is cls)
        fields["rope_scaling"]["rope_type"] = kind
    return fields


def from_json(fields: dict[str, Any]) -> ModelConfig:
    """A config from what `to_json` made."""
    scaling = fields["rope_scaling"]
    if scaling is not None:
        scaling = dict(scaling)
        scaling = KINDS[scaling.pop("rope_type", "yarn")](**scaling)
    return ModelConfig(**fields | {"rope_scaling": scaling})


def _require(ok: bool, name: str, value: object, problem: str, remedy: str) -> None:
    if not ok:
        raise UserError(f"model.{name}", value, problem, remedy)


def _even(value: int, name: str) -> None:
    _require(value % 2 == 0, name, value, "rotary pairs need an even number", "Use an even number.")


# The quickstart's model: V3's layout at 1.4 M parameters (0.8 M active).
TINY = ModelConfig(
    vocab_size=1024,
    hidden_size=128,
    num_hidden_layers=4,
    num_attention_heads=4,
    intermediate_size=256,
    q_lora_rank=96,
    kv_lora_rank=64,
    qk_nope_head_dim=32,
    qk_rope_head_dim=16,
    v_head_dim=32,
    n_routed_experts=8,
    n_shared_experts=1,
    num_experts_per_tok=2,
    moe_intermediate_size=64,
    first_k_dense_replace=1,
    routed_scaling_factor=1.0,
    num_nextn_predict_layers=1,
    max_position_embeddings=1024,
    initializer_range=0.02,  # 0.006 suits width 7168; at width 128 it starts too flat
)

# A few hours on one GPU: 0.3 B parameters.
SMALL = ModelConfig(
    vocab_size=32768,
    hidden_size=768,
    num_hidden_layers=12,
    num_attention_heads=12,
    intermediate_size=2048,
    q_lora_rank=384,
    kv_lora_rank=192,
    qk_nope_head_dim=64,
    qk_rope_head_dim=32,
    v_head_dim=64,
    n_routed_experts=32,
    n_shared_experts=1,
    num_experts_per_tok=4,
    moe_intermediate_size=256,
    first_k_dense_replace=1,
    n_group=4,
    topk_group=2,
    routed_scaling_factor=1.0,
    num_nextn_predict_layers=1,
)

V2_LITE = ModelConfig(
    vocab_size=102400,
    hidden_size=2048,
    num_hidden_layers=27,
    num_attention_heads=16,
    intermediate_size=10944,
    kv_lora_rank=512,
    qk_nope_head_dim=128,
    qk_rope_head_dim=64,
    v_head_dim=128,
    n_routed_experts=64,
    n_shared_experts=2,
    num_experts_per_tok=6,
    moe_intermediate_size=1408,
    first_k_dense_replace=1,
    scoring_func="softmax",
    norm_topk_prob=False,
    rope_scaling=Yarn(mscale=0.707, mscale_all_dim=0.707),
    max_position_embeddings=163840,
)

V2 = ModelConfig(
    vocab_size=102400,
    hidden_size=5120,
    num_hidden_layers=60,
    num_attention_heads=128,
    intermediate_size=12288,
    q_lora_rank=1536,
    kv_lora_rank=512,
    qk_nope_head_dim=128,
    qk_rope_head_dim=64,
    v_head_dim=128,
    n_routed_experts=160,
    n_shared_experts=2,
    num_experts_per_tok=6,
    moe_intermediate_size=1536,
    first_k_dense_replace=1,
    n_group=8,
    topk_group=3,
    scoring_func="softmax",
    norm_topk_prob=False,
    routed_scaling_factor=16.0,
    rope_scaling=Yarn(mscale=0.707, mscale_all_dim=0.707),
    max_position_embeddings=163840,
)

V3 = ModelConfig(
    vocab_size=129280,
    hidden_size=7168,
    num_hidden_layers=61,
    num_attention_heads=128,
    intermediate_size=18432,
    q_lora_rank=1536,
    kv_lora_rank=512,
    qk_nope_head_dim=128,
    qk_rope_head_dim=64,
    v_head_dim=128,
    n_routed_experts=256,
    n_shared_experts=1,
    num_experts_per_tok=8,
    moe_intermediate_size=2048,
    first_k_dense_replace=3,
    n_group=8,
    topk_group=4,
    routed_scaling_factor=2.5,
    num_nextn_predict_layers=1,
    rope_scaling=Yarn(),
    max_position_embeddings=163840,
)
