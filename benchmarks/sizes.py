"""The measured model sizes: V3's architecture at about 1.5, 10 and 100 M parameters."""

import dataclasses

from finback.model.config import TINY

SIZES = {
    "tiny": TINY,
    "10m": dataclasses.replace(
        TINY,
        hidden_size=256,
        num_hidden_layers=5,
        intermediate_size=512,
        q_lora_rank=192,
        kv_lora_rank=128,
        qk_nope_head_dim=64,
        qk_rope_head_dim=32,
        v_head_dim=64,
        n_routed_experts=16,
        moe_intermediate_size=128,
    ),
    "100m": dataclasses.replace(
        TINY,
        vocab_size=8192,
        hidden_size=384,
        num_hidden_layers=7,
        num_attention_heads=6,
        intermediate_size=1024,
        q_lora_rank=192,
        kv_lora_rank=96,
        qk_nope_head_dim=64,
        qk_rope_head_dim=32,
        v_head_dim=64,
        n_routed_experts=64,
        num_experts_per_tok=4,
        moe_intermediate_size=192,
    ),
}
