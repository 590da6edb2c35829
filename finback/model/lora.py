"""LoRA (arXiv 2106.09685): a frozen base, and for selected matrices a trained product of two thin ones that is added.

    y = W x + alpha / rank · B A x        A (rank, in) random, B (out, rank) zero

It is applied from outside, to all kinds of attention, feed-forwards and routed experts. Where several matrices of the papers
are one here (gate and up, key and value), each has its own A, as in PEFT; gate and up of a routed expert, which PEFT fuses
too, share one.
"""

import math
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from finback.config import UserError, check_fields, check_positive, did_you_mean
from finback.kernels.frozen import Product
from finback.model.frozen import BaseFormat, FrozenLinear, FrozenMoE, thaw, unfreeze
from finback.model.layers import Linear
from finback.model.low_rank import LowRank
from finback.model.moe import MoE
from finback.model.quantized import expert_matrix, row_norms
from finback.model.replace import recast
from finback.model.transformer import Transformer

GROUPS = ("attention", "mlp", "experts")
_Names = dict[str, tuple[str, ...]]
# PEFT's names of the matrices in each of our linear maps, in row order
_MLA: _Names = {
    "q_down": ("q_a_proj",),
    "q_up": ("q_b_proj",),
    "kv_down": ("kv_a_proj_with_mqa",),
    "kv_up": ("kv_b_proj",),
}
_GQA: _Names = {"query": ("q_proj",), "key_value": ("k_proj", "v_proj")}
_MLP: _Names = {"gate_up": ("gate_proj", "up_proj"), "down": ("down_proj",)}
_OUT: _Names = {"out": ("o_proj",)}
_COMPRESSED: _Names = {"q_down": ("q_a_proj",), "q_up": ("q_b_proj",), "entry": ("kv_proj",), "out_down": ("o_a_proj",)}
_COMPRESSED |= {
    "out": ("o_b_proj",),
    "value": ("kv_proj",),
    "gate": ("gate_proj",),
}  # the last two belong to a compressor
_ATTENTION = {"mla": _MLA | _OUT, "gqa": _GQA | _OUT, "compressed": _COMPRESSED}
NAMES = sorted({name for table in (*_ATTENTION.values(), _MLP) for names in table.values() for name in names})


@dataclass(frozen=True)
class LoRA:
    """An adapter: its shape, its targets, and the storage of the frozen base."""

    # number of columns of A and rows of B
    rank: int = 16
    # the update is scaled by alpha / rank
    alpha: float = 32.0
    # rank-stabilized (arXiv 2312.03732): scaled by alpha / sqrt(rank)
    rs: bool = False
    # "attention", "mlp" (dense layers and shared experts), "experts" (the routed ones), or PEFT's names such as "q_proj"
    targets: tuple[str, ...] = GROUPS
    # DoRA (arXiv 2402.09353): also trains the norm of each row of W + s B A
    dora: bool = False
    # QLoRA: "nf4" takes 4.5 bits per weight, "int8" 8; "bf16" is exact if the files are bf16
    base: BaseFormat = "bf16"

    def __post_init__(self) -> None:
        check_fields(self, "adapter")
        check_positive(self, "adapter", "rank", "alpha")
        for target in self.targets:
            if target not in (*GROUPS, *NAMES):
                raise UserError(
                    "adapter.targets", target, "no such part of a model", did_you_mean(target, (*GROUPS, *NAMES))
                )
        if not self.targets:
            raise UserError("adapter.targets", self.targets, "empty", f"Use {', '.join(GROUPS)}.")

    @property
    def scale(self) -> float:
        """The factor of B A x."""
        return self.alpha / (math.sqrt(self.rank) if self.rs else self.rank)

    @property
    def shape(self) -> str:
        """What two adapters must share for one to continue the other."""
        return f"rank={self.rank}, alpha={self.alpha:g}, rs={self.rs}, dora={self.dora}"

    def takes(self, group: str, name: str) -> bool:
        """Whether it applies to a matrix of this group and PEFT name."""
        return group in self.targets or name in self.targets


