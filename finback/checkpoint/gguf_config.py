"""Converts a GGUF file's metadata to the equivalent config.json."""

import itertools
import re
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from finback.checkpoint.gguf_keys import ArchitectureKeys as Get
from finback.checkpoint.gguf_keys import field
from finback.checkpoint.gguf_names import ARCHITECTURES
from finback.checkpoint.hf_config import model_config
from finback.checkpoint.hf_grouped import FULL, SLIDING
from finback.config import UserError
from finback.model.rope import inverse_frequencies
from finback.model.rope_scaling import Yarn

# divisors of rotary frequencies: Llama 3's, and LongRoPE's for long and short rows
FREQUENCIES, LONG, SHORT = "rope_freqs.weight", "rope_factors_long.weight", "rope_factors_short.weight"
ROTATIONS = (FREQUENCIES, LONG, SHORT)
# without a pattern in the file, every n-th layer is full and the others slide
STEPS = {"gemma3": 6, "gpt-oss": 2, "olmo2": 4}
PARTLY_ROTATED = ("glm4moe", "phi3")
GEMMA_27B = 62  # layers; its scores are scaled by hidden_size / heads instead of head_dim
OF_AN_EXPERT = re.compile(r"blk\.\d+\.ffn_(gate|up|down)\.\d+\.weight")
SOFTMAX, SIGMOID = 1, 2  # expert_gating_func


def raw_config(reader: Any, tensors: dict[str, Any], path: Path) -> dict[str, Any]:
    """Returns the config.json of a file with this metadata and these tensors (by GGUF's names)."""
    arch = field(reader, "general.architecture")
    families = [family for family, name in ARCHITECTURES.items() if name == arch]
    if not families:
        known = ", ".join(dict.fromkeys(ARCHITECTURES.values()))
        raise UserError("model", str(path), f"a GGUF file of the family {arch!r}", f"finback reads GGUF of {known}.")
    get = Get(reader, arch)
    embedding = tensors.get("token_embd.weight")
    if (kind := field(reader, "general.type", "model")) != "model":
        remedy = (
            "Name the model's file; adapters are read as PEFT folders."
            if kind == "adapter"
            else "Name the model's file."
        )
        raise UserError("model", str(path), f"a GGUF file that holds no model ({kind})", remedy)
    if embedding is None or len(embedding.shape) != 2:
        raise UserError("model", str(path), "has no matrix token_embd.weight", "Use a complete file.")
    if any(OF_AN_EXPERT.fullmatch(name) for name in tensors):
        problem = "a GGUF file of 2023, with a tensor for each expert, which llama.cpp does not open any more either"
        remedy = "Use a newer file of the model, or its safetensors files."
        raise UserError("model", str(path), problem, remedy)
    raw = {
        "model_type": families[0],
        "vocab_size": int(embedding.shape[1]),
        "hidden_size": get("embedding_length"),
        "num_hidden_layers": get("block_count"),
        "num_attention_heads": get("attention.head_count"),
        "intermediate_size": get("feed_forward_length", 0) or get("expert_feed_forward_length", 0),
        "max_position_embeddings": get("context_length"),
        "rms_norm_eps": round(get("attention.layer_norm_rms_epsilon"), 12),
        "rope_theta": get("rope.freq_base", 10000.0),
        "tie_word_embeddings": "output.weight" not in tensors,
        "bos_token_id": field(reader, "tokenizer.ggml.bos_token_id", None),
        "eos_token_id": field(reader, "tokenizer.ggml.eos_token_id", None),
    }
    raw |= _latent(get) if arch == "deepseek2" else _grouped(get, tensors)
    raw |= _windows(get, raw)
    raw |= _of_family(arch, get, raw, tensors)
    if found := _scalings(get, raw, tensors, path):
        raw["rope_scaling"], *more = found
        if more:
            problem = f"scales its rotation in {len(found)} ways at once"
            raise UserError("model", str(path), problem, "Use the model's safetensors files.")
    # keys that may repeat these values for sliding layers or for value heads
    heads = dict.fromkeys(("value_length", "key_length_swa", "value_length_swa"), raw.get("head_dim"))
    repeated = {f"attention.{name}": width for name, width in heads.items()} | {"rope.freq_base_swa": raw["rope_theta"]}
    get.refuse_unread(repeated | {"rope.dimension_count_swa": get("rope.dimension_count", None)})
    return raw


