"""Parameters and FLOPs in closed form against a real model, for random configurations; totals of published models."""

import dataclasses

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.utils.flop_counter import FlopCounterMode

from finback.model.config import TINY, V2, V2_LITE, V3, ModelConfig
from finback.model.count import cache_bytes, forward_flops, parameters, router_biases, token_flops, training_flops
from finback.model.transformer import Transformer
from finback.parallel.layout import split_layers
from finback.planner.memory import stage_parameters
from tests.toy import backward


@st.composite
def latent(draw: st.DrawFn) -> ModelConfig:
    experts = draw(st.sampled_from([0, 4, 8]))
    groups = draw(st.sampled_from([1, 2])) if experts else 1
    layers = draw(st.integers(1, 2))
    return ModelConfig(
        vocab_size=draw(st.sampled_from([11, 40])),
        hidden_size=draw(st.sampled_from([8, 24])),
        num_hidden_layers=layers,
        num_attention_heads=draw(st.integers(1, 3)),
        intermediate_size=draw(st.sampled_from([12, 20])),
        q_lora_rank=draw(st.sampled_from([None, 6])),
        kv_lora_rank=draw(st.sampled_from([4, 10])),
        qk_nope_head_dim=draw(st.sampled_from([4, 6])),
        qk_rope_head_dim=draw(st.sampled_from([2, 4])),
        v_head_dim=draw(st.sampled_from([4, 6])),
        n_routed_experts=experts,
        n_shared_experts=draw(st.integers(0, 2)) if experts else 0,
        num_experts_per_tok=draw(st.integers(1, 2)) if experts else 0,
        moe_intermediate_size=draw(st.sampled_from([4, 8])) if experts else 0,
        first_k_dense_replace=draw(st.integers(0, layers)),
        n_group=groups,
        topk_group=draw(st.integers(1, groups)),
        scoring_func=draw(st.sampled_from(["sigmoid", "softmax"])),
        num_nextn_predict_layers=draw(st.integers(0, 2)),
        max_position_embeddings=32,
    )


@st.composite
def grouped(draw: st.DrawFn) -> ModelConfig:
    kv = draw(st.integers(1, 2))
    return ModelConfig(
        vocab_size=draw(st.sampled_from([11, 40])),
        hidden_size=draw(st.sampled_from([8, 24])),
        num_hidden_layers=draw(st.integers(1, 2)),
        num_attention_heads=kv * draw(st.integers(1, 3)),
        intermediate_size=draw(st.sampled_from([12, 20])),
        attention="gqa",
        num_key_value_heads=kv,
        head_dim=draw(st.sampled_from([4, 6])),
        attention_bias=draw(st.sampled_from(["none", "qkv", "all"])),
        qk_norm=draw(st.booleans()),
        tie_word_embeddings=draw(st.booleans()),
        max_position_embeddings=32,
    )


@settings(max_examples=40)
@given(st.one_of(latent(), grouped()), st.integers(1, 2), st.integers(2, 7))
def test_counts_are_those_of_the_model_and_of_torchs_profiler(c: ModelConfig, rows: int, length: int) -> None:
    with torch.device("meta"):
        model = Transformer(c)
    assert parameters(c) == sum(p.numel() for p in model.parameters())
    assert router_biases(c) in (0, sum(r.bias.numel() for n, r in named_routers(model)))
    # routing needs values, so the products of a real model are counted
    real = Transformer(c).initialise(0).train()
    depths = c.num_nextn_predict_layers
    tokens = torch.zeros(rows, length + 1 + depths, dtype=torch.long)
    # the math kernel of attention multiplies the whole square, so the context is the row's length
    with sdpa_kernel(SDPBackend.MATH):
        with FlopCounterMode(display=False) as forward:
            hidden = real(tokens[:, :length])
            real.logits(hidden)
            for state in real.mtp_hidden_states(hidden, tokens[:, : length + depths]):
                real.logits(state)
        assert forward.get_total_flops() == rows * length * token_flops(c, length, mtp=True).total
        if c.qk_norm:  # head norms have no products, and their backward pass does not need this kernel
            real = Transformer(dataclasses.replace(c, qk_norm=False)).initialise(0).train()
        with FlopCounterMode(display=False) as whole:
            backward(real, tokens, 0.3, 1e-4)
    assert whole.get_total_flops() == 3 * rows * length * token_flops(c, length, mtp=True).total


def named_routers(model: Transformer) -> list[tuple[str, torch.nn.Module]]:
    """Routers of the trunk; those of MTP modules are counted with MTP."""
    return [(n, m) for n, m in model.named_modules() if n.endswith("router") and not n.startswith("mtp")]


def test_published_totals() -> None:
    assert parameters(V3, mtp=False) + router_biases(V3) == 671_026_419_200
    assert parameters(V2, mtp=False) + router_biases(V2) == 235_741_434_880
    assert parameters(V2_LITE, mtp=False) == 15_706_484_224
    assert parameters(V2, active=True, mtp=False) == 21_375_800_320
    assert parameters(V3, active=True, mtp=False) + router_biases(V3) == 37_552_297_472
    assert round(training_flops(V3, 2048, mtp=False) / 1e9, 1) == 250.5
    assert round(training_flops(V2, 2048, mtp=False) / 1e9, 1) == 155.3
    assert round(training_flops(V3, 2048) / 1e9, 1) == 260.6
    assert round(training_flops(V3, 4096, mtp=False) / 1e9, 1) == 281.2
    assert cache_bytes(V3) == 70_272 and cache_bytes(V2) == 69_120 and cache_bytes(V2_LITE) == 31_104


def test_the_papers_rule_is_the_products_and_the_gains() -> None:
    for c in (TINY, V2, V3):
        # the rule counts the gains of norms as products, at two FLOPs each
        gains = forward_flops(c, 100) - token_flops(c, 100).total
        assert 0 < gains / forward_flops(c, 100) < 1e-2
        layers, d = c.num_hidden_layers, c.hidden_size
        assert gains == 2 * (layers * (2 * d + (c.q_lora_rank or 0) + c.kv_lora_rank) + d)


@pytest.mark.parametrize("stages", [1, 2, 16])
def test_stages_hold_all_parameters_once(stages: int) -> None:
    pieces = split_layers(V3, stages)
    held = [stage_parameters(V3, piece, shared_ends=True) for piece in pieces]
    assert sum(plain + routed for plain, routed in held) == parameters(V3)
    assert [layer for piece in pieces for layer in piece.layers] == list(range(62))
    if stages == 16:
        assert [len(piece.layers) for piece in pieces] == [3, *[4] * 14, 3]  # 4 MoE layers per chunk, as V3 profiled
        # on separate stages MTP and the embedding need a second copy of it
        alone = [stage_parameters(V3, piece, shared_ends=False) for piece in pieces]
        assert sum(map(sum, alone)) - parameters(V3) == V3.vocab_size * V3.hidden_size


def test_tied_embeddings_count_once() -> None:
    c = ModelConfig(
        vocab_size=40,
        hidden_size=8,
        num_hidden_layers=2,
        num_attention_heads=2,
        intermediate_size=12,
        attention="gqa",
        num_key_value_heads=1,
        head_dim=4,
        tie_word_embeddings=True,
    )
    untied = dataclasses.replace(c, tie_word_embeddings=False)
    assert sum(stage_parameters(c, split_layers(c, 1)[0], True)) == parameters(c) == parameters(untied) - 320
