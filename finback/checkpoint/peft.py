"""Reads adapters from PEFT's files, adapter_config.json and adapter_model.safetensors, and attaches them to their base.

For fused experts PEFT stores A with the expert as the slowest index, (E · rank, in), and B with the expert as the
fastest, (out, E · rank). Reading both the same way would silently garble every expert but the first.
"""

import hashlib
import math
import re
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from typing import Any, get_args

import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor

from finback.checkpoint import names
from finback.checkpoint.stacked_experts import parted
from finback.config import UserError
from finback.model.config import ModelConfig
from finback.model.frozen import BaseFormat
from finback.model.layers import Linear
from finback.model.lora import (
    GROUPS,
    AdaptedTransformer,
    LoRA,
    adapted,
    add_lora,
    learn_lengths,
    matrices,
    put_on,
    put_on_experts,
)
from finback.model.low_rank import LowRank
from finback.model.moe import MoE
from finback.model.multi_lora import MultiLoraTransformer, put_adapters
from finback.model.quantized import matrix_names
from finback.model.transformer import Transformer
from finback.runs import adapters
from finback.runs.adapters import CONFIG_FILE, WEIGHTS_FILE
from finback.runs.files import read_object
from finback.runs.hub_models import model_name

PREFIX, LENGTHS = "base_model.model.", "lora_magnitude_vector"
# settings that change a model beyond LoRA, with the values that have no effect
REFUSED: dict[str, Any] = {
    **{"lora_bias": False, "bias": "none", "modules_to_save": None, "fan_in_fan_out": False},
    **{"use_qalora": False, "use_bdlora": None, "layer_replication": None, "trainable_token_indices": None},
    **{"alora_invocation_tokens": None, "arrow_config": None, "kasa_config": None},
}
# initialisations of A and B that leave the base unchanged
INITS = (True, False, None, "gaussian", "eva", "orthogonal", "lora_ga", "mica")
REMEDY = "Merge it into its base with the tool that made it, and name the merged model."
Pair = tuple[Tensor, Tensor]  # A (rank, in), B (out, rank)
Some = Callable[[Tensor, int], Tensor]


def _every_nth(matrix: Tensor, step: int) -> Tensor:
    return matrix.flatten()[::step]


@dataclass
class StoredAdapter:
    """The contents of an adapter's files: config, and A and B by PEFT's names; tensors are removed as they are used."""

    folder: Path
    lora: LoRA
    raw: dict[str, Any]
    # digest of the base's weights; empty in adapters that PEFT wrote
    base_digest: str
    tensors: dict[str, Tensor] = field(repr=False)

    def check_base(self, base: Path, base_digest: str) -> None:
        """Raises UserError if the adapter was made for another base, judged by digest, or without one by name."""
        made_for = str(self.raw.get(adapters.BASE) or "")
        if self.base_digest:
            if self.base_digest != base_digest:
                problem = f"its weights differ from those that {self.folder} was made for"
                raise UserError("base", str(base), problem, f"Name {made_for or 'its base'}.")
        elif made_for and Path(made_for).name.lower() != model_name(base).lower():
            problem = f"{self.folder} was made for {made_for}"
            remedy = f"Name that base, or correct {adapters.BASE} in {CONFIG_FILE} if they are the same model."
            raise UserError("base", str(base), problem, remedy)

    def take(self, name: str) -> Pair | None:
        """Removes and returns the pair of a matrix in fp32; None if it has none. UserError if A or B is missing."""
        a, b = (self.tensors.pop(f"{PREFIX}{name}.lora_{each}.weight", None) for each in "AB")
        if (a is None) != (b is None):
            raise self.wrong(name, "lacks one of lora_A and lora_B")
        return None if a is None or b is None else (a.float(), b.float())

    def correction(self, name: str, rank: int) -> float:
        """Returns the scale of a matrix, by the config's patterns, divided by the adapter's scale."""
        patterns = self.raw.get("alpha_pattern") or {}
        found = [v for k, v in patterns.items() if re.fullmatch(rf"(.*\.)?({k})", name)]
        alpha = float(found[0]) if found else self.lora.alpha
        return alpha / (math.sqrt(rank) if self.lora.rs else rank) / self.lora.scale

    def wrong(self, name: str, problem: str) -> UserError:
        """Returns the error for an adapter that does not fit the base."""
        base = self.raw.get(adapters.BASE) or "a base that it does not name"
        return UserError("adapter", str(self.folder), f"{name}: {problem}", f"It was made for {base}: name that base.")


