"""Rotary position embedding, interleaved as in DeepSeek's weights or half-split as in Llama's, with YaRN."""

import math

import torch
from torch import Tensor

from finback.model.config import ModelConfig, Yarn


def inverse_frequencies(config: ModelConfig) -> Tensor:
    """Radians per position for each rotary pair, (rope_dim / 2,), YaRN-corrected when configured.

    YaRN (arXiv 2309.00071, constants of V3 4.3): pairs that turn fewer than `beta_slow` times within the
    original window are interpolated by `factor`, those above `beta_fast` are kept, a linear ramp in between.
    """
    dim = config.rope_dim
    freq = config.rope_theta ** (-torch.arange(0, dim, 2, dtype=torch.float64) / dim)
    yarn = config.rope_scaling
    if yarn is None or yarn.factor <= 1:
        return freq.float()
    low = max(math.floor(_pair_turning(yarn.beta_fast, yarn, dim, config.rope_theta)), 0)
    high = min(math.ceil(_pair_turning(yarn.beta_slow, yarn, dim, config.rope_theta)), dim - 1)
    ramp = ((torch.arange(dim // 2, dtype=torch.float64) - low) / max(high - low, 0.001)).clamp(0, 1)
    return (freq / yarn.factor * ramp + freq * (1 - ramp)).float()


def _pair_turning(turns: float, yarn: Yarn, dim: int, theta: float) -> float:
    """The (fractional) index of the pair that makes `turns` turns within the original window."""
    return (
        dim * math.log(yarn.original_max_position_embeddings / (2 * math.pi * turns)) / (2 * math.log(theta))
    )


def softmax_scale(config: ModelConfig) -> float:
    """Scale on attention scores: d^-1/2, times mscale(mscale_all_dim)^2 under YaRN (0.135234 for V3)."""
    scale = config.qk_head_dim**-0.5
    yarn = config.rope_scaling
    return scale * _mscale(yarn.factor, yarn.mscale_all_dim) ** 2 if yarn else scale


def _mscale(factor: float, m: float) -> float:
    return 0.1 * m * math.log(factor) + 1 if factor > 1 else 1.0


def rotation(config: ModelConfig, length: int) -> tuple[Tensor, Tensor]:
    """cos and sin tables, (length, rope_dim / 2) each, in fp32."""
    angles = torch.outer(torch.arange(length, dtype=torch.float32), inverse_frequencies(config))
    yarn = config.rope_scaling
    gain = _mscale(yarn.factor, yarn.mscale) / _mscale(yarn.factor, yarn.mscale_all_dim) if yarn else 1.0
    return angles.cos() * gain, angles.sin() * gain


def rotate_interleaved(x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    """Rotate pairs (0,1), (2,3), … of x (..., rope_dim); cos and sin broadcast against (..., rope_dim / 2).

    The result is laid out [first of each pair | second of each pair]: queries and keys share the permutation,
    so scores are those of the paper, and it saves interleaving them again.
    """
    even, odd = x[..., 0::2], x[..., 1::2]
    return torch.cat([even * cos - odd * sin, even * sin + odd * cos], dim=-1)


def rotate_half(x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    """Rotate pairs (i, i + rope_dim / 2) of x (..., rope_dim): the layout of Llama and Qwen weights."""
    first, second = x.chunk(2, dim=-1)
    return torch.cat([first * cos - second * sin, first * sin + second * cos], dim=-1)