def _windows(get: Get, raw: dict[str, Any]) -> dict[str, Any]:
    """Reads sliding windows, for all architectures that have them; a window of 0 means none."""
    window, layers = get("attention.sliding_window", 0), range(raw["num_hidden_layers"])
    if (step := STEPS.get(get.arch)) and (window or get.arch == "gemma3"):
        found = get("attention.sliding_window_pattern", step)
        slides = found if isinstance(found, list) else [bool((layer + 1) % found) for layer in layers]
        return {"sliding_window": window or 4096, "layer_types": [SLIDING if kind else FULL for kind in slides]}
    if window and get.arch in ("llama", "phi3"):
        return {"sliding_window": window} | ({"model_type": "mistral"} if get.arch == "llama" else {})
    if 0 < window < raw["max_position_embeddings"]:
        problem = "finback knows no windows of this architecture, nor does llama.cpp"
        raise UserError("GGUF attention.sliding_window", window, problem, "Use the model's safetensors files.")
    return {}


def _of_family(arch: str, get: Get, raw: dict[str, Any], tensors: dict[str, Any]) -> dict[str, Any]:
    """Returns the fields that are specific to one architecture, read or implied."""
    if arch == "qwen3moe":
        return _experts(get, ("num_experts", "num_experts_per_tok")) | {"norm_topk_prob": True}
    if arch == "llama" and get("expert_count", 0):
        return _experts(get, ("num_local_experts", "num_experts_per_tok")) | {"model_type": "mixtral"}
    if arch == "gemma3":
        scaled = raw["hidden_size"] // raw["num_attention_heads"]
        return {
            "query_pre_attn_scalar": scaled if raw["num_hidden_layers"] == GEMMA_27B else raw["head_dim"],
            "rope_local_base_freq": get("rope.freq_base_swa", 10000.0),
        }
    if arch == "gpt-oss":
        found = _experts(get, ("num_local_experts", "num_experts_per_tok"))
        width = found.pop("moe_intermediate_size")
        return found | {"intermediate_size": width}
    if arch == "glm4moe":
        nextn = get("nextn_predict_layers", 0)
        if (gate := get("expert_gating_func", 0) or SIGMOID) != SIGMOID:
            raise UserError("GGUF expert_gating_func", gate, "glm4moe has sigmoid (2)", "Use a complete file.")
        return _gate(get) | {
            "use_qk_norm": "blk.0.attn_q_norm.weight" in tensors,
            "attention_bias": "blk.0.attn_q.bias" in tensors,
            "num_hidden_layers": get("block_count") - nextn,
            "num_nextn_predict_layers": nextn,
        }
    if arch == "olmo2" and "sliding_window" in raw:
        return {"model_type": "olmo3", "rope_parameters": {SLIDING: {"rope_theta": raw["rope_theta"]}}}
    return {}


def _grouped(get: Get, tensors: dict[str, Any]) -> dict[str, Any]:
    heads = get("attention.head_count")
    usual = get("embedding_length") // heads
    rotated = get("rope.dimension_count", usual)
    width = get("attention.key_length", usual if get.arch in PARTLY_ROTATED else rotated)
    return {
        "num_key_value_heads": get("attention.head_count_kv", heads),
        "head_dim": width,
        "partial_rotary_factor": get("rope.dimension_count", width) / width,
        "attention_bias": "blk.0.attn_output.bias" in tensors,
    }


def _experts(get: Get, names: tuple[str, str]) -> dict[str, Any]:
    """Returns the number of experts, of chosen experts, and their width."""
    counts = get("expert_count", 0), get("expert_used_count", 0)
    return dict(zip(names, counts, strict=True)) | {"moe_intermediate_size": get("expert_feed_forward_length", 0)}


def _gate(get: Get) -> dict[str, Any]:
    """Reads the gate of DeepSeek's experts, and of experts chosen in the same way."""
    return _experts(get, ("n_routed_experts", "num_experts_per_tok")) | {
        "n_group": get("expert_group_count", 0) or 1,
        "topk_group": get("expert_group_used_count", 0) or 1,
        "n_shared_experts": get("expert_shared_count", 0),
        "first_k_dense_replace": get("leading_dense_block_count", 0),
        "routed_scaling_factor": get("expert_weights_scale", 1.0) or 1.0,
        "norm_topk_prob": bool(get("expert_weights_norm", False)),
    }


