"""Small random models of every family that finback imports, as transformers builds and saves them."""

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

UNCUT = {"rope_type": "yarn", "factor": 4.0, "original_max_position_embeddings": 16, "truncate": False}


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
def deepseek(draw: st.DrawFn, version: float, shares: bool = False) -> Any:
    """Draws a DeepSeek config; `shares`: GLM-5, whose layers may share indexers and whose version is 3.2."""
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
        # with fewer heads many scores are zero, and the choice among equal ones is arbitrary
        fields |= {"index_n_heads": 16, "index_head_dim": fields["qk_rope_head_dim"] + draw(st.sampled_from([0, 8]))}
        fields |= {"index_topk": draw(st.sampled_from([3, 8, 40])), "norm_topk_prob": draw(st.booleans())}
        if not shares:
            return transformers.DeepseekV32Config(**fields)
        further = draw(st.lists(st.sampled_from(["full", "shared"]), min_size=1, max_size=3))
        fields["num_hidden_layers"] = 1 + len(further)
        return transformers.GlmMoeDsaConfig(**fields, indexer_types=["full", *further])
    return transformers.DeepseekV3Config(
        **fields,
        norm_topk_prob=draw(st.booleans()),
        num_nextn_predict_layers=0,
        rope_interleave=draw(st.sampled_from([True, True, False])),
    )


@st.composite
def deepseek_v4(draw: st.DrawFn) -> Any:
    """Small windows and few short compressed entries, so that a short row reaches every boundary."""
    kinds = ["sliding_attention", "compressed_sparse_attention", "heavily_compressed_attention"]
    layers, groups = draw(st.integers(1, 3)), draw(st.sampled_from([1, 2]))
    hashed = draw(st.integers(0, layers))
    fields = draw(common()) | {
        "num_hidden_layers": layers,
        "num_attention_heads": groups * draw(st.sampled_from([1, 2])),
        "layer_types": [draw(st.sampled_from(kinds)) for _ in range(layers)],
        "mlp_layer_types": ["hash_moe"] * hashed + ["moe"] * (layers - hashed),
        "compress_rates": {kinds[1]: draw(st.sampled_from([2, 4])), kinds[2]: draw(st.sampled_from([5, 8, 128]))},
        "sliding_window": draw(st.sampled_from([2, 3, 7, 40])),  # with 1 transformers fails to generate
        "head_dim": draw(st.sampled_from([16, 24])),
        "partial_rotary_factor": 0.5,
        "q_lora_rank": 20,
        "o_groups": groups,
        "o_lora_rank": draw(st.sampled_from([8, 12])),
        "index_n_heads": 16,
        "index_head_dim": 16,
        "index_topk": draw(st.sampled_from([1, 3, 40])),
        "n_routed_experts": 8,
        "num_experts_per_tok": draw(st.integers(1, 3)),
        "moe_intermediate_size": 24,
        "routed_scaling_factor": draw(st.sampled_from([1.0, 1.5])),
        "swiglu_limit": draw(st.sampled_from([0.3, 10.0])),
        "hc_mult": draw(st.sampled_from([2, 4])),
        "hc_sinkhorn_iters": draw(st.sampled_from([1, 20])),
        "compress_rope_theta": 4000.0,
        "rope_theta": 1000.0,
        "rope_scaling": draw(st.sampled_from([None, {n: v for n, v in YARN.items() if "mscale" not in n}])),
    }
    del fields["intermediate_size"]
    return transformers.DeepseekV4Config(**fields)


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