def read(folder: Path) -> StoredAdapter:
    """Reads an adapter's files; UserError if it changes the model beyond LoRA."""
    raw = read_object(folder / CONFIG_FILE)
    if raw.get("peft_type", "LORA") != "LORA":
        raise UserError("adapter", str(folder), f"{raw['peft_type']}, not LoRA", REMEDY)
    for key, harmless in REFUSED.items():
        if (value := raw.get(key, harmless)) not in (harmless, [], {}):
            raise UserError(f"adapter {key}", value, f"{folder} does more than LoRA", REMEDY)
    if (init := raw.get("init_lora_weights", True)) not in INITS:
        raise UserError("adapter init_lora_weights", init, f"{folder} changed the weights of its base", REMEDY)
    try:
        with safe_open(folder / WEIGHTS_FILE, framework="pt") as handle:
            meta = handle.metadata() or {}
            tensors = {name: handle.get_tensor(name) for name in handle.keys()}  # noqa: SIM118 - not a dict
    except (SafetensorError, OSError) as error:
        raise UserError("adapter", str(folder / WEIGHTS_FILE), f"cannot be read ({error})", "Copy it again.") from None
    form = meta.get("base_format", "fp32")
    base: BaseFormat = form if form in get_args(BaseFormat) else "fp32"  # type: ignore[assignment]
    targets = tuple(meta["targets"].split(",")) if "targets" in meta else GROUPS
    try:
        rs, dora = bool(raw.get("use_rslora")), bool(raw.get("use_dora"))
        lora = LoRA(int(raw["r"]), float(raw["lora_alpha"]), rs, targets, dora, base)
    except (KeyError, TypeError, ValueError) as error:
        problem = f"not valid LoRA settings ({error})"
        raise UserError("adapter", str(folder / CONFIG_FILE), problem, "Copy it again.") from None
    return StoredAdapter(folder, lora, raw, meta.get("base_digest", ""), tensors)


def put_adapter(
    model: Transformer, lora: LoRA, places: tuple[Path, Path | None], base_digest: str, seed: int
) -> AdaptedTransformer:
    """Attaches a new adapter, or a stored one to continue training, to its frozen base, in place.

    places: the paths of base and stored adapter; UserError if the latter has another base or shape.
    """
    base, adapter = places
    if adapter is None:
        found = add_lora(model, lora, seed)
    else:
        stored = read(adapter)
        stored.check_base(base, base_digest)
        if stored.lora.shape != lora.shape:
            remedy = "Use its settings to continue it, or start from the merged model that `finback export` writes."
            raise UserError("adapter", lora.shape, f"{adapter} has {stored.lora.shape}", remedy)
        found = attach(model, stored)
        found.lora = lora
    found.base, found.base_digest = str(base.resolve()), base_digest
    return found


def attach(model: Transformer, stored: StoredAdapter) -> AdaptedTransformer:
    """Attaches a stored adapter to its frozen base, in place; UserError if it was made for another base."""
    if not stored.tensors:
        raise UserError("adapter", str(stored.folder), "holds no weights", "Copy it again.")
    for name, module, _, _ in matrices(model):
        if isinstance(module, MoE):
            _attach_experts(module, name, model.config, stored)
        else:
            _attach_linear(module, name, model.config, stored)
    if stored.tensors:
        left = next(iter(stored.tensors)).removeprefix(PREFIX)
        known = {"embed_tokens", "lm_head", "gate"} & set(left.split("."))
        problem = (
            "adapters of embedding, head and routers are not supported" if known else "the base has no such matrix"
        )
        raise stored.wrong(left, problem)
    return adapted(model, stored.lora)


