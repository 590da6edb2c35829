"""Rotary position embedding, interleaved as in DeepSeek's weights or half-split as in Llama's, and its scaling."""

import math
from typing import TypeVar

import torch
from torch import Tensor

from finback.kernels.heads import rotate_half, rotate_interleaved
from finback.model.config import ModelConfig
from finback.model.rope_scaling import LinearRope, Llama3Rope, LongRope, Yarn


def inverse_frequencies(config: ModelConfig) -> Tensor:
    """Radians per position for each rotary pair, (rope_dim / 2,), scaled as configured."""
    scaling = config.rope_scaling
    freq = plain_frequencies(config.rope_dim, config.rope_theta)
    if isinstance(scaling, Yarn):
        freq = _yarn(freq, scaling, config.rope_theta)
    elif isinstance(scaling, Llama3Rope):
        freq = _llama3(freq, scaling)
    elif isinstance(scaling, LinearRope):
        freq = freq / scaling.factor
    return freq.float()


def plain_frequencies(dim: int, theta: float) -> Tensor:
    """theta^(-2i / dim) for each rotary pair i, (dim / 2,) in fp64."""
    return theta ** (-torch.arange(0, dim, 2, dtype=torch.float64, device="cpu") / dim)


def _yarn(freq: Tensor, yarn: Yarn, theta: float) -> Tensor:
    """YaRN (arXiv 2309.00071, constants of V3 4.3).

    Pairs that turn fewer than `beta_slow` times within the original window are interpolated by `factor`, those above `beta_fast`
    are unchanged, with a linear ramp in between.
    """
    if yarn.factor <= 1:
        return freq
    dim = 2 * len(freq)

    def pair_turning(turns: float) -> float:
        """The (fractional) index of the pair that makes `turns` turns within the original window."""
        return dim * math.log(yarn.original_max_position_embeddings / (2 * math.pi * turns)) / (2 * math.log(theta))

    first, last = pair_turning(yarn.beta_fast), pair_turning(yarn.beta_slow)
    low, high = (math.floor(first), math.ceil(last)) if yarn.truncate else (first, last)
    low, high = max(low, 0), min(high, dim - 1)
    ramp = ((torch.arange(len(freq), dtype=torch.float64, device="cpu") - low) / max(high - low, 0.001)).clamp(0, 1)
    return freq / yarn.factor * ramp + freq * (1 - ramp)


def _llama3(freq: Tensor, s: Llama3Rope) -> Tensor:
    """Llama 3.1: the number of turns of a pair within the original window decides how much it is scaled by `factor`."""
    turns = s.original_max_position_embeddings * freq / (2 * math.pi)
    unscaled = ((turns - s.low_freq_factor) / (s.high_freq_factor - s.low_freq_factor)).clamp(0, 1)
    return freq / s.factor * (1 - unscaled) + freq * unscaled


def softmax_scale(config: ModelConfig) -> float:
    """Scale of attention scores: d^-1/2, for MLA times mscale(mscale_all_dim)^2 under YaRN (0.135234 for V3)."""
    scale, yarn = (config.query_pre_attn_scalar or config.qk_head_dim) ** -0.5, config.rope_scaling
    if config.attention == "mla" and isinstance(yarn, Yarn):
        return scale * yarn.stretch(yarn.mscale_all_dim) ** 2
    return scale


def rotation(config: ModelConfig, length: int) -> tuple[Tensor, Tensor]:
    """cos and sin tables, (length, rope_dim / 2) each, in fp32; `first_row` gives their first row.

    If sliding layers differ, a row is [other layers | sliding layers]. LongRoPE has a second table below, for long inputs.
    """
    scaling, positions = config.rope_scaling, torch.arange(length, dtype=torch.float32, device="cpu")
    if isinstance(scaling, LongRope):
        plain, gain = plain_frequencies(config.rope_dim, config.rope_theta), scaling.attention_factor
        factors = (
            torch.tensor(f, dtype=torch.float64, device="cpu") for f in (scaling.short_factor, scaling.long_factor)
        )
        angles = torch.cat([torch.outer(positions, (plain / factor).float()) for factor in factors])
        return angles.cos() * gain, angles.sin() * gain
    angles = torch.outer(positions, inverse_frequencies(config))
    gain = scaling.gain if isinstance(scaling, Yarn) else 1.0
    cos, sin = angles.cos() * gain, angles.sin() * gain
    if config.local_rope_theta is None:
        return cos, sin
    angles = torch.outer(positions, plain_frequencies(config.rope_dim, config.local_rope_theta).float())
    return torch.cat([cos, angles.cos()], dim=-1), torch.cat([sin, angles.sin()], dim=-1)


Reach = TypeVar("Reach", int, Tensor)


def first_row(config: ModelConfig, reach: Reach) -> Reach | int:
    """First table row for inputs of this length: 0, except for long ones under LongRoPE."""
    scaling = config.rope_scaling
    if not isinstance(scaling, LongRope):
        return 0
    return (reach > scaling.original_max_position_embeddings) * config.max_position_embeddings


def rotate_first(x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    """Rotates the first dimensions of x (..., head_dim), as many as cos and sin cover; the others have no position."""
    turned, rest = x.split([2 * cos.size(-1), x.size(-1) - 2 * cos.size(-1)], dim=-1)
    return torch.cat([rotate_half(turned, cos, sin), rest], dim=-1)


def rotate_last(x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    """Rotates the last dimensions of x (..., head_dim), as many as cos and sin cover, as `rotate_interleaved` does (V4 2.3)."""
    rest, turned = x.split([x.size(-1) - 2 * cos.size(-1), 2 * cos.size(-1)], dim=-1)
    return torch.cat([rest, rotate_interleaved(turned, cos, sin)], dim=-1)


def unrotate_last(x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    """The inverse of `rotate_last`, which restores adjacent pairs."""
    rest, turned = x.split([x.size(-1) - 2 * cos.size(-1), 2 * cos.size(-1)], dim=-1)
    first, second = turned.chunk(2, dim=-1)
    pairs = torch.stack([first * cos + second * sin, second * cos - first * sin], dim=-1)
    return torch.cat([rest, pairs.flatten(-2)], dim=-1)


def rotate_nothing(x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    """x unchanged, for layers without positions (NoPE, arXiv 2305.19466)."""
    return x
