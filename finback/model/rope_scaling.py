"""How rotary embeddings are stretched to a longer window: the kinds of `rope_scaling` in `config.json`. No torch here."""

import math
from dataclasses import dataclass

from finback.config import UserError, check_fields, check_positive


@dataclass(frozen=True)
class Yarn:
    """YaRN context extension (V3 report 4.3): constants as in `config.json` under `rope_scaling`."""

    # the new window over the old one
    factor: float = 40.0
    # the old window, in tokens
    original_max_position_embeddings: int = 4096
    # dimensions that turn more often than this within the old window keep their frequency
    beta_fast: float = 32.0
    # those that turn less often have it divided by `factor`; between the two lies a ramp
    beta_slow: float = 1.0
    # of the temperature: cos and sin grow by 0.1 mscale ln(factor) + 1, over the same of mscale_all_dim
    mscale: float = 1.0
    # 0 where the softmax scale stays (Qwen): cos and sin then carry the whole factor
    mscale_all_dim: float = 1.0
    # what cos and sin are multiplied with; None: from the two above
    attention_factor: float | None = None
    # whether the ends of the ramp are whole pairs (gpt-oss: not)
    truncate: bool = True

    def __post_init__(self) -> None:
        check_fields(self, "rope_scaling")
        check_positive(self, "rope_scaling", "factor", "original_max_position_embeddings", "beta_fast", "beta_slow")

    @property
    def gain(self) -> float:
        """What cos and sin are multiplied with."""
        if self.attention_factor is not None:
            return self.attention_factor
        return self.stretch(self.mscale) / self.stretch(self.mscale_all_dim)

    def stretch(self, m: float) -> float:
        """0.1 m ln(factor) + 1, YaRN's correction of attention's temperature (1 without extension)."""
        return 0.1 * m * math.log(self.factor) + 1 if self.factor > 1 else 1.0


@dataclass(frozen=True)
class Llama3Rope:
    """Llama 3.1's frequency scaling: long waves divided by `factor`, short ones kept, a ramp in between."""

    # what the frequencies of long waves are divided by
    factor: float = 8.0
    # waves longer than the old window over this are long
    low_freq_factor: float = 1.0
    # waves shorter than the old window over this are short
    high_freq_factor: float = 4.0
    # the old window, in tokens
    original_max_position_embeddings: int = 8192

    def __post_init__(self) -> None:
        check_fields(self, "rope_scaling")
        check_positive(self, "rope_scaling", "factor", "low_freq_factor", "original_max_position_embeddings")
        if self.high_freq_factor <= self.low_freq_factor:
            field = "rope_scaling.high_freq_factor"
            raise UserError(field, self.high_freq_factor, "not above low_freq_factor", "Raise it.")


@dataclass(frozen=True)
class LinearRope:
    """Position interpolation (arXiv 2306.15595): every frequency divided by `factor`."""

    # the new window over the old one
    factor: float = 1.0

    def __post_init__(self) -> None:
        check_fields(self, "rope_scaling")
        check_positive(self, "rope_scaling", "factor")


@dataclass(frozen=True)
class DynamicRope:
    """Dynamic NTK scaling: the base grows with rows longer than the window, which no row is here; within it nothing changes."""

    # the longest row over the window
    factor: float = 1.0

    def __post_init__(self) -> None:
        check_fields(self, "rope_scaling")
        check_positive(self, "rope_scaling", "factor")


@dataclass(frozen=True)
class LongRope:
    """LongRoPE (arXiv 2402.13753): each frequency divided by a factor of its own, in longer rows by another one."""

    # one for each rotary pair: of rows within the window of pre-training, and of those that reach beyond it
    short_factor: tuple[float, ...] = ()
    # the same for rows longer than the window of pre-training
    long_factor: tuple[float, ...] = ()
    # the window of pre-training, in tokens
    original_max_position_embeddings: int = 4096
    # what cos and sin are multiplied with
    attention_factor: float = 1.0

    def __post_init__(self) -> None:
        check_fields(self, "rope_scaling")
        check_positive(self, "rope_scaling", "original_max_position_embeddings", "attention_factor")
        for name in ("short_factor", "long_factor"):
            if not all(factor > 0 for factor in getattr(self, name)):
                raise UserError(f"rope_scaling.{name}", getattr(self, name), "not above 0", "Correct it.")


RopeScaling = Yarn | Llama3Rope | LinearRope | DynamicRope | LongRope
# by their `rope_type`
KINDS: dict[str, type[RopeScaling]] = {
    "yarn": Yarn,
    "llama3": Llama3Rope,
    "linear": LinearRope,
    "dynamic": DynamicRope,
    "longrope": LongRope,
}