def attach_all(model: Transformer, base: Path, digest: str, folders: Mapping[str, Path]) -> MultiLoraTransformer:
    """Attaches named adapters to the model at path `base`, with this digest, for inference; errors as of `attach`."""
    found: dict[str, AdaptedTransformer] = {}
    for name, folder in folders.items():
        stored = read(folder)
        stored.check_base(base, digest)
        if stored.lora.dora:
            problem = f"{folder} is DoRA, but adapters served together must be plain LoRA"
            raise UserError("adapter use_dora", True, problem, f"Serve {base}+{folder}; --also adds other models.")
        with torch.device("meta"):
            bare = Transformer(model.config)
        found[name] = attach(bare, stored)
    return put_adapters(model, found)


def _attach_linear(module: Linear, name: str, config: ModelConfig, stored: StoredAdapter) -> None:
    theirs = names.modules(config)[f"{name}.weight"]
    pairs = {place: pair for place, n in enumerate(theirs) if (pair := stored.take(n.removesuffix(".weight")))}
    if not pairs:
        return
    rank = max(len(a) for a, _ in pairs.values())
    adapter = put_on(module, tuple(pairs), len(theirs), rank, stored.lora.scale)
    for i, (place, (a, b)) in enumerate(pairs.items()):
        its = theirs[place].removesuffix(".weight")
        _fill(adapter, i, a, b * stored.correction(its, len(a)), its, stored)
    if stored.lora.dora:
        lengths = [stored.tensors.pop(f"{PREFIX}{theirs[p].removesuffix('.weight')}.{LENGTHS}", None) for p in pairs]
        if any(each is None or each.shape != adapter.b[0, :, 0].shape for each in lengths):
            raise stored.wrong(name, f"{LENGTHS} is missing or has another size")
        learn_lengths(module, adapter, torch.stack([each.float() for each in lengths if each is not None]))


def _attach_experts(module: MoE, name: str, config: ModelConfig, stored: StoredAdapter) -> None:
    experts, stem = len(module.gate_up), experts_of(names.modules(config), name)
    inner, outer = stored.take(f"{stem}.base_layer"), stored.take(stem)
    if inner is None and outer is not None and _targets_only(stored.raw, "gate_up_proj"):
        inner, outer = outer, None
    in_turn = config.swiglu_alpha is not None  # gate and up rows are interleaved
    gate_up = None if inner is None else _unpacked(inner, experts, f"{stem}.gate_up_proj", stored, in_turn)
    down = None if outer is None else _unpacked(outer, experts, f"{stem}.down_proj", stored)
    single = [[stored.take(f"{stem}.{e}.{part}_proj") for part in ("gate", "up", "down")] for e in range(experts)]
    if any(pair for pairs in single for pair in pairs):
        gate_up, down = _of_single(single, stem, stored)
    if gate_up is None and down is None:
        return
    ranks = tuple(1 if each is None else each[0].size(1) for each in (gate_up, down))
    made = put_on_experts(module, (ranks[0], ranks[1]), stored.lora.scale)
    for adapter, found, part in zip(made, (gate_up, down), ("gate_up_proj", "down_proj"), strict=True):
        for place, e in enumerate(adapter.places[adapter.local_experts] if found is not None else ()):
            assert found is not None, "counted above"
            _fill(adapter, place, found[0][e], found[1][e], f"{stem}.{part}", stored)


def _targets_only(raw: dict[str, Any], parameter: str) -> bool:
    """Whether only this parameter of fused experts has an adapter, which is then stored under the name of down's."""
    targets = [str(t).rpartition(".")[2] for t in raw.get("target_parameters") or ()]
    return parameter in targets and "down_proj" not in targets


