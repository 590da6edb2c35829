"""Random small models of every family that finback imports, as transformers builds and saves them."""

import json
from pathlib import Path
from typing import Any

import torch
import transformers
from hypothesis import strategies as st

YARN = {
    "rope_type": "yarn",
    "factor": 4.0,
    "original_max_position_embeddings": 16,
    "beta_fast": 32.0,
    "beta_slow": 1.0,
    "mscale": 0.7,
    "mscale_all_dim": 0.7,
}
LLAMA3 = {
    "rope_type": "llama3",
    "factor": 8.0,
    "low_freq_factor": 1.0,
    "high_freq_factor": 4.0,
    "original_max_position_embeddings": 16,
}


@st.composite
def common(draw: st.DrawFn) -> dict[str, Any]:
    return {
        "vocab_size": draw(st.integers(40, 90)),
        "hidden_size": draw(st.sampled_from([32, 48])),
        "intermediate_size": draw(st.sampled_from([40, 64])),
        "num_hidden_layers": draw(st.integers(1, 3)),
        "max_position_embeddings": 64,
        "rms_norm_eps": draw(st.sampled_from([1e-6, 1e-5])),
        "bos_token_id": 0,
        "eos_token_id": 1,
        "pad_token_id": 2,
    }


@st.composite
def deepseek(draw: st.DrawFn, version: float) -> Any:
    heads = draw(st.sampled_from([2, 4]))
    groups = draw(st.sampled_from([1, 2, 4]))
    fields = draw(common()) | {
        "num_attention_heads": heads,
        "num_key_value_heads": heads,
        "kv_lora_rank": draw(st.sampled_from([16, 24])),
        "q_lora_rank": 20 if version == 3.2 else draw(st.sampled_from([None, 20])),
        "qk_nope_head_dim": draw(st.sampled_from([8, 16])),
        "qk_rope_head_dim": draw(st.sampled_from([8, 16])),
        "v_head_dim": draw(st.sampled_from([8, 24])),
        "n_routed_experts": 8,
        "n_shared_experts": draw(st.integers(1, 2)),
        "moe_intermediate_size": 24,
        "num_experts_per_tok": draw(st.integers(1, 3)),
        "first_k_dense_replace": draw(st.integers(0, 2)),
        "n_group": groups,
        "topk_group": draw(st.integers(max(1, groups // 2), groups)),
        "routed_scaling_factor": draw(st.sampled_from([1.0, 2.5])),
        "tie_word_embeddings": False,
        "rope_parameters": {"rope_theta": 1000.0} | draw(st.sampled_from([{"rope_type": "default"}, YARN])),
    }
    if version == 2:
        method = draw(st.sampled_from(["greedy", "group_limited_greedy"]))
        return transformers.DeepseekV2Config(**fields, topk_method=method, head_dim=fields["qk_rope_head_dim"])
    if version == 3.2:
        # fewer heads make many scores zero, and which of equal ones is picked is anybody's choice
        fields |= {"index_n_heads": 16, "index_head_dim": fields["qk_rope_head_dim"] + draw(st.sampled_from([0, 8]))}
        fields |= {"index_topk": draw(st.sampled_from([3, 8, 40])), "norm_topk_prob": draw(st.booleans())}
        kind = transformers.GlmMoeDsaConfig if draw(st.booleans()) else transformers.DeepseekV32Config
        return kind(**fields)
    return transformers.DeepseekV3Config(
        **fields,
        norm_topk_prob=draw(st.booleans()),
        num_nextn_predict_layers=0,
        rope_interleave=draw(st.sampled_from([True, True, False])),
    )


@st.composite
def dense(draw: st.DrawFn, family: str) -> Any:
    kv = draw(st.sampled_from([1, 2]))
    plain = {"rope_type": "default"}
    fields = draw(common()) | {
        "num_attention_heads": kv * draw(st.sampled_from([1, 2, 4])),
        "num_key_value_heads": kv,
        "head_dim": 16,
        "tie_word_embeddings": draw(st.booleans()),
        "rope_parameters": {"rope_theta": 1000.0}
        | draw(
            st.sampled_from(
                [plain, LLAMA3, {"rope_type": "linear", "factor": 3.0}]
                if family == "llama"
                else [plain, {k: v for k, v in YARN.items() if "mscale" not in k}]
            )
        ),
    }
    if family == "llama":
        return transformers.LlamaConfig(**fields, attention_bias=draw(st.booleans()))
    if family == "qwen2":
        return transformers.Qwen2Config(**fields)
    return transformers.Qwen3Config(**fields, attention_bias=draw(st.booleans()))


FAMILIES = {
    "deepseek_v2": deepseek(2),
    "deepseek_v3": deepseek(3),
    "deepseek_v32": deepseek(3.2),
    "llama": dense("llama"),
    "qwen2": dense("qwen2"),
    "qwen3": dense("qwen3"),
}


def build(config: Any, seed: int) -> Any:
    """A transformers model with weights large enough to matter, biases and router biases not zero."""
    torch.manual_seed(seed)
    model = transformers.AutoModelForCausalLM.from_config(config, attn_implementation="eager").eval()
    for name, tensor in {**dict(model.named_parameters()), **dict(model.named_buffers())}.items():
        with torch.no_grad():
            if name.endswith("e_score_correction_bias"):
                tensor.normal_(0, 0.3)
            elif tensor.ndim == 1 and "inv_freq" not in name:
                tensor.add_(torch.randn_like(tensor) * 0.2)
            elif tensor.ndim > 1:
                tensor.normal_(0, 0.15)
    return model


def spell_as_released(folder: Path) -> None:
    """Rewrite config.json as the releases spell rotary settings: rope_theta and rope_scaling."""
    path = folder / "config.json"
    raw = json.loads(path.read_text())
    rope = raw.pop("rope_parameters")
    raw["rope_theta"] = rope.pop("rope_theta")
    kind = rope.pop("rope_type")
    if kind != "default":
        raw["rope_scaling"] = {"type": kind, **rope}
    path.write_text(json.dumps(raw))