@st.composite
def grouped(draw: st.DrawFn, family: str) -> Any:
    """Families with attention windows, layers without positions, norms in other places, or experts."""
    kv = draw(st.sampled_from([1, 2]))
    layers = draw(st.integers(2, 4))
    plain = {"rope_type": "default"}
    fields = draw(common()) | {
        "num_hidden_layers": layers,
        "num_attention_heads": kv * draw(st.sampled_from([1, 2])),
        "num_key_value_heads": kv,
        "head_dim": 16,
        "tie_word_embeddings": draw(st.booleans()),
        "rope_parameters": {"rope_theta": 1000.0}
        | draw(st.sampled_from([plain, LLAMA3, {"rope_type": "dynamic", "factor": 2.0}, UNCUT])),
    }
    window = draw(st.sampled_from([3, 7, 40]))
    kinds = [draw(st.sampled_from(["full_attention", "sliding_attention"])) for _ in range(layers)]
    biased = draw(st.booleans())
    experts = {
        "num_experts_per_tok": draw(st.integers(1, 3)),
        "moe_intermediate_size": 24,
        "norm_topk_prob": draw(st.booleans()),
    }
    if family == "mistral":
        return transformers.MistralConfig(**fields, sliding_window=draw(st.sampled_from([None, window])))
    if family in ("qwen2", "qwen3"):
        kind = transformers.Qwen2Config if family == "qwen2" else transformers.Qwen3Config
        first = draw(st.integers(0, layers))
        return kind(**fields, use_sliding_window=True, sliding_window=window, max_window_layers=first)
    if family == "smollm3":
        rotated = draw(st.sampled_from([None, [int(kind == "full_attention") for kind in kinds]]))
        slides = draw(st.booleans())
        return transformers.SmolLM3Config(
            **fields,
            attention_bias=biased,
            no_rope_layers=rotated,
            no_rope_layer_interval=2,
            use_sliding_window=slides,
            sliding_window=window if slides else None,
        )
    if family == "qwen3_moe":
        return transformers.Qwen3MoeConfig(
            **fields | experts,
            num_experts=8,
            attention_bias=biased,
            decoder_sparse_step=draw(st.sampled_from([1, 1, 2])),
            mlp_only_layers=draw(st.sampled_from([[], [0], [1]])),
            use_sliding_window=draw(st.booleans()),
            sliding_window=window,
        )
    if family == "glm4_moe":
        return transformers.Glm4MoeConfig(
            **fields | experts,
            attention_bias=biased,
            use_qk_norm=draw(st.booleans()),
            partial_rotary_factor=0.5,
            n_routed_experts=8,
            n_shared_experts=draw(st.integers(1, 2)),
            n_group=2,
            topk_group=draw(st.integers(1, 2)),
            first_k_dense_replace=draw(st.integers(0, min(2, layers - 1))),  # at least one layer has experts
            routed_scaling_factor=draw(st.sampled_from([1.0, 2.5])),
            num_mtp_layers=0,
        )
    if family == "gpt_oss":
        return transformers.GptOssConfig(
            **fields,
            num_local_experts=8,
            num_experts_per_tok=experts["num_experts_per_tok"],
            layer_types=kinds,
            sliding_window=window,
            attention_bias=biased,
            swiglu_limit=draw(st.sampled_from([0.3, 7.0])),
            swiglu_alpha=draw(st.sampled_from([1.702, 0.5])),
        )
    if family == "phi3":
        share = draw(st.sampled_from([1.0, 0.5]))
        return transformers.Phi3Config(
            **fields
            | {
                "num_attention_heads": 2 * kv,
                "hidden_size": 32 * kv,  # head_dim 16, which phi3 has no field for
                "num_key_value_heads": kv,
                "partial_rotary_factor": share,
                "rope_parameters": draw(st.sampled_from([plain, long_rope(int(8 * share))])) | {"rope_theta": 1000.0},
                "original_max_position_embeddings": 12,
                "sliding_window": draw(st.sampled_from([None, window])),
            }
        )
    if family == "mixtral":
        own = {"num_local_experts": 8, "sliding_window": draw(st.sampled_from([None, window]))}
        return transformers.MixtralConfig(**fields, **own, num_experts_per_tok=draw(st.integers(1, 3)))
    if family == "gemma3_text":
        wide = (
            fields["rope_parameters"]
            if draw(st.booleans())
            else {"rope_theta": 1000.0, "rope_type": "linear", "factor": 8.0}
        )
        own = {"sliding_attention": plain | {"rope_theta": 500.0}, "full_attention": wide}
        return transformers.Gemma3TextConfig(
            **fields | {"rope_parameters": own, "hidden_size": 16 * fields["num_attention_heads"]},
            layer_types=kinds,
            sliding_window=window,
            attention_bias=biased,
            query_pre_attn_scalar=draw(st.sampled_from([16, 24])),
        )
    if family == "olmo2":
        return transformers.Olmo2Config(**fields, attention_bias=biased)
    own = {"sliding_attention": plain | {"rope_theta": 500.0}, "full_attention": fields["rope_parameters"]}
    return transformers.Olmo3Config(
        **fields | {"rope_parameters": own}, layer_types=kinds, sliding_window=window, attention_bias=biased
    )


