"""LoRA (arXiv 2106.09685): a frozen base and, for chosen matrices, a product of two thin ones that is learnt and added.

    y = W x + alpha / rank · B A x        A (rank, in) random, B (out, rank) zero

It is put on from outside, on attention of every kind, feed-forwards and routed experts. Where several matrices of
the papers are one here (gate and up, key and value), each has an A of its own, as in PEFT; gate and up of a routed expert,
which PEFT fuses too, share one.
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
from finback.model.quantized import expert_matrix
from finback.model.replace import recast
from finback.model.transformer import Transformer

GROUPS = ("attention", "mlp", "experts")
_Names = dict[str, tuple[str, ...]]
# PEFT's names of the matrices that a linear map of ours is made of, in row order
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
_COMPRESSED |= {"out": ("o_b_proj",), "value": ("kv_proj",), "gate": ("gate_proj",)}  # the last two are a compressor's
_ATTENTION = {"mla": _MLA | _OUT, "gqa": _GQA | _OUT, "compressed": _COMPRESSED}
NAMES = sorted({name for table in (*_ATTENTION.values(), _MLP) for names in table.values() for name in names})


@dataclass(frozen=True)
class LoRA:
    """An adapter: its shape, what it is put on, and how the frozen base lies in memory."""

    # columns of A and rows of B
    rank: int = 16
    # what is learnt counts alpha / rank times
    alpha: float = 32.0
    # rank-stabilised (arXiv 2312.03732): alpha / sqrt(rank) times
    rs: bool = False
    # "attention", "mlp" (dense layers and shared experts), "experts" (the routed ones), or PEFT's names such as "q_proj"
    targets: tuple[str, ...] = GROUPS
    # DoRA (arXiv 2402.09353): each row of W + s B A also learns its length
    dora: bool = False
    # QLoRA: "nf4" takes 4.5 bits a weight, "int8" 8; "bf16" is exact where the files are
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
            raise UserError("adapter.targets", self.targets, "an adapter of nothing", f"Use {', '.join(GROUPS)}.")

    @property
    def scale(self) -> float:
        """What B A x is multiplied by."""
        return self.alpha / (math.sqrt(self.rank) if self.rs else self.rank)

    @property
    def shape(self) -> str:
        """What two adapters have in common of which one goes on with the other."""
        return f"rank={self.rank}, alpha={self.alpha:g}, rs={self.rs}, dora={self.dora}"

    def takes(self, group: str, name: str) -> bool:
        """Whether it is put on a matrix of this group, which PEFT calls so."""
        return group in self.targets or name in self.targets


class LoraLinear(FrozenLinear):
    """A frozen linear map with an adapter."""

    adapter: LowRank

    def forward(self, x: Tensor) -> Tensor:
        y = super().forward(x)
        return y + self.adapter(x) if self.adapter.is_on else y

    def matrix(self, dtype: torch.dtype) -> Tensor:
        """The weight with the adapter in it, summed in fp32: what MLA absorbs and what merging keeps."""
        if not self.adapter.is_on:
            return super().matrix(dtype)
        return (super().matrix(torch.float32) + self.adapter.delta().flatten(0, 1)).to(dtype)


class DoraLinear(LoraLinear):
    """Rows of W + s B A whose lengths m are learnt: y = m / |W + s B A| · (W x + s B A x); no gradient through |·| (DoRA, 4.3)."""

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
        """By how much rows are longer than those of W + s B A, (out,); 1 where nothing is learnt."""
        low = self.adapter
        assert low.m is not None, "put on together"
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
        """That of gate_up or of down."""
        return self.gate_up_adapter if name == "gate_up" else self.down_adapter

    def merged(self, name: str, dtype: torch.dtype) -> Tensor:
        """gate_up or down of all experts with the adapter in it, summed in fp32."""
        experts = range(len(self.gate_up))
        delta = self.adapter(name).delta()
        return torch.stack([(expert_matrix(self, name, e, torch.float32) + delta[e]).to(dtype) for e in experts])


class AdaptedTransformer(Transformer):
    """A model whose base is frozen and whose adapter is learnt."""

    lora: LoRA
    # the path of the base, and a digest of its weights
    base: str
    base_digest: str


def add_lora(model: Transformer, lora: LoRA, seed: int = 0) -> AdaptedTransformer:
    """Put an adapter on a model that is frozen, in place; it changes nothing until it has learnt."""
    generator, known = torch.Generator().manual_seed(seed), set[str]()
    for _, module, group, parts in matrices(model):
        known |= {group, *parts}
        places = tuple(place for place, part in enumerate(parts) if lora.takes(group, part))
        if not places:
            continue
        if lora.dora and group != "attention" and model.config.n_routed_experts:
            problem = "PEFT's files have it for attention alone where a model has experts"
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
    """Give a linear map of so many `parts` an adapter, zero, for those at `places`."""
    size = module.out_features // parts, module.in_features
    adapter = LowRank(size, rank, scale, places, parts, module.weight)
    adapter.groups = module.groups
    recast(module, LoraLinear).adapter = adapter
    return adapter


def learn_lengths(module: Linear, adapter: LowRank, lengths: Tensor | None = None) -> None:
    """Have a linear map with an adapter learn the lengths (n, out) of its rows too; by default from those that they have."""
    if lengths is None:
        assert isinstance(module, LoraLinear), "put on before"
        rows = super(LoraLinear, module).matrix(torch.float32).norm(dim=1)
        whole = rows.full_tensor() if hasattr(rows, "full_tensor") else rows  # of a matrix that many ranks hold
        lengths = whole.view(adapter.parts, -1)[torch.tensor(adapter.places, device=whole.device)]
    adapter.m = nn.Parameter(lengths.detach().clone())
    recast(module, DoraLinear)


def put_on_experts(module: MoE, ranks: tuple[int, int], scale: float) -> tuple[LowRank, LowRank]:
    """Give routed experts, of which some may lie here, adapters, zero, for gate_up and for down."""
    hidden, width, experts = module.config.hidden_size, module.config.moe_intermediate_size, len(module.gate_up)
    found, places = recast(module, LoraMoE), tuple(range(experts))
    gate_up = LowRank((2 * width, hidden), ranks[0], scale, places, experts, module.gate_up, found.held)
    down = LowRank((hidden, width), ranks[1], scale, places, experts, module.down, found.held)
    found.gate_up_adapter, found.down_adapter = gate_up, down
    return gate_up, down


def adapted(model: Transformer, lora: LoRA) -> AdaptedTransformer:
    """A model as one that has an adapter, in place."""
    whole = recast(model, AdaptedTransformer)
    whole.lora, whole.base, whole.base_digest = lora, "", ""
    return whole


def matrices(model: Transformer) -> Iterator[tuple[str, Linear | MoE, str, tuple[str, ...]]]:
    """What an adapter may be put on, bottom first: name, module, group, and PEFT's names of its matrices in row order.

    MTP modules are none of it: checkpoints elsewhere have no place for their adapters.
    """
    c = model.config
    attention = _ATTENTION[c.attention]
    if c.attention == "mla" and c.q_lora_rank is None:
        attention = attention | {"q_up": ("q_proj",)}
    for name, module in list(model.blocks.named_modules(prefix="blocks")):
        leaf = name.rpartition(".")[2]
        if isinstance(module, MoE):
            yield name, module, "experts", ("experts",)
        elif ".indexer." in name:  # nothing that is learnt here reaches it
            continue
        elif isinstance(module, Linear) and ".attention." in name:
            yield name, module, "attention", attention[leaf]
        elif isinstance(module, Linear):
            yield name, module, "mlp", _MLP[leaf]


def adapter_parameters(model: Transformer) -> list[tuple[str, nn.Parameter]]:
    """What is learnt of a model with an adapter, by name; empty for any other model."""
    adapters = [(name, module) for name, module in model.named_modules() if isinstance(module, LowRank)]
    return [(f"{name}.{leaf}", p) for name, module in adapters for leaf, p in module.named_parameters()]


def learnt_parameters(model: Transformer) -> list[tuple[str, nn.Parameter]]:
    """What a loss on tokens teaches, by name: the adapter where there is one, else all but DSA's indexers.

    Which tokens an indexer picks has no gradient (V3.2 2.1.1), and an optimizer would only let its weights decay.
    """
    everything = [(name, p) for name, p in model.named_parameters() if ".indexer." not in name]
    return adapter_parameters(model) or everything


@contextmanager
def without_adapter(model: Transformer) -> Iterator[None]:
    """The base alone, as long as it lasts."""
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
    """Add the adapter to the base for good, in place, matrix by matrix; a plain model, its parameters in `dtype`.

    A quantized base counts as what it was dequantized to in training.
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
