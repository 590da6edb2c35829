"""Rotary settings of config.json: `rope_theta` and `rope_scaling`, or `rope_parameters`. Does not import torch.

Precedence follows transformers 5 (RotaryEmbeddingConfigMixin): `rope_scaling` replaces `rope_parameters` as a whole;
its `rope_theta` and `partial_rotary_factor` override the top-level ones; but a top-level
`original_max_position_embeddings` overrides its own.
"""

import math
from dataclasses import asdict
from typing import Any

from finback.checkpoint.hf_fields import Fields
from finback.config import UserError
from finback.model.rope_scaling import KINDS, DynamicRope, LinearRope, Llama3Rope, LongRope, RopeScaling, Yarn


def read_rope(fields: Fields, given: dict[str, Any] | None = None) -> dict[str, Any]:
    """Returns ModelConfig's base, scaling and partial_rotary_factor; `given` holds one kind of layer's settings."""
    raw = fields.raw
    if given is None:
        given = fields.object("rope_scaling") or fields.object("rope_parameters")
    beside = {name: raw.get(name) for name in ("rope_theta", "partial_rotary_factor")}
    rope = Fields(beside | {name: value for name, value in given.items() if value is not None}, fields.defaults)
    theta = rope.number("rope_theta", 10000.0)
    if theta <= 1:
        rope.refuse("rope_theta", "not above 1")
    share = rope.number("partial_rotary_factor", 1.0)
    return {"rope_theta": theta, "rope_scaling": _scaling(fields, given), "partial_rotary_factor": share}


def _scaling(fields: Fields, given: dict[str, Any]) -> RopeScaling | None:
    kind = given.get("rope_type") or given.get("type") or "default"
    if kind == "yarn" and "short_factor" in given:  # early Phi-3 configs call LongRoPE yarn
        kind = "longrope"
    window = (
        fields.raw.get("original_max_position_embeddings")
        or given.get("original_max_position_embeddings")
        or fields.integer("max_position_embeddings", 4096)
    )
    try:
        match kind:
            case "default":
                return None
            case "linear":
                return LinearRope(float(given["factor"]))
            case "dynamic":
                return DynamicRope(float(given["factor"]))
            case "llama3":
                low, high = float(given["low_freq_factor"]), float(given["high_freq_factor"])
                return Llama3Rope(float(given["factor"]), low, high, int(window))
            case "yarn":
                return _yarn(given, int(window))
            case "longrope" | "su":
                return _long(fields, given, int(window))
    except (KeyError, TypeError, ValueError, OverflowError) as error:
        raise UserError("config.json rope_scaling", given, f"bad or missing {error}", "Correct it.") from None
    problem = "not a supported scaling"
    raise UserError("config.json rope_scaling", given, problem, f"finback supports {', '.join(KINDS)}.")


def _yarn(given: dict[str, Any], window: int) -> Yarn:
    """mscale and mscale_all_dim scale cos and sin only if both are present (transformers' rule)."""
    both = given.get("mscale") and given.get("mscale_all_dim")
    factor = given.get("attention_factor")
    all_dim = float(given.get("mscale_all_dim") or 0.0)
    if factor is None and not both and all_dim:
        factor = Yarn(factor=float(given["factor"]), mscale_all_dim=0.0).gain
    return Yarn(
        factor=float(given["factor"]),
        original_max_position_embeddings=window,
        beta_fast=float(given.get("beta_fast") or 32),
        beta_slow=float(given.get("beta_slow") or 1),
        mscale=float(given["mscale"]) if both else 1.0,
        mscale_all_dim=all_dim,
        attention_factor=None if factor is None else float(factor),
        truncate=bool(given.get("truncate", True)),
    )


def _long(fields: Fields, given: dict[str, Any], window: int) -> LongRope:
    """Without attention_factor the gain is sqrt(1 + ln(s) / ln(original window)), s = window / original window."""
    stretch = float(given.get("factor") or fields.integer("max_position_embeddings", 4096) / window)
    gain = given.get("attention_factor")
    if gain is None:
        gain = math.sqrt(1 + math.log(stretch) / math.log(window)) if stretch > 1 else 1.0
    short, long = (tuple(map(float, given[name])) for name in ("short_factor", "long_factor"))
    return LongRope(short, long, window, float(gain))


def raw_rope(scaling: RopeScaling) -> dict[str, Any]:
    """Returns config.json's `rope_scaling`."""
    raw: dict[str, Any] = asdict(scaling)
    kind = next(name for name, cls in KINDS.items() if type(scaling) is cls)
    if isinstance(scaling, LongRope):
        lists = {name: list(getattr(scaling, name)) for name in ("short_factor", "long_factor")}
        return {"type": kind, "rope_type": kind} | raw | lists
    if kind == "llama3":
        return {"rope_type": kind} | raw
    if isinstance(scaling, Yarn):
        says_more = scaling.attention_factor is not None or (not scaling.mscale_all_dim and scaling.mscale != 1.0)
        del raw["attention_factor"], raw["truncate"]
        raw |= {"attention_factor": scaling.gain} if says_more else {}
        raw |= {} if scaling.truncate else {"truncate": False}
    return {"type": kind, "rope_type": kind} | raw
