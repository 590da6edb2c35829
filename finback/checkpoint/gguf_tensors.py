"""A model's tensors in GGUF's names and layout: stacked experts, absorbed up-projections, Llama's rows in pairs."""

from collections.abc import Iterator
from typing import Any

import torch
from torch import Tensor

from finback.checkpoint.gguf_config import FREQUENCIES, LONG, SHORT
from finback.checkpoint.gguf_names import ARCHITECTURES, PAIRED
from finback.checkpoint.hf_export_as import family_of
from finback.model.biased_experts import BiasedMoE
from finback.model.config import ModelConfig
from finback.model.gqa import GQA, SinkGQA
from finback.model.layers import GeGLU, Normed, RMSNorm, SwiGLU
from finback.model.moe import MoE
from finback.model.mtp import MTP
from finback.model.rope import inverse_frequencies, plain_frequencies
from finback.model.rope_scaling import Llama3Rope, LongRope
from finback.model.transformer import Block, Transformer

# architectures whose files need a head even if it is tied
HEADED = ("gpt-oss", "olmo2")


def writes_mtp(c: ModelConfig) -> bool:
    """Whether MTP layers are written: llama.cpp rejects DeepSeek's."""
    return family_of(c) == "glm4_moe" and c.num_nextn_predict_layers > 0


def tensors(model: Transformer, meta: bool = False) -> Iterator[tuple[str, Tensor]]:
    """Yields GGUF's names and tensors one at a time; with `meta` only their shapes."""
    if meta:
        with torch.device("meta"):
            model = Transformer(model.config)
    c = model.config
    yield "token_embd.weight", model.embed
    for number, block in enumerate(model.blocks):
        assert isinstance(block, Block), "the model's modules were replaced"
        for name, tensor in _block(block, c):
            yield f"blk.{number}.{name}", tensor
    for number, module in enumerate(model.mtp if writes_mtp(c) else (), start=len(model.blocks)):
        assert isinstance(module, MTP) and isinstance(module.block, Block), "the model's modules were replaced"
        parts = {"eh_proj": module.project.weight, "enorm": module.embed_norm.gain()}
        parts |= {"hnorm": module.hidden_norm.gain(), "shared_head_norm": module.norm.gain()}
        yield from ((f"blk.{number}.nextn.{name}.weight", tensor) for name, tensor in parts.items())
        for name, tensor in _block(module.block, c):
            yield f"blk.{number}.{name}", tensor
    yield "output_norm.weight", model.norm.gain()
    if not c.tie_word_embeddings or ARCHITECTURES[family_of(c)] in HEADED:
        yield "output.weight", model.head.weight
    if isinstance(c.rope_scaling, Llama3Rope):
        yield FREQUENCIES, (plain_frequencies(c.rope_dim, c.rope_theta) / inverse_frequencies(c).double()).float()
    if isinstance(c.rope_scaling, LongRope):
        yield from (
            (LONG, torch.tensor(c.rope_scaling.long_factor)),
            (SHORT, torch.tensor(c.rope_scaling.short_factor)),
        )


