"""Several adapters on one base that only answers: in a batch every row has its own, or none (as S-LoRA, arXiv 2311.03285).

The base's products run once, for all rows together; what an adapter adds is made for its rows alone. They are put on from
outside, over whatever form the base's modules have: plain, packed, several matrices in one product.
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

Rows = Tensor | slice  # places of a batch's rows


class Selection:
    """The adapters of the rows of the pass that is under way, by number; 0 is the base alone."""

    def __init__(self) -> None:
        self.rows = 0
        self.groups: list[tuple[int, Rows]] = []
        self.each = torch.zeros(0, dtype=torch.long)

    @contextmanager
    def of(self, numbers: Sequence[int], device: torch.device) -> Iterator[None]:
        """These, one a row, as long as it lasts."""
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
    """An adapter's part of a product: what it adds to the outputs from `start` on."""

    start: int
    low: LowRank


class MultiLoraLinear(nn.Module):
    """A linear map, of whatever form, whose rows get what their adapters add."""

    selection: Selection
    # by the number of the adapter
    pieces: dict[int, list[AdapterPart]]

    def forward(self, x: Tensor) -> Tensor:
        y: Tensor = super().forward(x)  # type: ignore[misc]  # of the module that this class lies over
        count = self.selection.rows
        for number, rows in self.selection.groups:
            for piece in self.pieces.get(number, ()):
                of_token = x.shape[-1:] if piece.low.groups is None else x.shape[-2:]
                added = piece.low(x.reshape(count, -1, *of_token)[rows])
                y.view(count, -1, y.size(-1))[rows, :, piece.start : piece.start + added.size(-1)] += added
        return y


class MultiLoraMLA(MLA):
    """MLA where adapters lie on the matrix that is absorbed: their thin products are absorbed beside it."""

    def forward(
        self, x: Tensor, cos: Tensor, sin: Tensor, cache: LayerCache | None = None, attention_mask: Mask = None
    ) -> Tensor:
        if isinstance(self, NativeMLA) and self._thin():  # its kernel knows of one matrix for all rows
            return MLA.forward(self, x, cos, sin, cache, attention_mask)
        return super().forward(x, cos, sin, cache, attention_mask)

    def into_latents(self, q_nope: Tensor, w_uk: Tensor) -> Tensor:
        """As without adapters, and s · A^T B_UK^T q."""
        y = super().into_latents(q_nope, w_uk)
        for rows, low in self._thin():
            b_uk = self._by_head(low)[:, : self.config.qk_nope_head_dim]
            y[rows] += torch.einsum("bthn,hnr->bthr", q_nope[rows], b_uk) @ (low.a[0] * low.scale)
        return y

    def out_of_latents(self, read: Tensor, w_uv: Tensor) -> Tensor:
        """As without adapters, and s · B_UV A c."""
        y = super().out_of_latents(read, w_uv)
        for rows, low in self._thin():
            b_uv = self._by_head(low)[:, self.config.qk_nope_head_dim :]
            y[rows] += torch.einsum("bthr,hvr->bthv", read[rows] @ (low.a[0] * low.scale).T, b_uv)
        return y

    def _thin(self) -> list[tuple[Rows, LowRank]]:
        """The adapters of kv_up that rows of this pass have."""
        found = self.kv_up
        assert isinstance(found, MultiLoraLinear), "put on together"
        return [(rows, p.low) for n, rows in found.selection.groups for p in found.pieces.get(n, ())]

    def _by_head(self, low: LowRank) -> Tensor:
        """B (h, n + v, rank)."""
        return low.b[0].unflatten(0, (self.config.num_attention_heads, -1))


class MultiLoraMoE(FrozenMoE):
    """Routed experts with adapters for each, of which every token gets those of its row."""

    selection: Selection
    # gate_up's and down's by the number of the adapter
    pairs: dict[int, dict[str, LowRank]]

    def experts(self, x: Tensor, index: Tensor, weight: Tensor, gate_up: Tensor, down: Tensor) -> Tensor:  # type: ignore[override]
        met = [number for number, _ in self.selection.groups if number in self.pairs]
        if not met:
            return super().experts(x, index, weight, gate_up, down)
        # rows are laid out by expert, and for each by adapter, so that an expert's weights are read once
        kinds, kind = 1 + len(met), torch.zeros_like(self.selection.each)
        for place, number in enumerate(met, start=1):
            kind[self.selection.each == number] = place
        blocks = index * kinds + kind.repeat_interleave(len(x) // self.selection.rows)[:, None]
        one, other = (self._product([self.pairs[n][name] for n in met], name) for name in ("gate_up", "down"))
        return self.by_products(x, blocks, weight, len(gate_up) * kinds, one, other)

    def _product(self, adapters: Sequence[LowRank], name: str) -> Product:
        """That of rows in blocks numbered expert · (1 + adapters) + adapter, 0 without one."""
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
    """Blocks that are numbered expert · kinds + adapter as one for each expert."""
    found: Blocks = []
    for block, start, stop in blocks:
        expert = block // kinds
        if found and found[-1][0] == expert:
            start = found.pop()[1]
        found.append((expert, start, stop))
    return found


class MultiLoraTransformer(Transformer):
    """A base with adapters, of which every row of a pass may have one."""

    # of the adapters 1, 2, …
    adapters: tuple[str, ...]
    # how the base of each lay in memory when it learnt
    bases: dict[str, BaseFormat]
    selection: Selection


@contextmanager
def adapters_of_rows(model: Transformer, numbers: Sequence[int]) -> Iterator[None]:
    """Passes of so many rows with these adapters, as long as it lasts."""
    if not isinstance(model, MultiLoraTransformer):
        yield
        return
    with model.selection.of(numbers, model.embed.device):
        yield


def put_adapters(model: Transformer, adapters: Mapping[str, AdaptedTransformer]) -> MultiLoraTransformer:
    """Put adapters, by the names that requests call them, on a base that only answers, in place.

    Each comes on a model of the same config, of which nothing but the adapter is read.
    """
    use_native(model)  # what is put on lies over the kernels' modules
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
    """What a product gets of each adapter."""
    if not isinstance(module, MultiLoraLinear):
        module = recast(module, MultiLoraLinear)
        module.selection, module.pieces = selection, {}
    return module.pieces


def _pairs(module: nn.Module, selection: Selection) -> dict[int, dict[str, LowRank]]:
    """What experts get of each adapter."""
    if not isinstance(module, MultiLoraMoE):
        module = recast(module, MultiLoraMoE)
        module.selection, module.pairs = selection, {}
    return module.pairs
