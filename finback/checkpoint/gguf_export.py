"""A Transformer out to a GGUF file, for llama.cpp and Ollama: the architectures that they know, tensor by tensor.

Names are those of gguf_names.py. What differs from Hugging Face's layout: experts are stacked as here, DeepSeek's up-projection of
latents is in two parts of which the keys' is transposed, and Llama's query and key rows are paired for interleaved rotation.
"""

import math
import shutil
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from finback.checkpoint.gguf_config import FREQUENCIES, SIGMOID, SOFTMAX
from finback.checkpoint.gguf_types import GgufType, file_type, kind_of, packed
from finback.checkpoint.hf_export_as import family_of
from finback.config import UserError
from finback.model.config import ModelConfig
from finback.model.gqa import GQA
from finback.model.layers import RMSNorm, SwiGLU
from finback.model.moe import MoE
from finback.model.rope import inverse_frequencies, plain_frequencies
from finback.model.rope_scaling import LinearRope, Llama3Rope, Yarn
from finback.model.transformer import Block, Transformer

ARCHITECTURES = {
    "llama": "llama",
    "mistral": "llama",
    "qwen2": "qwen2",
    "qwen3": "qwen3",
    "qwen3_moe": "qwen3moe",
    "deepseek_v2": "deepseek2",
    "deepseek_v3": "deepseek2",
}
LITE = (26, 27)


def architecture_of(config: ModelConfig) -> str:
    """GGUF's name for such a model; UserError where there is none, or where llama.cpp would compute something else."""
    family = family_of(config)
    if family not in ARCHITECTURES:
        known = ", ".join(ARCHITECTURES)
        raise UserError("--format", "gguf", f"finback writes no GGUF of {family}", f"It writes {known}.")
    for wrong, problem in (
        (config.attention == "mla" and not config.rope_interleaved, "llama.cpp rotates neighbouring pairs in this one"),
        (
            config.attention == "mla" and config.q_lora_rank is None and config.num_hidden_layers not in LITE,
            "llama.cpp knows V2-Lite, which has no query latent, by its 26 or 27 layers",
        ),
        (
            family == "deepseek_v2" and config.topk_group < config.n_group,
            "llama.cpp does not limit V2's experts to groups",
        ),
        (config.sliding_window is not None, "llama.cpp would attend to the whole context, not to windows"),
        (family == "qwen3_moe" and not config.norm_topk_prob, "llama.cpp always normalises the weights of its experts"),
        (family == "qwen3_moe" and bool(config.dense_layers or config.first_k_dense_replace), "it has no dense layers"),
        (
            isinstance(config.rope_scaling, Yarn) and not _is_plain(config),
            "its YaRN has settings that GGUF has no key for",
        ),
    ):
        if wrong:
            raise UserError("--format", f"gguf of {family}", problem, "Export a Hugging Face folder.")
    return ARCHITECTURES[family]


def _is_plain(config: ModelConfig) -> bool:
    """Whether GGUF's keys of YaRN say all of this one: cos and sin carry its usual factor, or for MLA none."""
    yarn = config.rope_scaling
    assert isinstance(yarn, Yarn), "asked of YaRN alone"
    if config.attention == "mla":
        return yarn.truncate and yarn.gain == 1.0
    return yarn.truncate and math.isclose(yarn.gain, yarn.stretch(1.0))


