"""Compares two models' logits on the same tokens, and finds the first layer that differs."""

import importlib.util
from collections.abc import Callable
from pathlib import Path
from typing import Any

import psutil
import torch
from torch import Tensor

from finback.checkpoint.audit import is_fp8, is_packed
from finback.checkpoint.hf_config import read_config
from finback.model.config import ModelConfig
from finback.model.count import parameters
from finback.model.transformer import Transformer
from finback.runs.files import is_gguf

ROWS, LENGTH = 2, 48
TWINS = {"kimi_k2": "deepseek_v3"}  # families that transformers knows only under another name
Finding = tuple[bool | None, str, list[str]]
States = tuple[Tensor, list[Tensor]]  # logits, and the residual stream before each block and after the last one


def against_transformers(model: Transformer, path: Path, max_kl: float) -> Finding:
    """Compares with transformers' model from the same files, in fp32."""
    if is_gguf(path):
        return None, "not compared: export it first, then verify the export", []
    if importlib.util.find_spec("transformers") is None:
        return None, "not compared: transformers is not installed", []
    if short := shortage(model.config):
        return None, f"not compared: {short}", []
    import transformers

    try:
        options: dict[str, Any] = {}
        raw = read_config(path)
        if twin := TWINS.get(raw["model_type"]):
            said = {name: value for name, value in raw.items() if name not in ("model_type", "auto_map")}
            options["config"] = transformers.AutoConfig.for_model(twin, **said)
        if is_packed(raw):
            method = raw["quantization_config"]["quant_method"]
            return None, f"not compared: transformers computes {method} by kernels of other packages", []
        if is_fp8(raw):
            options["quantization_config"] = transformers.FineGrainedFP8Config(dequantize=True)
        options |= {"dtype": torch.float32, "attn_implementation": "eager", "output_loading_info": True}
        loaded: Any = transformers.AutoModelForCausalLM.from_pretrained(path, local_files_only=True, **options)
        theirs, info = loaded[0].float().eval(), loaded[1]  # dequantized FP8 arrives as bf16
    except ImportError as error:  # FP8 needs accelerate
        return None, f"not compared: {error}", []
    except Exception as error:  # any error is a finding about this folder, not our failure
        return False, f"transformers does not load it ({type(error).__name__}: {str(error)[:200]})", []
    left = [f"{kind}: {name}" for kind in ("missing_keys", "mismatched_keys") for name in info[kind]]
    if left:
        return False, f"transformers finds {len(left)} keys missing or mismatched", left

    def states(tokens: Tensor) -> States:
        out = theirs(tokens, output_hidden_states=True)
        return out.logits.float(), list(out.hidden_states)

    return compare(model, states, max_kl)


def shortage(config: ModelConfig) -> str:
    """Why a model cannot be built in fp32 in the free memory; "" if it can."""
    needed, free = 4 * parameters(config), psutil.virtual_memory().available
    return f"needs {needed / 1e9:.0f} GB, {free / 1e9:.0f} GB are free" if needed > 0.8 * free else ""


def against_finback(model: Transformer, other: Transformer, max_kl: float) -> Finding:
    """Compares with another checkpoint of the same vocabulary."""
    if other.config.vocab_size != model.config.vocab_size:
        return False, f"vocabularies of {model.config.vocab_size:,} and {other.config.vocab_size:,}", []
    return compare(model, lambda tokens: finback_states(other, tokens), max_kl)


@torch.no_grad()
def compare(model: Transformer, other: Callable[[Tensor], States], max_kl: float) -> Finding:
    """Largest difference, mean KL divergence, and agreement of the top token, on seeded tokens.

    Passes if the mean KL is at most `max_kl`. If not, the first layer whose output differs is named.
    """
    generator = torch.Generator().manual_seed(0)
    length = min(LENGTH, model.config.max_position_embeddings)
    tokens = torch.randint(model.config.vocab_size, (ROWS, length), generator=generator)
    ours, our_states = finback_states(model, tokens)
    theirs, their_states = other(tokens)
    logp, logq = ours.double().log_softmax(-1), theirs.double().log_softmax(-1)
    kl = float((logq.exp() * (logq - logp)).sum(-1).mean())
    furthest = float((ours - theirs).abs().max())
    same = float((ours.argmax(-1) == theirs.argmax(-1)).float().mean())
    text = f"max difference {furthest:.2g}, mean KL {kl:.2g}, same first choice {same:.1%} of {tokens.numel()} tokens"
    holds = kl <= max_kl
    return holds, text, [] if holds else [_first_difference(our_states, their_states)]


def finback_states(model: Transformer, tokens: Tensor) -> States:
    """Logits and the residual stream of a finback model."""
    seen: list[Tensor] = []
    hooks = [
        module.register_forward_pre_hook(lambda _, inputs: seen.append(inputs[0].detach()))
        for module in (*model.blocks, model.norm)
    ]
    try:
        logits = model.logits(model(tokens))
    finally:
        for hook in hooks:
            hook.remove()
    return logits, seen


def _first_difference(ours: list[Tensor], theirs: list[Tensor]) -> str:
    """The first of embedding and blocks that differs. transformers' last state is normed, ours is not."""
    for index, (a, b) in enumerate(zip(ours[:-1], theirs, strict=False)):
        # per token, and by the median: a few tokens have activations thousands of times larger
        if a.shape != b.shape or ((a - b).norm(dim=-1) / b.norm(dim=-1)).median() > 1e-3:
            return f"first difference: {'the embedding' if index == 0 else f'layer {index - 1}'}"
    return f"first difference: layer {len(ours) - 2}, the last, or the final norm and head"
