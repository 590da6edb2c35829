"""Exports a Transformer as a GGUF file for llama.cpp and Ollama, tensor by tensor.

Names are those of gguf_names.py. The layout differs from Hugging Face's in three ways: experts are stacked as in our
modules, DeepSeek's up-projection of latents is in two parts with the keys' part transposed, and Llama's query and key
rows are paired for interleaved rotation.
"""

import math
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np

from finback.checkpoint.gguf_config import GEMMA_27B, SIGMOID, SOFTMAX, STEPS
from finback.checkpoint.gguf_names import ARCHITECTURES
from finback.checkpoint.gguf_tensors import tensors
from finback.checkpoint.gguf_types import GgufType, file_type, kind_of, packed
from finback.checkpoint.hf_export_as import family_of
from finback.checkpoint.hf_grouped import SLIDING
from finback.config import UserError
from finback.model.config import ModelConfig
from finback.model.rope_scaling import LinearRope, Llama3Rope, LongRope, Yarn
from finback.model.transformer import Transformer

LITE = (26, 27)


def _is_gemma3(c: ModelConfig) -> bool:
    """Whether llama.cpp's graph is this model's."""
    width = c.hidden_size // c.num_attention_heads if c.num_hidden_layers == GEMMA_27B else c.head_dim
    is_scaled = (c.query_pre_attn_scalar or c.head_dim) == width
    return is_scaled and c.attention_bias == "none" and (c.local_rope_theta is not None or not c.rope_scaling)


def _is_smollm3(c: ModelConfig) -> bool:
    """Whether llama.cpp's graph is this model's."""
    return c.nope_layers == tuple(range(3, c.num_hidden_layers, 4)) and c.attention_bias == "none"


def _is_square(c: ModelConfig) -> bool:
    """Whether a model has the shapes that llama.cpp expects for Phi-3 and OLMo."""
    return c.num_attention_heads * c.head_dim == c.hidden_size and c.attention_bias == "none"


def _is_olmo3(c: ModelConfig) -> bool:
    """Whether llama.cpp's graph is this model's."""
    bases = (c.rope_theta,) if c.rope_scaling else (None, c.rope_theta)
    return _is_square(c) and c.local_rope_theta in bases


def _is_qwen3_moe(c: ModelConfig) -> bool:
    """Whether llama.cpp's graph is this model's."""
    return c.norm_topk_prob and not c.dense_layers and not c.first_k_dense_replace


def _is_gpt_oss(c: ModelConfig) -> bool:
    """Whether llama.cpp's graph is this model's, but for the ends of YaRN's ramp, which it rounds to whole pairs."""
    return (
        c.sliding_window is not None and c.attention_bias == "all" and (c.swiglu_alpha, c.swiglu_limit) == (1.702, 7.0)
    )


def _is_plain(config: ModelConfig) -> bool:
    """Whether GGUF's keys can express this YaRN; for MLA they have no gain of cos and sin."""
    yarn = config.rope_scaling
    assert isinstance(yarn, Yarn), "asked of YaRN alone"
    is_cut = yarn.truncate or config.attention_sinks
    return is_cut and (config.attention == "gqa" or yarn.gain == 1.0)


# families that llama.cpp supports in part: whether it supports a model, and the supported form
_KNOWN: dict[str, tuple[Callable[[ModelConfig], bool], str]] = {
    "gemma3_text": (_is_gemma3, "by scores scaled by the width of heads, no biases, and full layers alone scaled"),
    "smollm3": (_is_smollm3, "without rotation in every fourth layer, and without biases"),
    "gpt_oss": (_is_gpt_oss, "by windows, biases, and gates of 1.702 up to 7"),
    "phi3": (_is_square, "with heads that are together as wide as the hidden state, and no biases"),
    "olmo2": (_is_square, "with heads that are together as wide as the hidden state, and no biases"),
    "olmo3": (_is_olmo3, "as OLMo 2, by layers of one base, of which the full ones alone are scaled"),
    "qwen3_moe": (_is_qwen3_moe, "with experts in every layer, whose weights are normalised"),
}