def _latent(get: Get) -> dict[str, Any]:
    """Reads DeepSeek-V2, V3 and Kimi, which differ in their gate's function."""
    rotated, layers = get("rope.dimension_count"), get("block_count")
    gate = _gate(get)
    # older files lack the key: like llama.cpp, assume V3 for V3's shape and V2 otherwise
    guess = SIGMOID if (layers, gate["n_routed_experts"]) == (61, 256) else SOFTMAX
    is_v3 = not gate["n_routed_experts"] or (get("expert_gating_func", 0) or guess) == SIGMOID
    return gate | {
        "model_type": "deepseek_v3" if is_v3 else "deepseek_v2",
        "q_lora_rank": get("attention.q_lora_rank", None),
        "kv_lora_rank": get("attention.kv_lora_rank"),
        "qk_rope_head_dim": rotated,
        "qk_nope_head_dim": get("attention.key_length_mla", get("attention.key_length", 0)) - rotated,
        "v_head_dim": get("attention.value_length_mla", get("attention.value_length", 0)),
        "first_k_dense_replace": gate["first_k_dense_replace"] if gate["n_routed_experts"] else layers,
        "topk_method": "noaux_tc" if is_v3 else "group_limited_greedy",
        "num_nextn_predict_layers": 0,
    }


def _scalings(get: Get, raw: dict[str, Any], tensors: dict[str, Any], path: Path) -> list[dict[str, Any]]:
    """Returns all rotary scalings of the file, from its keys and from its tensors."""
    found = []
    if (scaling := _scaling(get)) is not None:
        # gpt-oss's ramp ends between pairs, for which GGUF has no key
        found.append(scaling | ({"truncate": False} if get.arch == "gpt-oss" else {}))
    if FREQUENCIES in tensors and not (tensors[FREQUENCIES].data == 1).all():
        found.append(_llama3(torch.tensor(tensors[FREQUENCIES].data), raw, path))
    if LONG in tensors and SHORT in tensors:
        found.append(_long(get, tensors))
    return found


def _scaling(get: Get) -> dict[str, Any] | None:
    """Returns `rope_scaling`; old files declare linear scaling by its factor alone."""
    kind, linear = get("rope.scaling.type", "none"), get("rope.scale_linear", None)
    if kind in ("none", "longrope"):
        return {"rope_type": "linear", "factor": linear} if linear not in (None, 1.0) else None
    found = {
        "rope_type": kind,
        "factor": get("rope.scaling.factor"),
        "original_max_position_embeddings": get("rope.scaling.original_context_length", get("context_length")),
    }
    for ours, theirs in (("beta_fast", "yarn_beta_fast"), ("beta_slow", "yarn_beta_slow")):
        if (value := get(f"rope.scaling.{theirs}", None)) is not None:
            found[ours] = value
    # DeepSeek's multiplier is 0.1 mscale_all_dim, which equals mscale in all releases
    if get.arch == "deepseek2":
        if multiplier := get("rope.scaling.yarn_log_multiplier", 0.0):
            found["mscale"] = found["mscale_all_dim"] = round(10 * multiplier, 6)
    elif (gain := get("rope.scaling.attn_factor", 1.0)) != 1.0 and kind == "yarn":
        # the gain of cos and sin, on top of YaRN's default gain
        found["attention_factor"] = gain * Yarn(found["factor"], mscale_all_dim=0.0).gain
    return found


def _long(get: Get, tensors: dict[str, Any]) -> dict[str, Any]:
    """Returns LongRoPE's settings, with the gain of cos and sin made explicit."""
    return {
        "rope_type": "longrope",
        "short_factor": tensors[SHORT].data.tolist(),
        "long_factor": tensors[LONG].data.tolist(),
        "original_max_position_embeddings": get("rope.scaling.original_context_length", get("context_length")),
        "attention_factor": get("rope.scaling.attn_factor", 1.0),
    }


def _llama3(divisors: Tensor, raw: dict[str, Any], path: Path) -> dict[str, Any]:
    """Finds the Llama 3 scaling with these frequencies, given the releases' ramp.

    The lowest frequencies are divided by the factor, if the ramp ends before them; the releases' factors are 8 and 32.
    """
    plain = inverse_frequencies(model_config(raw | {"rope_scaling": None}))
    windows = (8192, 4096, 16384, 32768, 2048, raw["max_position_embeddings"])
    for factor, window in itertools.product((float(divisors.max()), 8.0, 32.0), windows):
        setting = {"rope_type": "llama3", "factor": factor, "low_freq_factor": 1.0, "high_freq_factor": 4.0}
        setting |= {"original_max_position_embeddings": window}
        scaled = inverse_frequencies(model_config(raw | {"rope_scaling": setting}))
        if divisors.shape == plain.shape and torch.allclose(plain / divisors, scaled, rtol=1e-4):
            return setting
    raise UserError(FREQUENCIES, str(path), "not the frequencies of a Llama 3 model", "Use its safetensors files.")