def _block(block: Block, c: ModelConfig) -> Iterator[tuple[str, Tensor]]:
    before, between, attention, ff = (
        block.attention_norm,
        block.feed_forward_norm,
        block.attention,
        block.feed_forward,
    )
    if isinstance(attention, Normed) and isinstance(ff, Normed):  # Gemma, and OLMo, which has only these norms
        yield from (("post_attention_norm.weight", attention.norm.gain()), ("post_ffw_norm.weight", ff.norm.gain()))
        attention, ff = attention.inner, ff.inner
    yield from _grouped(attention, c) if isinstance(attention, GQA) else _latent(attention, c)
    if isinstance(before, RMSNorm) and isinstance(between, RMSNorm):
        yield "attn_norm.weight", before.gain()
        is_behind = ARCHITECTURES[family_of(c)] in ("gpt-oss", "glm4moe")  # there it is named by its position
        yield ("post_attention_norm" if is_behind else "ffn_norm") + ".weight", between.gain()
    if isinstance(ff, SwiGLU | GeGLU):
        yield from _swiglu(ff, "", fused=family_of(c) == "phi3")
        return
    assert isinstance(ff, MoE), "a feed-forward is one of the two"
    yield "ffn_gate_inp.weight", ff.router.weight
    if c.scoring_func == "sigmoid":
        yield "exp_probs_b.bias", ff.router.bias
    gate, up = ff.gate_up.chunk(2, dim=1)
    yield from (("ffn_gate_exps.weight", gate), ("ffn_up_exps.weight", up), ("ffn_down_exps.weight", ff.down))
    if isinstance(ff, BiasedMoE):
        yield "ffn_gate_inp.bias", ff.router.logit_bias
        gate, up = ff.gate_up_bias.unflatten(0, (len(gate), -1)).chunk(2, dim=1)
        yield from (("ffn_gate_exps.bias", gate), ("ffn_up_exps.bias", up))
        yield "ffn_down_exps.bias", ff.down_bias.unflatten(0, (len(gate), -1))
    if c.n_shared_experts:
        yield from _swiglu(ff.shared, "_shexp")


def _swiglu(ff: SwiGLU | GeGLU, ending: str, fused: bool = False) -> Iterator[tuple[str, Tensor]]:
    gate, up = ff.gate_up.weight.chunk(2)
    if fused:
        yield "ffn_up.weight", ff.gate_up.weight
    else:
        yield from ((f"ffn_gate{ending}.weight", gate), (f"ffn_up{ending}.weight", up))
    yield f"ffn_down{ending}.weight", ff.down.weight


def _grouped(a: GQA, c: ModelConfig) -> Iterator[tuple[str, Tensor]]:
    parts: list[tuple[str, Tensor, Tensor | None, int]] = []
    parts.append(("attn_q", a.query.weight, a.query.bias, c.num_attention_heads))
    biases = (None, None) if a.key_value.bias is None else a.key_value.bias.chunk(2)
    for name, weight, bias in zip(("attn_k", "attn_v"), a.key_value.weight.chunk(2), biases, strict=True):
        parts.append((name, weight, bias, c.num_key_value_heads))
    pairs = family_of(c) in PAIRED
    if family_of(c) == "phi3":  # its files fuse them
        yield "attn_qkv.weight", torch.cat([a.query.weight, a.key_value.weight])
        parts = []
    for name, weight, bias, heads in parts:
        for ending, tensor in (("weight", weight), ("bias", bias)):
            if tensor is not None:
                is_paired = pairs and name != "attn_v"
                yield f"{name}.{ending}", _paired(tensor, heads) if is_paired else tensor
    yield "attn_output.weight", a.out.weight
    if a.out.bias is not None:
        yield "attn_output.bias", a.out.bias
    if isinstance(a, SinkGQA):
        yield "attn_sinks.weight", a.sink
    if c.qk_norm:
        yield from (("attn_q_norm.weight", a.query_norm.gain()), ("attn_k_norm.weight", a.key_norm.gain()))


def _paired(tensor: Tensor, heads: int) -> Tensor:
    """Reorders each head's rows from [first halves | second halves] to neighbouring pairs."""
    return tensor.unflatten(0, (heads, 2, -1)).transpose(1, 2).reshape(tensor.shape)


def _latent(a: Any, c: ModelConfig) -> Iterator[tuple[str, Tensor]]:
    if c.q_lora_rank is None:
        yield "attn_q.weight", a.q_up.weight
    else:
        yield from (("attn_q_a.weight", a.q_down.weight), ("attn_q_a_norm.weight", a.q_norm.weight))
        yield "attn_q_b.weight", a.q_up.weight
    yield from (("attn_kv_a_mqa.weight", a.kv_down.weight), ("attn_kv_a_norm.weight", a.kv_norm.weight))
    keys, values = a.absorbed_weights(a.kv_up.weight.dtype)
    yield from (("attn_k_b.weight", keys.transpose(1, 2)), ("attn_v_b.weight", values))
    yield "attn_output.weight", a.out.weight