def architecture_of(config: ModelConfig) -> str:
    """Returns GGUF's architecture; UserError if there is none, or llama.cpp would compute something else."""
    family, scaling = family_of(config), config.rope_scaling
    if family not in ARCHITECTURES:
        known = ", ".join(ARCHITECTURES)
        raise UserError("--format", "gguf", f"finback writes no GGUF of {family}", f"It writes {known}.")
    arch, is_mla, (is_known, form) = ARCHITECTURES[family], config.attention == "mla", _KNOWN.get(family, (bool, ""))
    for wrong, problem in (
        (not is_known(config), f"llama.cpp knows it {form}"),
        (is_mla and not config.rope_interleaved, "llama.cpp rotates neighbouring pairs in this one"),
        (
            is_mla and config.q_lora_rank is None and config.num_hidden_layers not in LITE,
            "llama.cpp knows V2-Lite, which has no query latent, by its 26 or 27 layers",
        ),
        (
            family == "deepseek_v2" and config.topk_group < config.n_group,
            "llama.cpp does not limit V2's experts to groups",
        ),
        (
            isinstance(scaling, Llama3Rope) and arch != "llama",
            "llama.cpp scales as Llama 3 does in its own family alone",
        ),
        (
            (config.sliding_window or math.inf) < config.max_position_embeddings and arch not in STEPS,
            "llama.cpp would attend to the whole context, not to windows",
        ),
        (isinstance(scaling, Yarn) and not _is_plain(config), "its YaRN has settings that GGUF has no key for"),
    ):
        if wrong:
            raise UserError("--format", f"gguf of {family}", problem, "Export a Hugging Face folder.")
    return arch


def write(model: Transformer, path: Path, kind: GgufType, vocabulary: dict[str, Any]) -> None:
    """Writes the file, which appears when it is complete; `vocabulary` has the keys of the tokenizer and the name."""
    import gguf

    config, arch = model.config, architecture_of(model.config)
    unfinished = path.with_name(path.name + ".part")
    writer = gguf.GGUFWriter(unfinished, arch)
    writer.add_file_type(gguf.LlamaFileType[file_type(kind)])
    writer.add_quantization_version(gguf.GGML_QUANT_VERSION)
    for name, value in (_settings(config, arch) | vocabulary).items():
        _add(writer, name, value)
    kinds: dict[str, Any] = {}
    for name, tensor in tensors(model, meta=True):
        shape = tuple(tensor.shape)
        chosen = kind_of(name, shape, kind, config.num_hidden_layers, config.tie_word_embeddings)
        kinds[name] = gguf.GGMLQuantizationType[chosen]
        dtype = np.dtype({"F32": np.float32, "F16": np.float16}.get(chosen, np.uint8))
        stored = gguf.quant_shape_to_byte_shape(shape, kinds[name]) if dtype == np.uint8 else shape
        writer.add_tensor_info(name, stored, dtype, math.prod(stored) * dtype.itemsize, kinds[name])
    needed, free = sum(t.nbytes for part in writer.tensors for t in part.values()), shutil.disk_usage(path.parent).free
    if free < 1.05 * needed:
        problem = f"needs {needed / 1e9:.1f} GB, {free / 1e9:.1f} GB are free"
        raise UserError("file", str(path), problem, "Use another disk.")
    try:
        for step in (writer.write_header_to_file, writer.write_kv_data_to_file, writer.write_ti_data_to_file):
            step()
        for name, tensor in tensors(model):
            writer.write_tensor_data(packed(tensor, kinds[name].name))
        writer.close()
        unfinished.replace(path)
    except BaseException:
        unfinished.unlink(missing_ok=True)
        raise


def _add(writer: Any, name: str, value: Any) -> None:
    """Adds a key with the type of its value; integers are unsigned."""
    match value:
        case bool():
            writer.add_bool(name, value)
        case int():
            writer.add_uint32(name, value)
        case float():
            writer.add_float32(name, value)
        case str():
            writer.add_string(name, value)
        case _:
            writer.add_array(name, value)


