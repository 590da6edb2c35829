"""Several adapters on one inference-only base: every row of a batch has its own adapter or none (as S-LoRA, arXiv 2311.03285).

The base's products run once for all rows; an adapter's update is computed only for its rows. Adapters are applied from outside,
over any form of the base's modules: plain, packed, several matrices in one product.
"""

from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from finback.kernels.documents import Mask
from finback.kernels.frozen import Product
from finback.kernels.moe_gemm import Blocks
from finback.model.cache import LayerCache
from finback.model.frozen import BaseFormat, FrozenMoE
from finback.model.lora import AdaptedTransformer, LoraLinear, LoraMoE, matrices
from finback.model.low_rank import LowRank
from finback.model.mla import MLA
from finback.model.native import NativeMLA, use_native
from finback.model.pack import product_of
from finback.model.replace import recast
from finback.model.transformer import Transformer

Rows = Tensor | slice  # indices of a batch's rows


class Selection:
    """The adapters of the rows in the current pass, by number; 0: base only."""

    def __init__(self) -> None:
        self.rows = 0
        self.groups: list[tuple[int, Rows]] = []
        self.each = torch.zeros(0, dtype=torch.long)

    @contextmanager
    def of(self, numbers: Sequence[int], device: torch.device) -> Iterator[None]:
        """A context in which the rows have these adapters, one number per row."""
        met = sorted(set(numbers) - {0})
        self.rows, self.each = len(numbers), torch.tensor(numbers, device=device)
        alone = len(met) == 1 and 0 not in numbers
        self.groups = [(n, slice(None) if alone else (self.each == n).nonzero().squeeze(1)) for n in met]
        try:
            yield
        finally:
            self.groups = []


@dataclass(frozen=True, eq=False)
class AdapterPart:
    """An adapter's part of a product: the update of the outputs from `start` on."""

    start: int
    low: LowRank


class MultiLoraLinear(nn.Module):
    """A linear map of any form whose rows get their adapters' updates."""

    selection: Selection
    # by adapter number
    pieces: dict[int, list[AdapterPart]]

    def forward(self, x: Tensor) -> Tensor:
        y: Tensor = super().forward(x)  # type: ignore[misc]  # of the class that this one is layered over
        count = self.selection.rows
        for number, rows in self.selection.groups:
            for piece in self.pieces.get(number, ()):
                of_token = x.shape[-1:] if piece.low.groups is None else x.shape[-2:]
                added = piece.low(x.reshape(count, -1, *of_token)[rows])
                y.view(count, -1, y.size(-1))[rows, :, piece.start : piece.start + added.size(-1)] += added
        return y


class MultiLoraMLA(MLA):
    """MLA with adapters on the absorbed matrix: their thin products are absorbed separately."""

    def forward(
        self, x: Tensor, cos: Tensor, sin: Tensor, cache: LayerCache | None = None, attention_mask: Mask = None
    ) -> Tensor:
        if isinstance(self, NativeMLA) and self._thin():  # its kernel supports one matrix for all rows
            return MLA.forward(self, x, cos, sin, cache, attention_mask)
        return super().forward(x, cos, sin, cache, attention_mask)

    def into_latents(self, q_nope: Tensor, w_uk: Tensor) -> Tensor:
        """As without adapters, plus s · A^T B_UK^T q."""
        y = super().into_latents(q_nope, w_uk)
        for rows, low in self._thin():
            b_uk = self._by_head(low)[:, : self.config.qk_nope_head_dim]
            y[rows] += torch.einsum("bthn,hnr->bthr", q_nope[rows], b_uk) @ (low.a[0] * low.scale)
        return y

    def out_of_latents(self, read: Tensor, w_uv: Tensor) -> Tensor:
        """As without adapters, plus s · B_UV A c."""
        y = super().out_of_latents(read, w_uv)
        for rows, low in self._thin():
            b_uv = self._by_head(low)[:, self.config.qk_nope_head_dim :]
            y[rows] += torch.einsum("bthr,hvr->bthv", read[rows] @ (low.a[0] * low.scale).T, b_uv)
        return y

    def _thin(self) -> list[tuple[Rows, LowRank]]:
        """The adapters of kv_up for rows of this pass."""
        found = self.kv_up
        assert isinstance(found, MultiLoraLinear), "MLA and kv_up are adapted together"
        return [(rows, p.low) for n, rows in found.selection.groups for p in found.pieces.get(n, ())]

    def _by_head(self, low: LowRank) -> Tensor:
        """B (h, n + v, rank)."""
        return low.b[0].unflatten(0, (self.config.num_attention_heads, -1))


