"""Maps differently named or fused tensors of a folder to the names and parts of the name table, and back.

Reading only rewrites the files' headers: no values are read or copied. The rules are those by which transformers loads:
the prefix `model.` may be missing; experts, queries and gates may be fused; either tensor of a tied pair may be stored.
"""

import math
import re
from collections.abc import Iterator

import torch
from torch import Tensor

from finback.checkpoint import names, v4_names
from finback.checkpoint.hf_export_as import family_of
from finback.checkpoint.shards import WIDTHS, Spec
from finback.checkpoint.stacked_experts import stack_names, stacked
from finback.model.config import ModelConfig

_TRUNK = ("layers.", "embed_tokens.", "norm.")
_MATRICES = names.EXPERTS[1:]
_EXPERT = re.compile(rf"(.*)\.mlp\.experts\.(\d+)\.({'|'.join(_MATRICES)})\.weight")
_EXPERTS = re.compile(r"(.*\.mlp\.experts)\.(gate_up_proj|down_proj)")


def as_named(specs: dict[str, Spec], config: ModelConfig) -> dict[str, Spec]:
    """Returns a folder's specs under the table's names; unknown names are left as they are."""
    found: dict[str, Spec] = {}
    if config.attention == "compressed":
        named = (pair for name, spec in specs.items() for pair in parts_of(name, spec, config))
        found = {v4_names.released(name): spec for name, spec in named}
        return _untied(found, config, "embed.weight", "head.weight")
    is_bare = not any(name.startswith("model.") for name in specs)
    for name, spec in specs.items():
        if is_bare and name.startswith(_TRUNK):
            name = f"model.{name}"
        found |= dict(parts_of(name, spec, config))
    if names.is_mixtral(config):
        found = {_of_mixtral(name): spec for name, spec in found.items()}
    return _untied(found, config, "model.embed_tokens.weight", "lm_head.weight")


def _of_mixtral(name: str) -> str:
    """A name of transformers' modules, of which its own files have none, by those of Mixtral's files."""
    stem, *matrices = names.MIXTRAL
    if (expert := _EXPERT.fullmatch(name)) is not None:
        return f"{expert[1]}.{stem}.experts.{expert[2]}.{matrices[_MATRICES.index(expert[3])]}.weight"
    return name.replace(".mlp.gate.", f".{stem}.gate.")


def _untied(found: dict[str, Spec], config: ModelConfig, embedding: str, head: str) -> dict[str, Spec]:
    """Renames the head to the embedding in the specs of a tied model that stores its head alone."""
    if config.tie_word_embeddings and embedding not in found and head in found:
        found[embedding] = found.pop(head)
    return found


def parts_of(name: str, spec: Spec, config: ModelConfig) -> Iterator[tuple[str, Spec]]:
    """Yields the tensors that a fused one consists of, each a range of its rows; any other tensor unchanged."""
    is_plain = config.swiglu_alpha is None  # gpt-oss's stacks are transposed: see stacked_experts.py
    if is_plain and (fused := _EXPERTS.fullmatch(name)) and len(spec.shape) == 3 and spec.dtype in WIDTHS:
        kinds = ("gate", "up") if fused[2] == "gate_up_proj" else ("down",)
        height = spec.shape[1] // len(kinds)
        for expert in range(spec.shape[0]):
            for place, kind in enumerate(kinds):
                part = _rows(spec, expert * spec.shape[1] + place * height, height)
                yield f"{fused[1]}.{expert}.{kind}_proj.weight", part
        return
    stem, _, kind = name.rpartition(".")
    if stem.endswith("self_attn.qkv_proj") and config.attention == "gqa":
        query, shared = config.num_attention_heads * config.head_dim, config.num_key_value_heads * config.head_dim
        sizes = {"q_proj": query, "k_proj": shared, "v_proj": shared}
    elif stem.endswith("mlp.gate_up_proj") and spec.shape:
        sizes = dict.fromkeys(("gate_proj", "up_proj"), spec.shape[0] // 2)
    else:
        sizes = {}
    if not sizes or sum(sizes.values()) != spec.shape[0] or spec.dtype not in WIDTHS:
        yield name, spec
        return
    start = 0
    for part_name, height in sizes.items():
        yield f"{stem.rpartition('.')[0]}.{part_name}.{kind}", _rows(spec, start, height)
        start += height


def fused(config: ModelConfig) -> dict[str, tuple[str, ...]]:
    """Returns the tensors that a model's family fuses: name -> the names of the parts, in row order."""
    family, layers = family_of(config), range(config.num_hidden_layers)
    found: dict[str, tuple[str, ...]] = {}
    if family == "gpt_oss":
        for layer in layers:
            found |= stack_names(f"model.layers.{layer}.mlp.experts", config.n_routed_experts)
    for layer in layers if family == "phi3" else ():
        attention, mlp = (f"model.layers.{layer}.{part}." for part in ("self_attn", "mlp"))
        found[attention + "qkv_proj.weight"] = tuple(f"{attention}{part}_proj.weight" for part in "qkv")
        found[mlp + "gate_up_proj.weight"] = tuple(f"{mlp}{part}_proj.weight" for part in ("gate", "up"))
    return found


def fuse(tensors: Iterator[tuple[str, Tensor]], config: ModelConfig) -> Iterator[tuple[str, Tensor]]:
    """Fuses tensors as a model's family stores them; the parts of a fused tensor must follow one another."""
    whole = fused(config)
    place = {part: name for name, parts in whole.items() for part in parts}
    held: list[Tensor] = []
    for name, tensor in tensors:
        if name not in place:
            yield name, tensor
            continue
        held.append(tensor)
        if name == whole[place[name]][-1]:
            joined = stacked(place[name], held, config.n_routed_experts) if config.n_routed_experts else torch.cat(held)
            yield place[name], joined
            held = []


def fused_shapes(shapes: dict[str, tuple[int, ...]], config: ModelConfig) -> dict[str, tuple[int, ...]]:
    """Returns the shapes of the tensors that `fuse` yields, in its order."""
    found = dict(shapes)
    for name, parts in fused(config).items():
        rows = [found.pop(part) for part in parts]
        shape = (sum(shape[0] for shape in rows), *rows[0][1:])
        if experts := config.n_routed_experts:
            shape = (experts, *reversed((shape[0] // experts, *shape[1:])))
        found[name] = shape
    return found


def _rows(spec: Spec, start: int, height: int) -> Spec:
    """Returns the spec of `height` rows of a stored tensor from row `start`; leading dimensions count as rows."""
    columns = math.prod(spec.shape[-1:]) if len(spec.shape) > 1 else 1
    shape = (height, spec.shape[-1]) if len(spec.shape) > 1 else (height,)
    return Spec(spec.dtype, shape, spec.file, spec.start + start * columns * WIDTHS[spec.dtype])
