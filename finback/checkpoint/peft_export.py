"""Writes adapters as PEFT's files: tensor names, the layout of experts (see peft.py) and target modules."""

import math
from collections.abc import Iterator
from pathlib import Path

from torch import Tensor

from finback.checkpoint import names, store
from finback.checkpoint.peft import LENGTHS, PREFIX, experts_of
from finback.checkpoint.stacked_experts import interleaved
from finback.model.lora import AdaptedTransformer, LoraLinear, LoraMoE, matrices
from finback.model.low_rank import LowRank
from finback.model.moe import MoE
from finback.runs import adapters
from finback.runs.adapters import CONFIG_FILE, WEIGHTS_FILE
from finback.runs.files import write_json


def save(folder: Path, model: AdaptedTransformer) -> None:
    """Writes a model's adapter into a folder as PEFT's two files; the same adapter gives the same bytes."""
    lora, targets, ranks = model.lora, Targets(model), dict[str, int]()
    tensors: dict[str, Tensor] = {}
    for name, a, b in pairs(model):
        tensors |= {f"{PREFIX}{name}.lora_A.weight": a, f"{PREFIX}{name}.lora_B.weight": b}
    tensors |= {f"{PREFIX}{name}.{LENGTHS}": lengths for name, lengths in row_lengths(model)}
    for name, adapter in targets.adapters:
        if adapter.a.size(1) != lora.rank:
            ranks[name] = adapter.a.size(1)
    alphas = {n: lora.scale * (math.sqrt(r) if lora.rs else r) for n, r in ranks.items()}
    raw = {
        "peft_type": "LORA",
        "task_type": "CAUSAL_LM",
        adapters.BASE: adapters.base_name(folder, Path(model.base)) if model.base else None,
        "r": lora.rank,
        "lora_alpha": lora.alpha,
        "use_rslora": lora.rs,
        "lora_dropout": 0.0,
        "bias": "none",
        "use_dora": lora.dora,
        "fan_in_fan_out": False,
        "init_lora_weights": True,
        "inference_mode": True,
        "target_modules": targets.modules,
        "target_parameters": targets.parameters,
        "rank_pattern": ranks,
        "alpha_pattern": alphas,
    }
    meta = {"base_digest": model.base_digest, "base_format": lora.base, "targets": ",".join(lora.targets)}
    on_cpu = {name: tensor.cpu().contiguous() for name, tensor in tensors.items()}
    store.write(folder / WEIGHTS_FILE, on_cpu, {"format": "pt", **meta})
    write_json(folder / CONFIG_FILE, raw)


def pairs(model: AdaptedTransformer) -> Iterator[tuple[str, Tensor, Tensor]]:
    """Yields PEFT's name of each adapted matrix, with A and B in the layout of its files."""
    table = names.modules(model.config)
    for name, module, _, _ in matrices(model):
        if isinstance(module, LoraLinear):
            for i, place in enumerate(module.adapter.places):
                theirs = table[f"{name}.weight"][place].removesuffix(".weight")
                yield theirs, module.adapter.a[i].detach(), module.adapter.b[i].detach()
        elif isinstance(module, LoraMoE):
            stem = experts_of(table, name)
            for suffix, adapter in ((".base_layer", module.gate_up_adapter), ("", module.down_adapter)):
                a, b = adapter.a.detach(), adapter.b.detach()
                if suffix and model.config.swiglu_alpha is not None:
                    b = interleaved(b, 1)
                yield stem + suffix, a.flatten(0, 1), b.permute(1, 2, 0).flatten(1)


def row_lengths(model: AdaptedTransformer) -> Iterator[tuple[str, Tensor]]:
    """Yields PEFT's name of each matrix with learnt magnitudes (DoRA), and these magnitudes, one a row."""
    table = names.modules(model.config)
    for name, module, _, _ in matrices(model):
        if isinstance(module, LoraLinear) and module.adapter.m is not None:
            for place, lengths in zip(module.adapter.places, module.adapter.m.detach(), strict=True):
                yield table[f"{name}.weight"][place].removesuffix(".weight"), lengths


class Targets:
    """PEFT's `target_modules` and `target_parameters`, which make it create this adapter's matrices and no others.

    In a model with experts PEFT mistakes any module called gate_proj for a routed expert's matrix in the old layout.
    There this class targets feed-forwards, and other matrices of that name, by their parameters. It does the same with
    grouped linear maps, whose groups PEFT would multiply as one matrix.
    """

    def __init__(self, model: AdaptedTransformer) -> None:
        table, is_moe = names.modules(model.config), bool(model.config.n_routed_experts)
        # every matrix by its full name, and its adapter if it has one; matrices of an indexer never have
        indexers = [theirs for ours, (theirs, *_) in table.items() if ".indexer." in ours]
        found: list[tuple[str, LowRank | None]] = [(name.removesuffix(".weight"), None) for name in indexers]
        for name, module, group, parts in matrices(model):
            if isinstance(module, MoE):
                stem = experts_of(table, name)
                its = {
                    part: module.adapter(part) if isinstance(module, LoraMoE) else None for part in ("gate_up", "down")
                }
                found += [(f"{stem}.{part}_proj", adapter) for part, adapter in its.items()]
                continue
            adapter = module.adapter if isinstance(module, LoraLinear) else None
            for place, part in enumerate(parts):
                by_parameter = is_moe and (group == "mlp" or part == "gate_proj" or module.groups is not None)
                ending = ".weight" if by_parameter else ""
                has = adapter is not None and place in adapter.places
                full = table[f"{name}.weight"][place].removesuffix(".weight") + ending
                found.append((full, adapter if has else None))
        self.adapters = [(name, adapter) for name, adapter in found if adapter is not None]
        taken = {name for name, _ in self.adapters}
        left = {_leaf(name) for name, adapter in found if adapter is None}
        # by the last part of the name, where all matrices of that name have an adapter
        short = sorted({name if _leaf(name) in left else _leaf(name) for name in taken})
        self.modules = [name for name in short if not self._is_parameter(name)]
        self.parameters = [name for name in short if self._is_parameter(name)]

    @staticmethod
    def _is_parameter(name: str) -> bool:
        return name.endswith((".weight", "experts.gate_up_proj", "experts.down_proj"))


def _leaf(name: str) -> str:
    """Returns the ending that PEFT matches: q_proj; for parameters mlp.gate_proj.weight and mlp.experts.down_proj."""
    words = name.split(".")
    if name.endswith(".weight"):
        return ".".join(words[-3:])
    return ".".join(words[-3:] if "experts" in words else words[-1:])
