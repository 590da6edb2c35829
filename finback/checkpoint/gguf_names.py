"""The table of GGUF's and Hugging Face's tensor names, and where parts of stacked and split tensors are.

GGUF stores the experts of a layer in one tensor, and DeepSeek's up-projection of latents in two, with the keys' part
transposed.
"""

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

from finback.checkpoint.names import EXPERTS, MIXTRAL

# transformers' family -> architecture; of an architecture's families a file is the first unless its keys say otherwise
ARCHITECTURES = {
    "llama": "llama",
    "mistral": "llama",
    "mixtral": "llama",
    "smollm3": "smollm3",
    "gemma3_text": "gemma3",
    "qwen2": "qwen2",
    "qwen3": "qwen3",
    "qwen3_moe": "qwen3moe",
    "gpt_oss": "gpt-oss",
    "glm4_moe": "glm4moe",
    "phi3": "phi3",
    "olmo2": "olmo2",
    "olmo3": "olmo2",
    "deepseek_v2": "deepseek2",
    "deepseek_v3": "deepseek2",
}
TOP = {
    "token_embd.weight": "model.embed_tokens.weight",
    "output_norm.weight": "model.norm.weight",
    "output.weight": "lm_head.weight",
}
BLOCK = {
    "attn_norm": "input_layernorm",
    "ffn_norm": "post_attention_layernorm",
    "post_attention_norm": "post_attention_layernorm",
    "post_ffw_norm": "post_feedforward_layernorm",
    "attn_q": "self_attn.q_proj",
    "attn_k": "self_attn.k_proj",
    "attn_v": "self_attn.v_proj",
    "attn_output": "self_attn.o_proj",
    "attn_q_norm": "self_attn.q_norm",
    "attn_k_norm": "self_attn.k_norm",
    "attn_q_a": "self_attn.q_a_proj",
    "attn_q_a_norm": "self_attn.q_a_layernorm",
    "attn_q_b": "self_attn.q_b_proj",
    "attn_kv_a_mqa": "self_attn.kv_a_proj_with_mqa",
    "attn_kv_a_norm": "self_attn.kv_a_layernorm",
    "attn_kv_b": "self_attn.kv_b_proj",
    "ffn_gate": "mlp.gate_proj",
    "ffn_up": "mlp.up_proj",
    "ffn_down": "mlp.down_proj",
    "ffn_gate_inp": "mlp.gate",
    "ffn_gate_shexp": "mlp.shared_experts.gate_proj",
    "ffn_up_shexp": "mlp.shared_experts.up_proj",
    "ffn_down_shexp": "mlp.shared_experts.down_proj",
}
# parts of attention and feed-forward that may be fused row-wise into one tensor
QKV = ("self_attn.q_proj", "self_attn.k_proj", "self_attn.v_proj")
GATE_UP = ("mlp.gate_proj", "mlp.up_proj")
# families with other names for some of these
OTHERWISE = {
    "gemma3_text": {"ffn_norm": "pre_feedforward_layernorm"},
    "gpt_oss": {"ffn_gate_inp": "mlp.router"},
    "mixtral": {"ffn_gate_inp": f"{MIXTRAL[0]}.gate"},
}
# families whose query and key rows are stored in pairs for interleaved rotation
PAIRED = ("llama", "mistral", "mixtral", "smollm3")
# stacks of experts -> which of gate, up and down they contain
STACKS = {"ffn_gate_exps": (0,), "ffn_up_exps": (1,), "ffn_down_exps": (2,), "ffn_gate_up_exps": (0, 1)}
# names of MTP layers' tensors, after `nextn`
NEXTN = {
    "eh_proj": "eh_proj",
    "enorm": "enorm",
    "hnorm": "hnorm",
    "embed_tokens": "embed_tokens",
    "shared_head_head": "shared_head.head",
    "shared_head_norm": "shared_head.norm",
}
KEYS, VALUES = "attn_k_b", "attn_v_b"


