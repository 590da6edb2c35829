"""Packs llama.cpp's Q4_K and Q6_K, which the gguf library only reads: blocks of 256 numbers, sub-blocks with scales.

Scales are found as in llama.cpp: of some candidates, each refined by a least-squares fit, the one with the smallest
weighted error. All sub-blocks of a matrix are searched at once.
"""

import numpy as np
import torch
from torch import Tensor

from finback.kernels.quants import KINDS

ROWS = 1 << 12  # blocks packed at a time
TINY = 1e-30


def quantize(matrix: Tensor, kind: str) -> np.ndarray:
    """Packs a matrix (..., columns), columns a multiple of 256, into bytes (..., columns / 256 · bytes of a block)."""
    pack = {"Q4_K": _q4_k, "Q6_K": _q6_k}[kind]
    blocks = matrix.detach().float().reshape(-1, KINDS[kind].columns)
    packed = torch.cat([pack(part) for part in blocks.split(ROWS)])
    return packed.view(*matrix.shape[:-1], -1).numpy()


def _q4_k(x: Tensor) -> Tensor:
    """x (n, 256) -> (n, 144): value = d · sc · q - dmin · m for each 32, sc and m in six bits, q in four."""
    x = x.unflatten(1, (8, 32))
    scale, low = _scale_and_low(x)
    d, d_low = (part.amax(1, keepdim=True).div(63).half().float() for part in (scale, low))
    sc, m = ((part / whole.clamp(min=TINY)).round().clamp(0, 63) for part, whole in ((scale, d), (low, d_low)))
    step, offset = (d * sc)[:, :, None], (d_low * m)[:, :, None]
    q = torch.where(step > 0, (x + offset) / step.clamp(min=TINY), 0).round().clamp(0, 15).to(torch.uint8)
    sc, m = sc.to(torch.uint8), m.to(torch.uint8)
    first = (sc[:, :4] | (sc[:, 4:] >> 4 << 6), m[:, :4] | (m[:, 4:] >> 4 << 6))
    scales = torch.cat([*first, (sc[:, 4:] & 15) | ((m[:, 4:] & 15) << 4)], dim=1)
    pairs = q.unflatten(1, (4, 2))  # two groups of 32 numbers share 32 bytes
    nibbles = (pairs[:, :, 0] | (pairs[:, :, 1] << 4)).flatten(1)
    return torch.cat([_half(d), _half(d_low), scales, nibbles], dim=1)


def _scale_and_low(x: Tensor) -> tuple[Tensor, Tensor]:
    """Returns scale and offset >= 0 of each sub-block (..., 32) such that x ≈ scale · q - offset, q in 0..15."""
    weight = x.square().mean(-1, keepdim=True).sqrt() + x.abs()
    lowest, highest = x.amin(-1, keepdim=True).clamp(max=0), x.amax(-1, keepdim=True)
    span = (highest - lowest).clamp(min=TINY)
    best_error = torch.full_like(span, torch.inf)
    best_scale, best_low = torch.zeros_like(span), torch.zeros_like(span)
    sum_w, sum_x = weight.sum(-1, keepdim=True), (weight * x).sum(-1, keepdim=True)
    for step in range(21):
        q = ((x - lowest) * ((14 + 0.1 * step) / span)).round().clamp(0, 15)
        sum_l, sum_l2 = (weight * q).sum(-1, keepdim=True), (weight * q * q).sum(-1, keepdim=True)
        sum_xl = (weight * q * x).sum(-1, keepdim=True)
        determinant = sum_w * sum_l2 - sum_l * sum_l
        scale = (sum_w * sum_xl - sum_x * sum_l) / determinant.clamp(min=TINY)
        low = (sum_l2 * sum_x - sum_l * sum_xl) / determinant.clamp(min=TINY)
        above = low > 0  # offsets are not negative: fit a line through zero instead
        scale, low = torch.where(above, sum_xl / sum_l2.clamp(min=TINY), scale), low.clamp(max=0)
        error = (weight * (scale * q + low - x).square()).sum(-1, keepdim=True)
        better = (error < best_error) & (scale > 0)
        best_error = torch.where(better, error, best_error)
        best_scale, best_low = torch.where(better, scale, best_scale), torch.where(better, -low, best_low)
    return best_scale.squeeze(-1), best_low.squeeze(-1)


def _q6_k(x: Tensor) -> Tensor:
    """x (n, 256) -> (n, 210): value = d · sc · (q - 32) for each 16, sc in eight bits with a sign, q in six."""
    x = x.unflatten(1, (16, 16))
    scale = _signed_scale(x)
    largest = scale.gather(1, scale.abs().argmax(1, keepdim=True))
    d = (largest / -128).half().float()
    sc = torch.where(d != 0, scale / torch.where(d != 0, d, 1), 0).round().clamp(-128, 127)
    step = (d * sc)[:, :, None]
    q = torch.where(step != 0, x / torch.where(step != 0, step, 1), 0).round().clamp(-32, 31) + 32
    halves = q.to(torch.uint8).flatten(1).unflatten(1, (2, 4, 32))
    low = torch.stack([(halves[:, :, i] & 15) | ((halves[:, :, i + 2] & 15) << 4) for i in range(2)], dim=2)
    high = sum(((halves[:, :, i] >> 4) << (2 * i) for i in range(1, 4)), halves[:, :, 0] >> 4)
    return torch.cat([low.flatten(1), high.flatten(1), sc.to(torch.int8).view(torch.uint8), _half(d)], dim=1)


def _signed_scale(x: Tensor) -> Tensor:
    """Returns the signed scale of each sub-block (..., 16) such that x ≈ scale · q, q in -32..31."""
    largest = x.gather(-1, x.abs().argmax(-1, keepdim=True))
    safe = torch.where(largest.abs() > TINY, largest, 1)
    best, best_scale = torch.full_like(largest, -1.0), torch.zeros_like(largest)
    weight = x.square()
    for step in range(-9, 10):
        q = (x * (-(32 + 0.1 * step) / safe)).round().clamp(-32, 31)
        fit, power = (weight * x * q).sum(-1, keepdim=True), (weight * q * q).sum(-1, keepdim=True)
        gained = fit * fit / power.clamp(min=TINY)
        better = (gained > best) & (power > 0)
        best, best_scale = (
            torch.where(better, gained, best),
            torch.where(better, fit / power.clamp(min=TINY), best_scale),
        )
    return torch.where(largest.abs() > TINY, best_scale, 0).squeeze(-1)


def _half(x: Tensor) -> Tensor:
    """Returns numbers (n, 1) as fp16 bytes (n, 2)."""
    return x.half().contiguous().view(torch.uint8)
