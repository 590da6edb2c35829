"""Models that can be planned by name, with the batch and tokens of their reports. Does not import torch."""

from dataclasses import dataclass

from finback.config import UserError, did_you_mean
from finback.model import config as models
from finback.model.config import ModelConfig


@dataclass(frozen=True)
class Preset:
    """A model and its default pre-training."""

    name: str
    model: ModelConfig
    # sequences per step
    rows: int
    length: int
    tokens: float
    source: str


PRESETS = {
    "v3": Preset("DeepSeek-V3", models.V3, 15360, 4096, 14.8e12, "arXiv 2412.19437, 4.2"),
    "v3.2": Preset("DeepSeek-V3.2", models.V3_2, 480, 131072, 943.7e9, "DeepSeek-V3.2 report, 2.1.1: the sparse stage"),
    "v4-flash": Preset("DeepSeek-V4-Flash", models.V4_FLASH, 18432, 4096, 32e12, "DeepSeek-V4 report, 4.2"),
    "v4-pro": Preset("DeepSeek-V4-Pro", models.V4_PRO, 23040, 4096, 33e12, "DeepSeek-V4 report, 4.2"),
    "v2": Preset("DeepSeek-V2", models.V2, 9216, 4096, 8.1e12, "arXiv 2405.04434, 3.1"),
    "v2-lite": Preset("DeepSeek-V2-Lite", models.V2_LITE, 4608, 4096, 5.7e12, "arXiv 2405.04434, appendix B"),
    "small": Preset("small", models.SMALL, 256, 4096, 6e9, "finback's own: about 20 tokens per parameter, assumed"),
    "tiny": Preset("tiny", models.TINY, 32, 128, 6e6, "recipes/tiny.py"),
}


def find(name: str) -> Preset:
    """A preset by name, in any case; otherwise UserError with the nearest name."""
    key = name.lower().replace("_", "-")
    if key not in PRESETS:
        raise UserError(
            "plan", name, "neither a preset nor a recipe file", did_you_mean(key, [*PRESETS, "recipes/tiny.py"])
        )
    return PRESETS[key]


_SUFFIXES = {"": 1.0, "K": 1e3, "M": 1e6, "B": 1e9, "T": 1e12}


def count(text: str, field: str) -> float:
    """`14.8T` -> 14.8e12."""
    number = text.strip().upper()
    suffix = number[-1:] if number[-1:] in "KMBT" else ""
    try:
        value = float(number.removesuffix(suffix)) * _SUFFIXES[suffix]
    except ValueError:
        value = -1.0
    if not 0 < value < 1e20:
        raise UserError(field, text, "not a number above 0", "Write for example 14.8T, 2B or 6e6.")
    return value
