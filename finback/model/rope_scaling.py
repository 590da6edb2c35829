"""Scaling of rotary embeddings for longer windows: the kinds of `rope_scaling` in `config.json`. Does not import torch."""

import math
from dataclasses import dataclass

from finback.config import UserError, check_fields, check_positive


@dataclass(frozen=True)
class Yarn:
    """YaRN context extension (V3 report 4.3); constants as in `config.json` under `rope_scaling`."""

    # new window over original window
    factor: float = 40.0
    # original window, in tokens
    original_max_position_embeddings: int = 4096
    # dimensions with more turns than this in the original window keep their frequency
    beta_fast: float = 32.0
    # those with fewer turns than this have it divided by `factor`; between the two is a linear ramp
    beta_slow: float = 1.0
    # temperature: cos and sin are scaled by 0.1 mscale ln(factor) + 1, divided by the same with mscale_all_dim
    mscale: float = 1.0
    # 0 if the softmax scale is unchanged (Qwen): cos and sin then carry the whole factor
    mscale_all_dim: float = 1.0
    # scale of cos and sin; None: from the two above
    attention_factor: float | None = None
    # whether the ends of the ramp are rounded to whole pairs (not in gpt-oss)
    truncate: bool = True

    def __post_init__(self) -> None:
        check_fields(self, "rope_scaling")
        check_positive(self, "rope_scaling", "factor", "original_max_position_embeddings", "beta_fast", "beta_slow")

    @property
    def gain(self) -> float:
        """Scale of cos and sin."""
        if self.attention_factor is not None:
            return self.attention_factor
        return self.stretch(self.mscale) / self.stretch(self.mscale_all_dim)

    def stretch(self, m: float) -> float:
        """0.1 m ln(factor) + 1, YaRN's temperature correction of attention (1 without extension)."""
        return 0.1 * m * math.log(self.factor) + 1 if self.factor > 1 else 1.0


@dataclass(frozen=True)
class Llama3Rope:
    """Llama 3.1's frequency scaling: long wavelengths divided by `factor`, short ones unchanged, a ramp in between."""

    # divisor of the frequencies of long wavelengths
    factor: float = 8.0
    # wavelengths longer than the original window over this are long
    low_freq_factor: float = 1.0
    # wavelengths shorter than the original window over this are short
    high_freq_factor: float = 4.0
    # original window, in tokens
    original_max_position_embeddings: int = 8192

    def __post_init__(self) -> None:
        check_fields(self, "rope_scaling")
        check_positive(self, "rope_scaling", "factor", "low_freq_factor", "original_max_position_embeddings")
        if self.high_freq_factor <= self.low_freq_factor:
            field = "rope_scaling.high_freq_factor"
            raise UserError(field, self.high_freq_factor, "not above low_freq_factor", "Raise it.")


@dataclass(frozen=True)
class LinearRope:
    """Position interpolation (arXiv 2306.15595): all frequencies are divided by `factor`."""

    # new window over original window
    factor: float = 1.0

    def __post_init__(self) -> None:
        check_fields(self, "rope_scaling")
        check_positive(self, "rope_scaling", "factor")


@dataclass(frozen=True)
class DynamicRope:
    """Dynamic NTK scaling: the base grows with rows longer than the window; since none is longer here, it changes nothing."""

    # longest row over the window
    factor: float = 1.0

    def __post_init__(self) -> None:
        check_fields(self, "rope_scaling")
        check_positive(self, "rope_scaling", "factor")


@dataclass(frozen=True)
class LongRope:
    """LongRoPE (arXiv 2402.13753): each frequency is divided by its own factor, with a second set for longer rows."""

    # one factor per rotary pair, for rows within the pre-training window
    short_factor: tuple[float, ...] = ()
    # one factor per rotary pair, for rows beyond it
    long_factor: tuple[float, ...] = ()
    # pre-training window, in tokens
    original_max_position_embeddings: int = 4096
    # scale of cos and sin
    attention_factor: float = 1.0

    def __post_init__(self) -> None:
        check_fields(self, "rope_scaling")
        check_positive(self, "rope_scaling", "original_max_position_embeddings", "attention_factor")
        for name in ("short_factor", "long_factor"):
            if not all(factor > 0 for factor in getattr(self, name)):
                raise UserError(f"rope_scaling.{name}", getattr(self, name), "not above 0", "Correct it.")


RopeScaling = Yarn | Llama3Rope | LinearRope | DynamicRope | LongRope
# classes by `rope_type`
KINDS: dict[str, type[RopeScaling]] = {
    "yarn": Yarn,
    "llama3": Llama3Rope,
    "linear": LinearRope,
    "dynamic": DynamicRope,
    "longrope": LongRope,
}