def long_rope(pairs: int) -> dict[str, Any]:
    short, long = ([1.0 + step * i for i in range(pairs)] for step in (0.1, 0.7))
    return {"rope_type": "longrope", "short_factor": short, "long_factor": long}


@st.composite
def glm4_moe_lite(draw: st.DrawFn) -> Any:
    config = draw(deepseek(3))
    names = (*common_names(), *("num_attention_heads", "num_key_value_heads", "kv_lora_rank", "q_lora_rank"))
    names += ("qk_nope_head_dim", "qk_rope_head_dim", "v_head_dim", "n_routed_experts", "n_shared_experts")
    names += (
        "moe_intermediate_size",
        "num_experts_per_tok",
        "routed_scaling_factor",
        "rope_parameters",
        "norm_topk_prob",
    )
    layers = [draw(st.sampled_from(["dense", "sparse"])) for _ in range(config.num_hidden_layers)]
    return transformers.Glm4MoeLiteConfig(**{n: getattr(config, n) for n in names}, mlp_layer_types=layers)


def common_names() -> tuple[str, ...]:
    """The names of the fields that `common` draws."""
    return (
        *("vocab_size", "hidden_size", "intermediate_size", "num_hidden_layers", "max_position_embeddings"),
        *("rms_norm_eps", "bos_token_id", "eos_token_id", "pad_token_id"),
    )


FAMILIES = {
    "deepseek_v2": deepseek(2),
    "deepseek_v3": deepseek(3),
    "deepseek_v32": deepseek(3.2),
    "glm_moe_dsa": deepseek(3.2, shares=True),
    "llama": dense("llama"),
    "qwen2": dense("qwen2"),
    "qwen3": dense("qwen3"),
}
OTHERS = {
    "deepseek_v4": deepseek_v4(),
    "glm4_moe_lite": glm4_moe_lite(),
    "qwen2 with windows": grouped("qwen2"),
    "qwen3 with windows": grouped("qwen3"),
    **{
        name: grouped(name)
        for name in (
            *("qwen3_moe", "mixtral", "gemma3_text", "gpt_oss", "mistral", "smollm3", "glm4_moe", "phi3", "olmo2"),
            "olmo3",
        )
    },
}


def build(config: Any, seed: int) -> Any:
    """A transformers model with weights large enough to matter, and nonzero biases and router biases."""
    torch.manual_seed(seed)
    model = transformers.AutoModelForCausalLM.from_config(config, attn_implementation="eager").eval()
    for name, tensor in {**dict(model.named_parameters()), **dict(model.named_buffers())}.items():
        with torch.no_grad():
            if name.endswith("tid2eid"):  # initially all zeros
                tensor.copy_(torch.rand(len(tensor), config.n_routed_experts).topk(tensor.size(1)).indices)
            elif name.endswith("e_score_correction_bias"):
                tensor.normal_(0, 0.3)
            elif tensor.ndim == 1 and "inv_freq" not in name:
                tensor.add_(torch.randn_like(tensor) * 0.2)
            elif tensor.ndim > 1:
                tensor.normal_(0, 0.15)
    return model


def spell_as_released(folder: Path) -> None:
    """Rewrites config.json with the releases' rotary fields: rope_theta and rope_scaling."""
    path = folder / "config.json"
    raw = json.loads(path.read_text())
    if raw["rope_parameters"].keys() & {"full_attention", "compress"}:  # differs between layers
        return
    if raw["model_type"] == "gpt_oss" and raw["rope_parameters"]["rope_type"] == "default":  # its default is YaRN
        return
    rope = raw.pop("rope_parameters")
    if "partial_rotary_factor" in rope:
        raw["partial_rotary_factor"] = rope.pop("partial_rotary_factor")
    raw["rope_theta"] = rope.pop("rope_theta")
    kind = rope.pop("rope_type")
    if kind != "default":
        raw["rope_scaling"] = {"type": kind, **rope}
    path.write_text(json.dumps(raw))
