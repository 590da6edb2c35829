"""The families of open checkpoints by `model_type`: config readers and transformers' defaults. Does not import torch.

Defaults are those of transformers' config classes, for fields that a file omits.
"""

from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

from finback.checkpoint import hf_grouped
from finback.checkpoint.hf_fields import Fields
from finback.checkpoint.hf_latent import Found, latent, listed_gate, sparse, v2_gate, v3_gate
from finback.checkpoint.hf_v4 import DEFAULTS as V4_DEFAULTS
from finback.checkpoint.hf_v4 import read_v4


@dataclass(frozen=True)
class Family:
    """A `model_type`: transformers' model class, a reader of the fields beyond the common ones, and defaults."""

    architecture: str
    read: Callable[[Fields], Found]
    defaults: dict[str, Any] = field(default_factory=dict)
    # `read` reads the rotary settings itself, one set for each kind of layer
    reads_rope: bool = False


FAMILIES: dict[str, Family] = {
    "deepseek_v2": Family("DeepseekV2ForCausalLM", lambda f: latent(f, v2_gate, mtp=False, halves=False)),
    "deepseek_v3": Family("DeepseekV3ForCausalLM", lambda f: latent(f, v3_gate, mtp=True)),
    "deepseek_v32": Family("DeepseekV32ForCausalLM", lambda f: sparse(f, interleaved=False)),
    "glm_moe_dsa": Family("GlmMoeDsaForCausalLM", lambda f: sparse(f, interleaved=True)),
    "deepseek_v4": Family("DeepseekV4ForCausalLM", read_v4, V4_DEFAULTS, reads_rope=True),
    "kimi_k2": Family("DeepseekV3ForCausalLM", lambda f: latent(f, v3_gate, mtp=True)),
    # GLM-4.7-Flash, whose first layer is dense
    "glm4_moe_lite": Family(
        "Glm4MoeLiteForCausalLM",
        lambda f: latent(f, lambda g, found: listed_gate(g, found, [0]), mtp=True),
        {"rms_norm_eps": 1e-5},
    ),
    "llama": Family("LlamaForCausalLM", hf_grouped.grouped),
    "mistral": Family(
        "MistralForCausalLM",
        lambda f: hf_grouped.grouped(f) | hf_grouped.window_of_all(f, 4096),
        {"max_position_embeddings": 131072, "attention_bias": False},
    ),
    "mixtral": Family(
        "MixtralForCausalLM",
        hf_grouped.mixtral,
        {"rms_norm_eps": 1e-5, "rope_theta": 1000000.0, "max_position_embeddings": 131072, "num_key_value_heads": 8},
    ),
    "gemma3_text": Family(
        "Gemma3ForCausalLM",
        hf_grouped.gemma3,
        {
            "head_dim": 256,
            "num_attention_heads": 8,
            "num_key_value_heads": 4,
            "max_position_embeddings": 131072,
            "rope_theta": 1000000.0,
            "tie_word_embeddings": True,
        },
        reads_rope=True,
    ),
    "gpt_oss": Family(
        "GptOssForCausalLM",
        hf_grouped.gpt_oss,
        {
            "head_dim": 64,
            "num_key_value_heads": 8,
            "rms_norm_eps": 1e-5,
            "rope_theta": 150000.0,
            "max_position_embeddings": 131072,
            "attention_bias": True,
        },
        reads_rope=True,
    ),
    "qwen2": Family("Qwen2ForCausalLM", hf_grouped.qwen2),
    "qwen3": Family("Qwen3ForCausalLM", hf_grouped.qwen3, {"head_dim": 128}),
    "qwen3_moe": Family("Qwen3MoeForCausalLM", hf_grouped.qwen3_moe),
    "smollm3": Family(
        "SmolLM3ForCausalLM",
        hf_grouped.smollm3,
        {"tie_word_embeddings": True, "rope_theta": 2000000.0, "max_position_embeddings": 32768},
    ),
    "glm4_moe": Family(
        "Glm4MoeForCausalLM",
        hf_grouped.glm4_moe,
        {"rms_norm_eps": 1e-5, "partial_rotary_factor": 0.5, "first_k_dense_replace": 1, "n_group": 1, "topk_group": 1},
    ),
    "phi3": Family("Phi3ForCausalLM", hf_grouped.phi3, {"rms_norm_eps": 1e-5}),
    "olmo2": Family("Olmo2ForCausalLM", hf_grouped.olmo2, {"rms_norm_eps": 1e-5, "max_position_embeddings": 2048}),
    "olmo3": Family(
        "Olmo3ForCausalLM",
        hf_grouped.olmo3,
        {"rms_norm_eps": 1e-5, "max_position_embeddings": 2048, "rope_theta": 500000.0},
        reads_rope=True,
    ),
}
# families that users ask for, and why finback does not run them
REFUSED = {
    "qwen3_next": "three of four layers are gated delta nets, whose cache is a state instead of keys",
    "qwen3_5": "three of four layers are gated delta nets, whose cache is a state instead of keys",
    "qwen3_5_text": "three of four layers are gated delta nets, whose cache is a state instead of keys",
    "qwen3_5_moe": "three of four layers are gated delta nets, whose cache is a state instead of keys",
    "qwen2_moe": "its shared expert has its own gate",
    "gemma3": "it also reads images; finback runs its text model alone, gemma3_text",
    "gemma2": "it caps attention scores and logits (softcapping)",
}
