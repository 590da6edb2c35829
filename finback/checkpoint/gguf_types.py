"""Chooses each tensor's type in a GGUF file: as requested, by llama.cpp's mix, or a fallback for other row lengths."""

from typing import Any, Literal

import numpy as np
from torch import Tensor

from finback.checkpoint import k_quants
from finback.kernels.quants import KINDS

GgufType = Literal["f32", "f16", "bf16", "q8_0", "q6_k", "q5_0", "q4_0", "q4_k_m"]
FALLBACK = {"Q4_K": "Q5_0", "Q6_K": "Q8_0"}  # if rows do not fill blocks; other types fall back to F16
DIVIDED = ("attn_v.weight", "attn_kv_b.weight", "ffn_down.weight", "ffn_down_exps.weight", "ffn_down_shexp.weight")


def file_type(asked: GgufType) -> str:
    """Returns the LlamaFileType name of a requested type."""
    return "ALL_F32" if asked == "f32" else f"MOSTLY_{asked.upper()}"


def kind_of(name: str, shape: tuple[int, ...], asked: GgufType, layers: int, tied: bool) -> str:
    """Returns the name of a tensor's GGMLQuantizationType; vectors and routers stay in F32."""
    if len(shape) < 2 or name.endswith(("ffn_gate_inp.weight", ".bias")):
        return "F32"
    wanted = _mixed(name, layers, tied) if asked == "q4_k_m" else asked.upper()
    while (kind := KINDS.get(wanted)) is not None and shape[-1] % kind.columns:
        wanted = FALLBACK.get(wanted, "F16")
    return wanted


def _mixed(name: str, layers: int, tied: bool) -> str:
    """Returns llama.cpp's choice for Q4_K_M: Q6_K or Q4_K.

    Q6_K is for the head and for fused queries, keys and values (where llama.cpp itself takes Q5_K), and for values and
    down-projections in the first and last eighth of the layers and in every third layer between.
    """
    if name == "output.weight" or (tied and name == "token_embd.weight") or name.endswith("attn_qkv.weight"):
        return "Q6_K"
    if not name.endswith(DIVIDED):
        return "Q4_K"
    layer, eighth = int(name.split(".")[1]), layers // 8
    return "Q6_K" if layer < eighth or layer >= 7 * layers // 8 or (layer - eighth) % 3 == 2 else "Q4_K"


def packed(tensor: Tensor, kind: str) -> Any:
    """Returns a tensor's values as the file stores them."""
    from gguf import GGMLQuantizationType, quants

    if kind in FALLBACK:
        return k_quants.quantize(tensor, kind)
    plain = tensor.detach().float().contiguous().numpy()
    return np.ascontiguousarray(quants.quantize(plain, GGMLQuantizationType[kind]))