class MultiLoraMoE(FrozenMoE):
    """Routed experts with adapters for each; every token gets those of its row."""

    selection: Selection
    # adapters of gate_up and down by adapter number
    pairs: dict[int, dict[str, LowRank]]

    def experts(self, x: Tensor, index: Tensor, weight: Tensor, gate_up: Tensor, down: Tensor) -> Tensor:  # type: ignore[override]
        met = [number for number, _ in self.selection.groups if number in self.pairs]
        if not met:
            return super().experts(x, index, weight, gate_up, down)
        # rows are sorted by expert, then by adapter, so that an expert's weights are read once
        kinds, kind = 1 + len(met), torch.zeros_like(self.selection.each)
        for place, number in enumerate(met, start=1):
            kind[self.selection.each == number] = place
        blocks = index * kinds + kind.repeat_interleave(len(x) // self.selection.rows)[:, None]
        one, other = (self._product([self.pairs[n][name] for n in met], name) for name in ("gate_up", "down"))
        return self.by_products(x, blocks, weight, len(gate_up) * kinds, one, other)

    def _product(self, adapters: Sequence[LowRank], name: str) -> Product:
        """The product of rows in blocks numbered expert · (1 + adapters) + adapter, 0: no adapter."""
        base, kinds = self.product(name), 1 + len(adapters)

        def made(rows: Tensor, blocks: Blocks) -> Tensor:
            y = base(rows, _by_expert(blocks, kinds))
            for block, start, stop in blocks:
                expert, place = divmod(block, kinds)
                if place:
                    y[start:stop] += adapters[place - 1].of_expert(rows[start:stop], expert)
            return y

        return made


def _by_expert(blocks: Blocks, kinds: int) -> Blocks:
    """Merges blocks numbered expert · kinds + adapter into one per expert."""
    found: Blocks = []
    for block, start, stop in blocks:
        expert = block // kinds
        if found and found[-1][0] == expert:
            start = found.pop()[1]
        found.append((expert, start, stop))
    return found


class MultiLoraTransformer(Transformer):
    """A base with adapters; every row of a pass may have one."""

    # names of adapters 1, 2, …
    adapters: tuple[str, ...]
    # storage of each adapter's base in training
    bases: dict[str, BaseFormat]
    selection: Selection


@contextmanager
def adapters_of_rows(model: Transformer, numbers: Sequence[int]) -> Iterator[None]:
    """A context for passes whose rows have these adapters."""
    if not isinstance(model, MultiLoraTransformer):
        yield
        return
    with model.selection.of(numbers, model.embed.device):
        yield


def put_adapters(model: Transformer, adapters: Mapping[str, AdaptedTransformer]) -> MultiLoraTransformer:
    """Adds adapters, by the names that requests use, to an inference-only base, in place.

    Each is passed as a model of the same config; only its adapter is read.
    """
    use_native(model)  # adapters are layered over the kernels' modules
    found = recast(model, MultiLoraTransformer)
    found.adapters, found.selection = tuple(adapters), Selection()
    found.bases = {name: adapted.lora.base for name, adapted in adapters.items()}
    for number, adapted in enumerate(adapters.values(), start=1):
        for name, module, _, _ in matrices(adapted):
            if isinstance(module, LoraMoE):
                pair = {each: _moved(module.adapter(each), model) for each in ("gate_up", "down")}
                _pairs(model.get_submodule(name), found.selection)[number] = pair
            elif isinstance(module, LoraLinear):
                low = _moved(module.adapter, model)
                product, start = product_of(model, name)
                _pieces(product, found.selection).setdefault(number, []).append(AdapterPart(start, low))
    for attention in list(model.modules()):
        if isinstance(attention, MLA) and isinstance(attention.kv_up, MultiLoraLinear):
            recast(attention, MultiLoraMLA)
    return found


def _moved(low: LowRank, model: Transformer) -> LowRank:
    return low.to(model.embed.device, model.compute).requires_grad_(False)


def _pieces(module: nn.Module, selection: Selection) -> dict[int, list[AdapterPart]]:
    """Each adapter's parts of a product."""
    if not isinstance(module, MultiLoraLinear):
        module = recast(module, MultiLoraLinear)
        module.selection, module.pieces = selection, {}
    return module.pieces


def _pairs(module: nn.Module, selection: Selection) -> dict[int, dict[str, LowRank]]:
    """Each adapter's parts for experts."""
    if not isinstance(module, MultiLoraMoE):
        module = recast(module, MultiLoraMoE)
        module.selection, module.pairs = selection, {}
    return module.pairs
