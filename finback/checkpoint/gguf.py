"""GGUF files of the dense families: their metadata as a config.json, their tensors under Hugging Face's names.

The gguf library dequantizes tensors, one at a time. Beyond names two things differ: Llama's query and key
rows are stored for interleaved rotation, and Llama 3's frequency scaling is a tensor instead of a setting.
"""

import re
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from finback.checkpoint.hf_config import model_config
from finback.checkpoint.shards import Spec, Weights
from finback.config import UserError
from finback.extras import how_to_install
from finback.model.rope import inverse_frequencies

FAMILIES = {"llama": "llama", "qwen2": "qwen2", "qwen3": "qwen3"}
_TOP = {
    "token_embd.weight": "model.embed_tokens.weight",
    "output_norm.weight": "model.norm.weight",
    "output.weight": "lm_head.weight",
}
_BLOCK = {
    "attn_norm": "input_layernorm",
    "ffn_norm": "post_attention_layernorm",
    "attn_q": "self_attn.q_proj",
    "attn_k": "self_attn.k_proj",
    "attn_v": "self_attn.v_proj",
    "attn_output": "self_attn.o_proj",
    "attn_q_norm": "self_attn.q_norm",
    "attn_k_norm": "self_attn.k_norm",
    "ffn_gate": "mlp.gate_proj",
    "ffn_up": "mlp.up_proj",
    "ffn_down": "mlp.down_proj",
}
_FREQUENCIES = "rope_freqs.weight"


def open_gguf(path: Path) -> Any:
    """A gguf.GGUFReader; UserError when the library is missing or the file is not GGUF."""
    try:
        import gguf
    except ImportError:
        raise UserError(
            "model", str(path), "reading GGUF needs the gguf package", how_to_install("gguf>=0.17")
        ) from None
    if not path.is_file():
        raise UserError("model", str(path), "no such file", "Name a .gguf file.")
    try:
        return gguf.GGUFReader(path)
    except PermissionError as error:
        problem = f"cannot be read ({error.strerror})"
        raise UserError("model", str(path), problem, "Give yourself the right to read it.") from None
    except Exception as error:  # the library raises whatever numpy raises on a short file
        raise UserError("model", str(path), f"not a whole GGUF file ({error})", "Download it again.") from None


def field(reader: Any, name: str, *default: Any) -> Any:
    """A metadata value of a GGUF file; UserError where it is missing and there is no default."""
    if (found := reader.fields.get(name)) is not None:
        return found.contents()
    if not default:
        raise UserError("GGUF", name, "missing from the file's metadata", "Use a complete file.")
    return default[0]


def open_parts(path: Path) -> list[Any]:
    """Readers of a file and of those that belong to it; the first of a split model names all of them, and is the one to name."""
    first = open_gguf(path)
    count = int(field(first, "split.count", 1))
    if count <= 1:
        return [first]
    stem = re.fullmatch(r"(.*)-\d{5}-of-\d{5}", path.stem)
    parts = [
        path.with_name(f"{stem[1] if stem else path.stem}-{n:05}-of-{count:05}{path.suffix}")
        for n in range(1, count + 1)
    ]
    if path != parts[0]:
        problem = f"part {int(field(first, 'split.no', 0)) + 1} of {count}"
        raise UserError(
            "model", str(path), problem, f"Name the first one, as it was called when it was split: {parts[0].name}"
        )
    readers = [first, *map(open_gguf, parts[1:])]
    found, wanted = sum(len(reader.tensors) for reader in readers), field(first, "split.tensors.count", None)
    if wanted is not None and found != wanted:
        problem = f"{count} parts with {found} tensors, where the first says {wanted}"
        raise UserError("model", str(path), problem, "Download all parts again.")
    return readers