@dataclass(frozen=True)
class StoredPart:
    """The position of a Hugging Face tensor in a GGUF file."""

    stored: str
    shape: tuple[int, ...]
    # index of the matrix in a stack
    index: int | None = None
    # its first row
    start: int = 0
    # name of the values' part of an up-projection, where `stored` is the keys' part
    values: str = ""

    def of(self, data: Any) -> Any:
        """Returns its rows, or their bytes, from the stored data."""
        matrix = data if self.index is None else data[self.index]
        return matrix[self.start : self.start + self.shape[0]]


def pieces(shapes: dict[str, tuple[int, ...]], raw: dict[str, Any]) -> Iterator[tuple[str, StoredPart]]:
    """Yields each tensor's Hugging Face name and position, given GGUF names, shapes (outermost first) and config.json.

    Unknown tensors keep their names, and the audit reports them as unexpected.
    """
    family = raw["model_type"]
    block = BLOCK | OTHERWISE.get(family, {})
    for name, shape in shapes.items():
        match name.split("."):
            case ["blk", layer, part, kind] if part in STACKS and len(shape) == 2 + (kind == "weight"):
                yield from _experts(name, f"model.layers.{layer}.", family, STACKS[part], shape)
            case ["blk", layer, "nextn", part, kind] if part in NEXTN:
                yield f"model.layers.{layer}.{NEXTN[part]}.{kind}", StoredPart(name, shape)
            case ["blk", layer, "attn_sinks", "weight"]:
                yield f"model.layers.{layer}.self_attn.sinks", StoredPart(name, shape)
            case ["blk", layer, "exp_probs_b", _]:
                yield f"model.layers.{layer}.mlp.gate.e_score_correction_bias", StoredPart(name, shape)
            case ["blk", layer, part, "weight"] if part == KEYS and len(shape) == 3:
                values = name.replace(KEYS, VALUES)
                heads, rank, keys = shape
                joined = heads * (keys + shapes.get(values, (0, 0))[1]), rank
                yield f"model.layers.{layer}.{BLOCK['attn_kv_b']}.weight", StoredPart(name, joined, values=values)
            case ["blk", _, part, "weight"] if part == VALUES and name.replace(VALUES, KEYS) in shapes:
                continue
            case ["blk", layer, "attn_qkv", kind] if raw.get("head_dim"):
                query, shared = (raw["head_dim"] * raw[f"num_{heads}_heads"] for heads in ("attention", "key_value"))
                yield from _over_one_another(name, layer, QKV, (query, shared, shared), shape)
            case ["blk", layer, "ffn_up", kind] if shape[0] == 2 * raw["intermediate_size"]:
                yield from _over_one_another(name, layer, GATE_UP, (shape[0] // 2,) * 2, shape)
            case ["blk", layer, part, kind] if part in block:
                yield f"model.layers.{layer}.{block[part]}.{kind}", StoredPart(name, shape)
            case _:
                yield TOP.get(name, name), StoredPart(name, shape)


def _over_one_another(
    name: str, layer: str, parts: tuple[str, ...], rows: tuple[int, ...], shape: tuple[int, ...]
) -> Iterator[tuple[str, StoredPart]]:
    """Yields the parts of a tensor, each with its number of rows."""
    start = 0
    for part, height in zip(parts, rows, strict=True):
        yield (
            f"model.layers.{layer}.{part}.{name.rpartition('.')[2]}",
            StoredPart(name, (height, *shape[1:]), start=start),
        )
        start += height


def _experts(
    name: str, stem: str, family: str, kinds: tuple[int, ...], shape: tuple[int, ...]
) -> Iterator[tuple[str, StoredPart]]:
    """Yields each expert's equal parts of a stack of matrices (experts, rows, columns) or biases (experts, rows)."""
    height, ending = shape[1] // len(kinds), name.rpartition(".")[2]
    module, *matrices = MIXTRAL if family == "mixtral" else EXPERTS
    for expert in range(shape[0]):
        for place, kind in enumerate(kinds):
            theirs = f"{stem}{module}.experts.{expert}.{matrices[kind]}.{ending}"
            yield theirs, StoredPart(name, (height, *shape[2:]), expert, place * height)
