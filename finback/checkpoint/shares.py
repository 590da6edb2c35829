"""Fills shares of a model from a seed or from files, so that no rank ever holds more than its own share.

A share records its position in the whole tensor. The code that fills it knows nothing of ranks or layouts.
"""

import itertools
import math
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Protocol

import torch
from torch import Tensor

from finback.checkpoint.shards import Weights
from finback.kernels import fp8
from finback.model.config import ModelConfig
from finback.model.layers import OwnStart, first_value
from finback.model.transformer import Transformer

# Numbers drawn at a time. torch draws normal numbers in blocks of 16, so pieces of a multiple of 16 are drawn as the
# whole would be.
DRAWN = 1 << 20
SLICE = 8 * fp8.BLOCK  # rows of an FP8 matrix dequantized at a time


@dataclass(frozen=True)
class Share:
    """A rectangular part of a tensor that this rank holds, and its position in the whole."""

    # the tensor's name in Transformer.state_dict
    name: str
    # shape of the whole tensor
    shape: tuple[int, ...]
    # start of the part in each dimension
    offset: tuple[int, ...]
    # the part itself, contiguous; a view, so that filling it fills the tensor
    local: Tensor

    def runs(self) -> Iterator[tuple[int, Tensor]]:
        """Yields each piece that is contiguous in the whole tensor: its flat start there, and a flat view of it."""
        flat = self.local.detach().view(-1)
        done = 0
        for start, length in runs(self.shape, self.offset, tuple(self.local.shape)):
            yield start, flat[done : done + length]
            done += length


def whole(name: str, tensor: Tensor) -> Share:
    """Returns a share that is the whole tensor."""
    return Share(name, tuple(tensor.shape), (0,) * tensor.ndim, tensor)


def runs(shape: tuple[int, ...], offset: tuple[int, ...], sizes: tuple[int, ...]) -> Iterator[tuple[int, int]]:
    """Yields (start, length) of the contiguous pieces of a box of these sizes in a row-major tensor, in order."""
    cut = max((d for d, (size, whole) in enumerate(zip(sizes, shape, strict=True)) if size != whole), default=0)
    strides = [math.prod(shape[d + 1 :]) for d in range(len(shape))]
    length = math.prod(sizes[cut:])
    base = sum(o * s for o, s in zip(offset, strides, strict=True))
    if length:
        for index in itertools.product(*(range(size) for size in sizes[:cut])):
            yield base + sum(i * s for i, s in zip(index, strides, strict=False)), length


class Values(Protocol):
    """A source of a model's values."""

    def fill(self, shares: Sequence[Share]) -> None:
        """Fills all shares in place; several may belong to one tensor."""
        ...


class Seeded(Values):
    """The initial weights of Transformer.initialise(seed), bit for bit; router biases are 0.

    Every rank draws all numbers and keeps its own, because a generator cannot skip.
    """

    def __init__(self, config: ModelConfig, seed: int) -> None:
        self.config, self.seed = config, seed

    @torch.no_grad()
    def fill(self, shares: Sequence[Share]) -> None:
        wanted: dict[str, list[Share]] = {}
        for share in shares:
            wanted.setdefault(share.name, []).append(share)
        by_name, generator = dict(wanted), torch.Generator().manual_seed(self.seed)
        with torch.device("meta"):
            model = Transformer(self.config)
        for name, parameter in model.named_parameters():
            mine = wanted.pop(name, [])
            if parameter.ndim < 2:
                for share in mine:
                    share.local.detach().fill_(first_value(model, name))
                continue
            targets = [run for share in mine for run in share.runs()]
            for begin, numbers in drawn(parameter.numel(), self.config.initializer_range, generator):
                _take(targets, begin, numbers)
        for name, tensor in own_starts(model, generator):
            for share in by_name.get(name, ()):
                _take(share.runs(), 0, tensor.flatten())
            wanted.pop(name, None)
        for name, left in wanted.items():
            assert name.endswith("router.bias"), f"the model has no {name}"
            for share in left:
                share.local.zero_()


def own_starts(model: Transformer, generator: torch.Generator) -> Iterator[tuple[str, Tensor]]:
    """Yields names and initial values of tensors that modules initialise themselves, in the order of `initialise`."""
    for name, part in list(model.named_modules()):
        if isinstance(part, OwnStart):
            part.to_empty(device="cpu", recurse=False)
            part.start(generator)
            yield from ((f"{name}.{leaf}", getattr(part, leaf).detach()) for leaf in part.starts)


def drawn(count: int, std: float, generator: torch.Generator) -> Iterator[tuple[int, Tensor]]:
    """Yields `count` normal numbers in pieces with their starts: the same numbers as if drawn at once."""
    begin = 0
    while begin < count:
        length = min(DRAWN, count - begin)
        if count - begin - length < 16:  # a last piece below 16 would be drawn differently
            length = count - begin
        yield begin, torch.empty(length).normal_(0.0, std, generator=generator)
        begin += length


def _take(targets: Iterable[tuple[int, Tensor]], begin: int, numbers: Tensor) -> None:
    """Copies into each target its overlap with `numbers`, which start at flat position `begin`."""
    end = begin + len(numbers)
    for start, view in targets:
        first, last = max(start, begin), min(start + len(view), end)
        if first < last:
            view[first - start : last - start] = numbers[first - begin : last - begin]


class Stored(Values):
    """Stored weights: reads only the bytes that shares need, and dequantizes FP8 a few rows at a time."""

    def __init__(self, weights: Weights, names: Mapping[str, tuple[str, ...]]) -> None:
        """names: for each of our tensors the stored tensors that it consists of: equal parts, in row order."""
        self.weights, self.names = weights, names

    @torch.no_grad()
    def fill(self, shares: Sequence[Share]) -> None:
        wanted: dict[str, list[tuple[int, Tensor]]] = {}
        for share in shares:
            if share.name not in self.names:
                assert share.name.endswith("router.bias"), f"no stored tensor for {share.name}"
                share.local.zero_()  # a family that has none
                continue
            parts = self.names[share.name]
            size = math.prod(share.shape) // len(parts)
            for start, view in share.runs():
                done = 0
                while done < len(view):
                    number, at = divmod(start + done, size)
                    stop = min(len(view), done + size - at)
                    wanted.setdefault(parts[number], []).append((at, view[done:stop]))
                    done = stop
        for name in self.weights.by_file():
            self._read(name, wanted.pop(name, []))
        assert not wanted, f"not stored: {sorted(wanted)}"

    def _read(self, name: str, pieces: list[tuple[int, Tensor]]) -> None:
        scale = self.weights.scale(name) if pieces else None
        for start, into in pieces:
            if scale is None:
                self.weights.read_range(name, start, into)
            else:
                self._dequantize(name, scale, start, into)

    def _dequantize(self, name: str, scale: Tensor, start: int, into: Tensor) -> None:
        """Dequantizes rows of an FP8 matrix; also reads earlier rows in the block of the first."""
        columns = self.weights.specs[name].shape[1]
        assert start % columns == 0 and len(into) % columns == 0, "whole rows"
        out = into.view(-1, columns)
        first, end = start // columns, start // columns + len(out)
        for row in range(first - first % fp8.BLOCK, end, SLICE):
            stop = min(row + SLICE, end)
            values = torch.empty(stop - row, columns, dtype=torch.float8_e4m3fn)
            self.weights.read_range(name, row * columns, values.view(-1))
            rows = fp8.dequantize(values, scale[row // fp8.BLOCK : fp8.blocks(stop)], torch.float32)
            out[max(row, first) - first : stop - first] = rows[max(0, first - row) :].to(into.device)