class GGUF(Weights):
    """A GGUF file, whose tensors are dequantized as they are read; `raw` is the config.json it amounts to."""

    def __init__(self, path: Path) -> None:
        self.path = path
        readers = open_parts(path)
        stored = {t.name: t for reader in readers for t in reader.tensors}
        self.tensors = {_name(name): t for name, t in stored.items() if name != _FREQUENCIES}
        self.raw = _raw_config(readers[0], stored, path)
        self.specs = {
            name: Spec("F32", tuple(int(n) for n in reversed(t.shape)), path) for name, t in self.tensors.items()
        }
        self.kinds = sorted({t.tensor_type.name for t in stored.values()})

    def read(self, name: str) -> Tensor:
        """One tensor, dequantized to fp32."""
        from gguf import quants

        tensor = self.tensors[name]
        try:
            values = torch.from_numpy(quants.dequantize(tensor.data, tensor.tensor_type).copy())
        except NotImplementedError:
            kind = tensor.tensor_type.name
            raise UserError(
                name, str(self.path), f"{kind}, which the gguf library does not dequantize", "Use another quantization."
            ) from None
        if self.raw["model_type"] == "llama" and ("q_proj." in name or "k_proj." in name):
            heads = self.raw["num_attention_heads" if "q_proj" in name else "num_key_value_heads"]
            # rows were taken from [first halves | second halves] to pairs; take them back
            return values.unflatten(0, (heads, -1, 2)).transpose(1, 2).reshape(values.shape)
        return values


def _name(theirs: str) -> str:
    """GGUF's name -> Hugging Face's; unknown ones stay as they are and are then reported as unexpected."""
    if theirs in _TOP:
        return _TOP[theirs]
    match theirs.split("."):
        case ["blk", layer, part, kind] if part in _BLOCK:
            return f"model.layers.{layer}.{_BLOCK[part]}.{kind}"
    return theirs


def _raw_config(reader: Any, tensors: dict[str, Any], path: Path) -> dict[str, Any]:
    arch = field(reader, "general.architecture")
    if arch not in FAMILIES:
        raise UserError(
            "model", str(path), f"a GGUF file of the family {arch!r}", f"finback reads GGUF of {', '.join(FAMILIES)}."
        )

    def get(name: str, *default: Any) -> Any:
        return field(reader, f"{arch}.{name}", *default)

    heads, width = get("attention.head_count"), get("embedding_length")
    head_dim = get("attention.key_length", get("rope.dimension_count", width // heads))
    embedding = tensors.get("token_embd.weight")
    if embedding is None:
        raise UserError("model", str(path), "has no token_embd.weight", "Use a complete file.")
    raw = {
        "model_type": FAMILIES[arch],
        "vocab_size": int(embedding.shape[1]),
        "hidden_size": width,
        "num_hidden_layers": get("block_count"),
        "num_attention_heads": heads,
        "num_key_value_heads": get("attention.head_count_kv", heads),
        "head_dim": head_dim,
        "intermediate_size": get("feed_forward_length"),
        "max_position_embeddings": get("context_length"),
        "rms_norm_eps": round(get("attention.layer_norm_rms_epsilon"), 12),
        "rope_theta": get("rope.freq_base", 10000.0),
        "tie_word_embeddings": "output.weight" not in tensors,
        "attention_bias": "blk.0.attn_output.bias" in tensors,
        "bos_token_id": field(reader, "tokenizer.ggml.bos_token_id", None),
        "eos_token_id": field(reader, "tokenizer.ggml.eos_token_id", None),
    }
    kind = get("rope.scaling.type", "none")
    if kind != "none":
        raw["rope_scaling"] = {
            "rope_type": kind,
            "factor": get("rope.scaling.factor"),
            "original_max_position_embeddings": get("rope.scaling.original_context_length", get("context_length")),
        }
    if _FREQUENCIES in tensors:
        raw["rope_scaling"] = _llama3(torch.tensor(tensors[_FREQUENCIES].data), raw, path)
    return raw


def _llama3(divisors: Tensor, raw: dict[str, Any], path: Path) -> dict[str, Any]:
    """The Llama 3 setting whose frequencies are these; its releases use factors 8 and 32."""
    plain = inverse_frequencies(model_config(raw | {"rope_scaling": None}))
    for factor in (8.0, 32.0):
        setting = {
            "rope_type": "llama3",
            "factor": factor,
            "low_freq_factor": 1.0,
            "high_freq_factor": 4.0,
            "original_max_position_embeddings": 8192,
        }
        scaled = inverse_frequencies(model_config(raw | {"rope_scaling": setting}))
        if divisors.shape == plain.shape and torch.allclose(plain / divisors, scaled, rtol=1e-4):
            return setting
    raise UserError(_FREQUENCIES, str(path), "not the frequencies of a Llama 3 release", "Use its safetensors files.")