def _unpacked(pair: Pair, experts: int, name: str, stored: StoredAdapter, in_turn: bool = False) -> Pair:
    """Reshapes A (E · r, in) and B (out, E · r) to (E, r, in) and (E, out, r), with B times its scale's correction."""
    a, b = pair[0], parted(pair[1]) if in_turn else pair[1]
    if len(a) % experts or b.size(1) != len(a):
        raise stored.wrong(name, f"shapes {tuple(a.shape)} and {tuple(b.shape)} do not fit {experts} experts")
    rank = len(a) // experts
    b = b.reshape(len(b), rank, experts).permute(2, 0, 1) * stored.correction(name, rank)
    return a.reshape(experts, rank, -1), b


def _of_single(single: list[list[Pair | None]], stem: str, stored: StoredAdapter) -> tuple[Pair, Pair]:
    """Joins each expert's adapters of gate, up and down into stacks for gate_up, whose ranks add up, and for down."""
    stacks: list[list[Tensor]] = [[], [], [], []]
    for e, pairs in enumerate(single):
        scaled: list[Pair] = []
        for pair, part in zip(pairs, ("gate", "up", "down"), strict=True):
            if pair is None:
                raise stored.wrong(f"{stem}.{e}", "lacks one of gate_proj, up_proj and down_proj")
            scaled.append((pair[0], pair[1] * stored.correction(f"{stem}.{e}.{part}_proj", len(pair[0]))))
        (gate_a, gate_b), (up_a, up_b), (down_a, down_b) = scaled
        made = torch.cat([gate_a, up_a]), torch.block_diag(gate_b, up_b), down_a, down_b
        for stack, tensor in zip(stacks, made, strict=True):
            stack.append(tensor)
    gate_up_a, gate_up_b, a, b = (torch.stack(stack) for stack in stacks)
    return (gate_up_a, gate_up_b), (a, b)


def _fill(adapter: LowRank, place: int, a: Tensor, b: Tensor, name: str, stored: StoredAdapter) -> None:
    """Copies one pair into its place; a smaller rank is padded with zeros."""
    into_a, into_b, rank = adapter.a.data[place], adapter.b.data[place], len(a)
    if (a.size(-1), len(b), b.size(-1)) != (into_a.size(-1), len(into_b), rank):
        shapes = f"lora_B {tuple(b.shape)} · lora_A {tuple(a.shape)}"
        raise stored.wrong(name, f"{shapes} does not fit the base's {len(into_b)} x {into_a.size(-1)} matrix")
    into_a[:rank].copy_(a)
    into_b[:, :rank].copy_(b)


def digest(model: Transformer, some: Some = _every_nth, known: Mapping[str, bytes] | None = None) -> str:
    """Identifies a base: a digest of samples of each matrix in bf16, taken before quantization.

    some(matrix, step) returns every step-th number in row-major order. known: `samples` of quantized modules, by name.
    """
    known = known or {}
    found = (known[name] if name in known else samples(name, module, some) for name, module, _, _ in matrices(model))
    return hashlib.sha256(b"".join(found)).hexdigest()


def samples(name: str, module: Linear | MoE, some: Some = _every_nth) -> bytes:
    """Returns the samples of a module's matrices that enter a digest."""
    matrices = [getattr(module, each).detach() for each in matrix_names(module)]
    return b"".join(sample(name, matrix.numel(), partial(some, matrix)) for matrix in matrices)


def sample(name: str, size: int, every: Callable[[int], Tensor]) -> bytes:
    """Returns the samples of a matrix of `size` numbers that enter a digest; every(step) is every step-th number."""
    values = every(max(1, size // 256)).to(torch.bfloat16).view(torch.int16)
    return name.encode() + values.cpu().numpy().tobytes()


def experts_of(table: dict[str, tuple[str, ...]], name: str) -> str:
    """Returns the stored name of a layer's routed experts: model.layers.L.mlp.experts."""
    return table[f"{name}.gate_up"][0].rpartition(".0.")[0]