class LoraLinear(FrozenLinear):
    """A frozen linear map with an adapter."""

    adapter: LowRank

    def forward(self, x: Tensor) -> Tensor:
        y = super().forward(x)
        return y + self.adapter(x) if self.adapter.is_on else y

    def matrix(self, dtype: torch.dtype) -> Tensor:
        """The weight including the adapter, summed in fp32: for MLA's absorbed form and for merging."""
        if not self.adapter.is_on:
            return super().matrix(dtype)
        return (super().matrix(torch.float32) + self.adapter.delta().flatten(0, 1)).to(dtype)


class DoraLinear(LoraLinear):
    """W + s B A with trained row norms m: y = m / |W + s B A| · (W x + s B A x); no gradient through |·| (DoRA, 4.3)."""

    def forward(self, x: Tensor) -> Tensor:
        y = super().forward(x)
        if not self.adapter.is_on:
            return y
        bias = 0 if self.bias is None else self.bias.to(x.dtype)
        return (y - bias) * self._stretch().to(x.dtype) + bias

    def matrix(self, dtype: torch.dtype) -> Tensor:
        if not self.adapter.is_on:
            return super().matrix(dtype)
        return (super().matrix(torch.float32) * self._stretch()[:, None]).to(dtype)

    def _stretch(self) -> Tensor:
        """Ratio of trained row norms to those of W + s B A, (out,); 1 where nothing is trained."""
        low = self.adapter
        assert low.m is not None, "adapter and norms are added together"
        with torch.no_grad():
            norm = super().matrix(torch.float32).norm(dim=1).view(low.parts, -1)
            places = torch.tensor(low.places, device=norm.device)
        return low.spread(low.m / norm[places], 0, 1.0).flatten()


class LoraMoE(FrozenMoE):
    """Frozen routed experts with an adapter for each."""

    gate_up_adapter: LowRank
    down_adapter: LowRank

    @property
    def is_adapted(self) -> bool:
        return self.gate_up_adapter.is_on

    def product(self, name: str) -> Product:
        base, adapter = super().product(name), self.adapter(name)
        if not self.is_adapted:
            return base
        return lambda rows, blocks: base(rows, blocks) + adapter.per_expert(rows, blocks)

    def adapter(self, name: str) -> LowRank:
        """The adapter of gate_up or of down."""
        return self.gate_up_adapter if name == "gate_up" else self.down_adapter

    def merged(self, name: str, dtype: torch.dtype) -> Tensor:
        """gate_up or down of all experts including the adapter, summed in fp32."""
        experts = range(len(self.gate_up))
        delta = self.adapter(name).delta()
        return torch.stack([(expert_matrix(self, name, e, torch.float32) + delta[e]).to(dtype) for e in experts])


class AdaptedTransformer(Transformer):
    """A model with a frozen base and a trained adapter."""

    lora: LoRA
    # path of the base, and a digest of its weights
    base: str
    base_digest: str


def add_lora(model: Transformer, lora: LoRA, seed: int = 0) -> AdaptedTransformer:
    """Adds an adapter to a frozen model, in place; it changes nothing until it is trained."""
    generator, known = torch.Generator().manual_seed(seed), set[str]()
    for _, module, group, parts in matrices(model):
        known |= {group, *parts}
        places = tuple(place for place, part in enumerate(parts) if lora.takes(group, part))
        if not places:
            continue
        if lora.dora and group != "attention" and model.config.n_routed_experts:
            problem = "PEFT's files support it for attention only if a model has experts"
            raise UserError("adapter.dora", True, problem, 'Use targets=("attention",), or leave it out.')
        made: tuple[LowRank, ...]
        if isinstance(module, MoE):
            made = put_on_experts(module, (lora.rank, lora.rank), lora.scale)
        else:
            made = (put_on(module, places, len(parts), lora.rank, lora.scale),)
            if lora.dora:
                learn_lengths(module, made[0])
        for adapter in made:
            adapter.draw(generator)
    if not adapter_parameters(model):
        problem = "this model has none of these parts"
        raise UserError("adapter.targets", lora.targets, problem, f"It has {', '.join(sorted(known))}.")
    return adapted(model, lora)


def put_on(module: Linear, places: tuple[int, ...], parts: int, rank: int, scale: float) -> LowRank:
    """Adds a zero adapter to the matrices at `places` of a linear map with `parts` matrices."""
    size = module.out_features // parts, module.in_features
    adapter = LowRank(size, rank, scale, places, parts, module.weight)
    adapter.groups = module.groups
    recast(module, LoraLinear).adapter = adapter
    return adapter


