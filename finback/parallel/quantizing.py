"""Quantizes the base of an adapter by shares: each rank reads its rows in bf16, one matrix at a time, and packs them.

Formats pack each row independently, so the ranks' results together equal those of one rank. Twin: checkpoint/quantized_base.py.
"""

import math
from collections import defaultdict
from collections.abc import Sequence
from dataclasses import replace
from functools import partial

import torch

from finback.checkpoint import peft
from finback.checkpoint.shares import Share, Values
from finback.kernels.formats import Format
from finback.model.quantized import FACTORS
from finback.parallel.gather import sampled


class Quantizing(Values):
    """Values for shares, some of which are packed. Filling collects `samples`: each module's part of the base's digest."""

    def __init__(self, values: Values, form: Format) -> None:
        self.values, self.form = values, form
        self.samples: defaultdict[str, bytes] = defaultdict(bytes)
        # numbers per packed value
        self.held = 2 // form.quantize(torch.zeros(1, 2))[0].size(1)

    @torch.no_grad()
    def fill(self, shares: Sequence[Share]) -> None:
        by_name = {share.name: share for share in shares}
        factors = {name: by_name[name + FACTORS] for name in by_name if name + FACTORS in by_name}
        apart = {name for packed in factors for name in (packed, packed + FACTORS)}
        self.values.fill([share for share in shares if share.name not in apart])
        for name, scale in factors.items():
            self._pack(by_name[name], scale)

    def _pack(self, packed: Share, scale: Share) -> None:
        *rows, width = packed.local.shape
        local = torch.empty(*rows, width * self.held, dtype=torch.bfloat16, device=packed.local.device)
        matrix = replace(packed, shape=(*packed.shape[:-1], packed.shape[-1] * self.held), local=local)
        self.values.fill([matrix])
        module = packed.name.rpartition(".")[0]
        self.samples[module] += peft.sample(module, math.prod(matrix.shape), partial(sampled, matrix))
        stacked = (t if t.ndim > 2 else t[None] for t in (local, packed.local, scale.local))
        for whole, values, factors in zip(*stacked, strict=True):
            for target, made in zip((values, factors), self.form.quantize(whole), strict=True):
                target.copy_(made)