def write(model: Transformer, path: Path, kind: GgufType, vocabulary: dict[str, Any]) -> None:
    """Write the file; `vocabulary` holds the keys of the tokenizer. It appears under its name when it is whole."""
    import gguf

    config, arch = model.config, architecture_of(model.config)
    unfinished = path.with_name(path.name + ".part")
    writer = gguf.GGUFWriter(unfinished, arch)
    writer.add_file_type(gguf.LlamaFileType[file_type(kind)])
    writer.add_quantization_version(gguf.GGML_QUANT_VERSION)
    writer.add_name(path.stem)
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
    """A key by the type of its value; numbers without a sign."""
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
    """The keys of the architecture."""
    found: dict[str, Any] = {
        "vocab_size": c.vocab_size,
        "context_length": c.max_position_embeddings,
        "embedding_length": c.hidden_size,
        "block_count": c.num_hidden_layers,
        "feed_forward_length": c.intermediate_size,
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
    return {f"{arch}.{name}": value for name, value in (found | _scaling(c)).items()}


def _latent_settings(c: ModelConfig) -> dict[str, Any]:
    """DeepSeek's; the heads share one key, as in absorbed form."""
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
    if c.n_routed_experts:
        found |= {
            "expert_weights_scale": float(c.routed_scaling_factor),
            "expert_weights_norm": c.norm_topk_prob,
            "expert_gating_func": SIGMOID if c.scoring_func == "sigmoid" else SOFTMAX,
            "expert_group_count": c.n_group,
            "expert_group_used_count": c.topk_group,
        }
    return found


def _scaling(c: ModelConfig) -> dict[str, Any]:
    scaling = c.rope_scaling
    if isinstance(scaling, LinearRope):
        return {"rope.scaling.type": "linear", "rope.scaling.factor": scaling.factor}
    if not isinstance(scaling, Yarn):
        return {}
    found = {
        "rope.scaling.type": "yarn",
        "rope.scaling.factor": scaling.factor,
        "rope.scaling.original_context_length": scaling.original_max_position_embeddings,
        "rope.scaling.yarn_beta_fast": scaling.beta_fast,
        "rope.scaling.yarn_beta_slow": scaling.beta_slow,
    }
    if (
        c.attention == "mla" and scaling.mscale_all_dim
    ):  # a tenth of what other architectures write (llama.cpp PR 17945)
        found["rope.scaling.yarn_log_multiplier"] = 0.1 * scaling.mscale_all_dim
    return found


def tensors(model: Transformer, meta: bool = False) -> Iterator[tuple[str, Tensor]]:
    """GGUF's names and tensors, one at a time; with `meta` their shapes alone."""
    if meta:
        with torch.device("meta"):
            model = Transformer(model.config)
    c = model.config
    yield "token_embd.weight", model.embed
    for number, block in enumerate(model.blocks):
        assert isinstance(block, Block), "of a plain model"
        for name, tensor in _block(block, c):
            yield f"blk.{number}.{name}", tensor
    yield "output_norm.weight", model.norm.weight
    if not c.tie_word_embeddings:
        yield "output.weight", model.head.weight
    if isinstance(c.rope_scaling, Llama3Rope):
        yield FREQUENCIES, (plain_frequencies(c.rope_dim, c.rope_theta) / inverse_frequencies(c).double()).float()


def _block(block: Block, c: ModelConfig) -> Iterator[tuple[str, Tensor]]:
    before, between = block.attention_norm, block.feed_forward_norm
    assert isinstance(before, RMSNorm) and isinstance(between, RMSNorm), "of a family that GGUF knows"
    yield "attn_norm.weight", before.weight
    yield from _grouped(block.attention, c) if isinstance(block.attention, GQA) else _latent(block.attention, c)
    yield "ffn_norm.weight", between.weight
    ff = block.feed_forward
    if isinstance(ff, SwiGLU):
        yield from _swiglu(ff, "")
        return
    assert isinstance(ff, MoE), "a feed-forward is one of the two"
    yield "ffn_gate_inp.weight", ff.router.weight
    if c.scoring_func == "sigmoid":
        yield "exp_probs_b.bias", ff.router.bias
    gate, up = ff.gate_up.chunk(2, dim=1)
    yield from (("ffn_gate_exps.weight", gate), ("ffn_up_exps.weight", up), ("ffn_down_exps.weight", ff.down))
    if c.n_shared_experts:
        yield from _swiglu(ff.shared, "_shexp")


def _swiglu(ff: SwiGLU, ending: str) -> Iterator[tuple[str, Tensor]]:
    gate, up = ff.gate_up.weight.chunk(2)
    yield from ((f"ffn_gate{ending}.weight", gate), (f"ffn_up{ending}.weight", up))
    yield f"ffn_down{ending}.weight", ff.down.weight


def _grouped(a: GQA, c: ModelConfig) -> Iterator[tuple[str, Tensor]]:
    parts: list[tuple[str, Tensor, Tensor | None, int]] = []
    parts.append(("attn_q", a.query.weight, a.query.bias, c.num_attention_heads))
    biases = (None, None) if a.key_value.bias is None else a.key_value.bias.chunk(2)
    for name, weight, bias in zip(("attn_k", "attn_v"), a.key_value.weight.chunk(2), biases, strict=True):
        parts.append((name, weight, bias, c.num_key_value_heads))
    pairs = ARCHITECTURES[family_of(c)] == "llama"
    for name, weight, bias, heads in parts:
        for ending, tensor in (("weight", weight), ("bias", bias)):
            if tensor is not None:
                is_paired = pairs and name != "attn_v"
                yield f"{name}.{ending}", _paired(tensor, heads) if is_paired else tensor
    yield "attn_output.weight", a.out.weight
    if a.out.bias is not None:
        yield "attn_output.bias", a.out.bias
    if c.qk_norm:
        yield from (("attn_q_norm.weight", a.query_norm.weight), ("attn_k_norm.weight", a.key_norm.weight))


def _paired(tensor: Tensor, heads: int) -> Tensor:
    """Rows of each head from [first halves | second halves] to neighbouring pairs."""
    return tensor.unflatten(0, (heads, 2, -1)).transpose(1, 2).reshape(tensor.shape)


def _latent(a: Any, c: ModelConfig) -> Iterator[tuple[str, Tensor]]:
    if c.q_lora_rank is None:
        yield "attn_q.weight", a.q_up.weight
    else:
        yield from (("attn_q_a.weight", a.q_down.weight), ("attn_q_a_norm.weight", a.q_norm.weight))
        yield "attn_q_b.weight", a.q_up.weight
    yield from (("attn_kv_a_mqa.weight", a.kv_down.weight), ("attn_kv_a_norm.weight", a.kv_norm.weight))
    keys, values = a.absorbed_weights(a.kv_up.weight.dtype)
    yield from (("attn_k_b.weight", keys.transpose(1, 2)), ("attn_v_b.weight", values))
    yield "attn_output.weight", a.out.weight