def learn_lengths(module: Linear, adapter: LowRank, lengths: Tensor | None = None) -> None:
    """Makes a linear map with an adapter also train its row norms, (n, out); by default starting from the current ones."""
    if lengths is None:
        rows = row_norms(module)
        lengths = rows.view(adapter.parts, -1)[torch.tensor(adapter.places, device=rows.device)]
    adapter.m = nn.Parameter(lengths.detach().clone())
    recast(module, DoraLinear)


def put_on_experts(module: MoE, ranks: tuple[int, int], scale: float) -> tuple[LowRank, LowRank]:
    """Adds zero adapters for gate_up and down to routed experts; this rank may hold only some of them."""
    hidden, width, experts = module.config.hidden_size, module.config.moe_intermediate_size, len(module.gate_up)
    found, places = recast(module, LoraMoE), tuple(range(experts))
    gate_up = LowRank((2 * width, hidden), ranks[0], scale, places, experts, module.gate_up, found.local_experts)
    down = LowRank((hidden, width), ranks[1], scale, places, experts, module.down, found.local_experts)
    found.gate_up_adapter, found.down_adapter = gate_up, down
    return gate_up, down


def adapted(model: Transformer, lora: LoRA) -> AdaptedTransformer:
    """Turns a model into one with an adapter, in place."""
    whole = recast(model, AdaptedTransformer)
    whole.lora, whole.base, whole.base_digest = lora, "", ""
    return whole


def matrices(model: Transformer) -> Iterator[tuple[str, Linear | MoE, str, tuple[str, ...]]]:
    """The matrices that can have an adapter, bottom first: name, module, group, and PEFT's names of its matrices in row order.

    Without MTP modules: other checkpoints have no place for their adapters.
    """
    c = model.config
    attention = _ATTENTION[c.attention]
    if c.attention == "mla" and c.q_lora_rank is None:
        attention = attention | {"q_up": ("q_proj",)}
    for name, module in list(model.blocks.named_modules(prefix="blocks")):
        leaf = name.rpartition(".")[2]
        if isinstance(module, MoE):
            yield name, module, "experts", ("experts",)
        elif ".indexer." in name:  # no adapter training reaches it
            continue
        elif isinstance(module, Linear) and ".attention." in name:
            yield name, module, "attention", attention[leaf]
        elif isinstance(module, Linear):
            yield name, module, "mlp", _MLP[leaf]


def adapter_parameters(model: Transformer) -> list[tuple[str, nn.Parameter]]:
    """The trained parameters of a model with an adapter, by name; empty for any other model."""
    adapters = [(name, module) for name, module in model.named_modules() if isinstance(module, LowRank)]
    return [(f"{name}.{leaf}", p) for name, module in adapters for leaf, p in module.named_parameters()]


def learnt_parameters(model: Transformer) -> list[tuple[str, nn.Parameter]]:
    """Parameters that a token loss trains, by name: the adapter if there is one, else all except DSA's indexers.

    The selection of an indexer has no gradient (V3.2 2.1.1), and an optimizer would only let its weights decay.
    """
    everything = [(name, p) for name, p in model.named_parameters() if ".indexer." not in name]
    return adapter_parameters(model) or everything


@contextmanager
def without_adapter(model: Transformer) -> Iterator[None]:
    """A context with the base alone."""
    adapters = [module for module in model.modules() if isinstance(module, LowRank)]
    for adapter in adapters:
        adapter.is_on = False
    try:
        yield
    finally:
        for adapter in adapters:
            adapter.is_on = True


@torch.no_grad()
def merge(model: Transformer, dtype: torch.dtype) -> Transformer:
    """Merges the adapter into the base permanently, in place, one matrix at a time; returns a plain model with parameters in `dtype`.

    A quantized base is merged as it was dequantized in training.
    """
    for module in list(model.modules()):
        if isinstance(module, LoraLinear):
            weight = module.matrix(dtype)
            del module.adapter
            thaw(module, "weight", weight)
        elif isinstance(module, LoraMoE):
            merged = {name: module.merged(name, dtype) for name in ("gate_up", "down")}
            del module.gate_up_adapter, module.down_adapter
            for name, weight in merged.items():
                thaw(module, name, weight)
    return unfreeze(model, dtype)