def _settings(c: ModelConfig, arch: str) -> dict[str, Any]:
    """Returns the architecture's keys."""
    found: dict[str, Any] = {
        "vocab_size": c.vocab_size,
        "context_length": c.max_position_embeddings,
        "embedding_length": c.hidden_size,
        "block_count": c.num_hidden_layers,
        # for Mixtral this key is the experts' width
        "feed_forward_length": c.moe_intermediate_size
        if arch == "llama" and c.n_routed_experts
        else c.intermediate_size,
        "attention.head_count": c.num_attention_heads,
        "attention.layer_norm_rms_epsilon": c.rms_norm_eps,
        "rope.freq_base": c.rope_theta,
        "rope.dimension_count": c.rope_dim,
    }
    if c.attention == "mla":
        found |= _latent_settings(c)
    else:
        found |= {"attention.head_count_kv": c.num_key_value_heads}
        found |= {"attention.key_length": c.head_dim, "attention.value_length": c.head_dim}
    if c.n_routed_experts:
        found |= {"expert_count": c.n_routed_experts, "expert_used_count": c.num_experts_per_tok}
        found["expert_feed_forward_length"] = c.moe_intermediate_size
    if arch in STEPS and c.sliding_window is not None:
        kinds = c.layer_types or (SLIDING,) * c.num_hidden_layers
        found["attention.sliding_window"] = c.sliding_window
        found["attention.sliding_window_pattern"] = [kind == SLIDING for kind in kinds[: c.num_hidden_layers]]
    if arch == "phi3":  # its files state the absence of a window as 0
        found["attention.sliding_window"] = c.sliding_window or 0
    if arch == "glm4moe":
        found |= {"leading_dense_block_count": c.first_k_dense_replace} | _gate_settings(c)
        found |= {"nextn_predict_layers": c.num_nextn_predict_layers}
        found["block_count"] += c.num_nextn_predict_layers
    if arch == "gemma3" and c.sliding_window is not None:
        local = c.rope_theta if c.local_rope_theta is None else c.local_rope_theta
        found["rope.freq_base_swa"] = local
    return {f"{arch}.{name}": value for name, value in (found | _scaling(c)).items()}


def _latent_settings(c: ModelConfig) -> dict[str, Any]:
    """Returns DeepSeek's keys: one key head that all heads share, as in absorbed form."""
    found: dict[str, Any] = {
        "attention.head_count_kv": 1,
        "attention.kv_lora_rank": c.kv_lora_rank,
        "attention.key_length": c.kv_lora_rank + c.qk_rope_head_dim,
        "attention.value_length": c.kv_lora_rank,
        "attention.key_length_mla": c.qk_head_dim,
        "attention.value_length_mla": c.v_head_dim,
        "leading_dense_block_count": c.first_k_dense_replace if c.n_routed_experts else c.num_hidden_layers,
        "expert_shared_count": c.n_shared_experts,
        "expert_feed_forward_length": c.moe_intermediate_size or c.intermediate_size,
    }
    if c.q_lora_rank is not None:
        found["attention.q_lora_rank"] = c.q_lora_rank
    return found | (_gate_settings(c) if c.n_routed_experts else {})


def _gate_settings(c: ModelConfig) -> dict[str, Any]:
    """Returns the gate's keys: how experts are chosen and weighted."""
    return {
        "expert_shared_count": c.n_shared_experts,
        "expert_weights_scale": float(c.routed_scaling_factor),
        "expert_weights_norm": c.norm_topk_prob,
        "expert_gating_func": SIGMOID if c.scoring_func == "sigmoid" else SOFTMAX,
        "expert_group_count": c.n_group,
        "expert_group_used_count": c.topk_group,
    }


def _scaling(c: ModelConfig) -> dict[str, Any]:
    scaling = c.rope_scaling
    if isinstance(scaling, LinearRope):
        return {"rope.scaling.type": "linear", "rope.scaling.factor": scaling.factor}
    if isinstance(scaling, LongRope):
        return {
            "rope.scaling.type": "longrope",
            "rope.scaling.attn_factor": scaling.attention_factor,
            "rope.scaling.original_context_length": scaling.original_max_position_embeddings,
        }
    if not isinstance(scaling, Yarn):
        return {}
    found = {
        "rope.scaling.type": "yarn",
        "rope.scaling.factor": scaling.factor,
        "rope.scaling.original_context_length": scaling.original_max_position_embeddings,
        "rope.scaling.yarn_beta_fast": scaling.beta_fast,
        "rope.scaling.yarn_beta_slow": scaling.beta_slow,
    }
    if c.attention == "mla" and scaling.mscale_all_dim:  # a tenth of other architectures' value (llama.cpp PR 17945)
        found["rope.scaling.yarn_log_multiplier"] = 0.1 * scaling.mscale_all_dim
    if c.attention == "gqa" and not math.isclose(scaling.gain, scaling.stretch(1.0)):  # the default of llama.cpp
        found["rope.scaling.attn_factor"] = scaling.gain / scaling.stretch(1.0)
    return found
