"""LoRA applied to a finished model: what it computes, learns and leaves frozen; and formats of a frozen base."""

import copy
import dataclasses

import pytest
import torch
from torch import Tensor

from finback.config import UserError
from finback.engine.engine import Engine
from finback.engine.request import SamplingParams
from finback.kernels import formats
from finback.model.config import ModelConfig
from finback.model.frozen import BaseFormat, base_dtype, freeze, unfreeze
from finback.model.lora import (
    AdaptedTransformer,
    DoraLinear,
    LoRA,
    LoraLinear,
    LoraMoE,
    adapter_parameters,
    add_lora,
    merge,
    without_adapter,
)
from finback.model.transformer import Transformer
from finback.train.batch import of_windows
from tests.toy import CONFIG, V4, backward_batch

MLA = dataclasses.replace(CONFIG, initializer_range=0.15)
# queries projected straight from the hidden state, as in V2-Lite
LITE = dataclasses.replace(MLA, q_lora_rank=None)
GQA = ModelConfig(
    *(320, 32, 2, 4, 48),
    attention="gqa",
    num_key_value_heads=2,
    head_dim=8,
    attention_bias="qkv",
    tie_word_embeddings=True,
    max_position_embeddings=256,
    initializer_range=0.15,
)
EXPERTS = dataclasses.replace(
    GQA, attention_bias="none", qk_norm=True, n_routed_experts=4, num_experts_per_tok=2, moe_intermediate_size=16
)
POST = dataclasses.replace(GQA, norms="post", sliding_window=6, nope_layers=(1,), partial_rotary_factor=0.5)
# gpt-oss: sinks, and experts with biases whose matrices are transposed in files
OSS = dataclasses.replace(EXPERTS, qk_norm=False, attention_bias="all", attention_sinks=True, sliding_window=6)
OSS = dataclasses.replace(OSS, scoring_func="softmax", swiglu_alpha=1.702, swiglu_limit=7.0)
COMPRESSED = dataclasses.replace(V4, vocab_size=320, max_position_embeddings=256)
CONFIGS = {"mla": MLA, "lite": LITE, "gqa": GQA, "experts": EXPERTS, "post": POST, "oss": OSS, "v4": COMPRESSED}
SPARSE = dataclasses.replace(MLA, index_topk=20, index_n_heads=16, index_head_dim=8)
ROWS = torch.randint(0, 320, (3, 24), generator=torch.Generator().manual_seed(1))


def base_of(family: str, form: BaseFormat = "fp32", std: float = 0.15) -> Transformer:
    model = (
        Transformer(dataclasses.replace((CONFIGS | {"sparse": SPARSE})[family], initializer_range=std))
        .initialise(0)
        .eval()
    )
    for parameter in model.parameters():
        parameter.data = parameter.data.to(base_dtype(form))
    return model


def adapted(family: str, lora: LoRA, learnt: bool = True, std: float = 0.15) -> AdaptedTransformer:
    """A base with an adapter whose weights are not zero."""
    model = add_lora(freeze(base_of(family, lora.base, std), lora.base), lora, seed=3)
    generator = torch.Generator().manual_seed(4)
    for name, parameter in adapter_parameters(model):
        if learnt and name.endswith(".b"):
            parameter.data.normal_(0, 2 * std, generator=generator)
    return model


def logits(model: Transformer) -> Tensor:
    with torch.no_grad():
        return model.logits(model(ROWS))


def backward(model: Transformer) -> None:
    batch = of_windows(ROWS, 0)
    backward_batch(model.train(), batch, batch.counts(0), mtp_weight=0.0)


DORA = LoRA(rank=3, alpha=5.0, targets=("attention",), dora=True, base="fp32")


@pytest.mark.parametrize(
    ("family", "lora"), [*((f, LoRA(rank=3, alpha=5.0, base="fp32")) for f in CONFIGS), ("mla", DORA), ("v4", DORA)]
)
def test_a_fresh_adapter_changes_nothing_and_a_learnt_one_is_the_merged_model(family: str, lora: LoRA) -> None:
    plain = logits(base_of(family))
    torch.testing.assert_close(logits(adapted(family, lora, learnt=False)), plain, atol=1e-5, rtol=0)
    model = adapted(family, lora)
    found = logits(model)
    assert (found - plain).abs().max() > 0.1, "the adapter must have an effect"
    with without_adapter(model):
        torch.testing.assert_close(logits(model), plain, atol=1e-5, rtol=0)
    whole = merge(copy.deepcopy(model), torch.float32)
    assert type(whole) is Transformer and not adapter_parameters(whole)
    assert {type(m).__name__ for m in whole.modules()} == {type(m).__name__ for m in base_of(family).modules()}
    assert whole.state_dict().keys() == base_of(family).state_dict().keys()
    torch.testing.assert_close(logits(whole), found, atol=2e-5, rtol=0)


@pytest.mark.parametrize("family", CONFIGS)
@pytest.mark.parametrize("form", ["fp32", "nf4"])
def test_gradients_are_those_of_the_merged_weights(family: str, form: BaseFormat) -> None:
    """dL/dA = s B^T dL/dW and dL/dB = s dL/dW A^T, where dL/dW is the plain model's; nothing else has a gradient."""
    model = adapted(family, LoRA(rank=3, alpha=5.0, base=form))
    plain = merge(copy.deepcopy(model), torch.float32)
    for m in (model, plain):
        backward(m)
    assert all(p.grad is None for n, p in model.named_parameters() if "adapter" not in n)
    seen = 0
    for name, module in model.named_modules():
        if isinstance(module, LoraLinear | LoraMoE):
            names = ("gate_up", "down") if isinstance(module, LoraMoE) else ("weight",)
            for each in names:
                adapter = module.adapter(each) if isinstance(module, LoraMoE) else module.adapter
                grad = plain.get_parameter(f"{name}.{each}").grad
                assert grad is not None and adapter.a.grad is not None and adapter.b.grad is not None
                grad = grad.view(len(adapter.b), -1, adapter.a.size(-1))
                expected = torch.bmm(adapter.b.transpose(1, 2), grad), torch.bmm(grad, adapter.a.transpose(1, 2))
                for found, wanted in zip((adapter.a.grad, adapter.b.grad), expected, strict=True):
                    torch.testing.assert_close(found, wanted * 5 / 3, atol=1e-5, rtol=1e-4)
                seen += 1
    assert seen == {"mla": 16, "lite": 14, "gqa": 10, "experts": 10, "post": 10, "oss": 10, "v4": 31}[family]


def test_gradients_of_dora_by_hand() -> None:
    """With n = |W + s B A| by row, without gradient, W' = m / n (W + s B A): dL/dm and dL/dB from dL/dW'."""
    model = adapted("gqa", dataclasses.replace(DORA, targets=("q_proj", "v_proj", "o_proj")))
    for _, parameter in adapter_parameters(model):
        parameter.data *= 1 + 0.1 * torch.rand(parameter.shape, generator=torch.Generator().manual_seed(6))
    plain = merge(copy.deepcopy(model), torch.float32)
    for m in (model, plain):
        backward(m)
    for name in ("query", "key_value", "out"):
        module, whole = (m.get_submodule(f"blocks.1.attention.{name}") for m in (model, plain))
        assert isinstance(module, DoraLinear) and module.adapter.m is not None and isinstance(whole.weight, Tensor)
        low, bare = module.adapter, LoraLinear.matrix(module, torch.float32).detach()
        place = slice(len(bare) // 2, None) if name == "key_value" else slice(None)  # values alone
        bare, grad = bare[place], whole.weight.grad[place] if whole.weight.grad is not None else torch.zeros(0)
        norm = bare.norm(dim=1)
        assert low.m is not None and low.m.grad is not None and low.b.grad is not None
        torch.testing.assert_close(low.m.grad[0], (grad * bare).sum(1) / norm, atol=1e-5, rtol=1e-4)
        wanted = 5 / 3 * (low.m[0] / norm)[:, None] * grad @ low.a[0].T
        torch.testing.assert_close(low.b.grad[0], wanted, atol=1e-5, rtol=1e-4)


@pytest.mark.parametrize("form", ["bf16", "int8", "nf4"])
def test_a_frozen_base_computes_with_what_it_is_dequantized_to(form: BaseFormat) -> None:
    model = freeze(base_of("mla", form), form)
    plain = unfreeze(copy.deepcopy(model), torch.float32)
    torch.testing.assert_close(logits(model), logits(plain), atol=1e-5, rtol=0)
    exact = base_of("mla", "bf16").state_dict()
    errors = [(plain.state_dict()[n] - w).abs().max() / w.abs().max() for n, w in exact.items() if "gate_up" in n]
    assert max(errors) <= {"bf16": 0, "int8": 1 / 127, "nf4": 0.153}[form]
    stored = sum(p.numel() * p.element_size() for p in model.blocks.parameters()) + sum(
        b.numel() * 4 for n, b in model.blocks.named_buffers() if n.endswith("_scale")
    )
    per_weight = stored / sum(p.numel() for p in plain.blocks.parameters())
    assert per_weight < {"bf16": 2.01, "int8": 1.3, "nf4": 0.75}[form], "norms and factors included"


def test_the_engine_answers_as_the_merged_model_does() -> None:
    """Prompts use the expanded and tokens the absorbed form, with an adapter on the matrix that is absorbed."""
    prompts = [[5, 6, 7, 8, 9], [17] * 20]
    for family in ("mla", "gqa", "experts", "post"):
        model = adapted(family, LoRA(rank=3, alpha=5.0, base="fp32"))
        merged = merge(copy.deepcopy(model), torch.float32)
        for sampling in (SamplingParams(0.0, 12), SamplingParams(1.0, 12)):
            ours, theirs = (Engine(m, [1]).generate(prompts, sampling, [1, 2]) for m in (model, merged))
            assert [c.tokens for c in ours] == [c.tokens for c in theirs]
            for one, other in zip(ours, theirs, strict=True):
                torch.testing.assert_close(one.logprobs, other.logprobs, atol=1e-4, rtol=0)


def test_targets_are_groups_or_names_of_matrices() -> None:
    def names(family: str, *targets: str) -> set[str]:
        model = adapted(family, LoRA(rank=2, targets=targets))
        return {n.split(".", 2)[2].rpartition(".")[0] for n, _ in adapter_parameters(model)}

    assert names("mla", "experts") == {"feed_forward.gate_up_adapter", "feed_forward.down_adapter"}
    assert names("mla", "kv_b_proj", "q_a_proj") == {"attention.kv_up.adapter", "attention.q_down.adapter"}
    assert names("v4", "o_a_proj", "q_a_proj") == {"attention.out_down.adapter", "attention.q_down.adapter"}
    assert names("gqa", "v_proj", "up_proj") == {"attention.key_value.adapter", "feed_forward.gate_up.adapter"}
    model = adapted("gqa", LoRA(rank=2, targets=("v_proj",), base="fp32"))
    layer = model.blocks[0].attention.key_value
    assert isinstance(layer, LoraLinear)
    key, value = (layer.matrix(torch.float32) - layer.weight).chunk(2)
    assert not key.any() and value.any(), "the adapter must change only the values' half"
    whole = merge(copy.deepcopy(model), torch.float32)
    torch.testing.assert_close(logits(model), logits(whole), atol=2e-5, rtol=0)


def test_scale_is_alpha_over_rank_or_over_its_root() -> None:
    assert LoRA(rank=16, alpha=32.0).scale == 2 and LoRA(rank=16, alpha=32.0, rs=True).scale == 8


def test_what_cannot_be_is_refused() -> None:
    for wrong, text in (
        ({"rank": 0}, r"adapter\.rank = 0: not above 0"),
        ({"alpha": -1.0}, r"adapter\.alpha = -1\.0"),
        ({"targets": ("attn",)}, r"adapter\.targets = 'attn': no such part of a model.*attention"),
        ({"targets": ()}, "empty"),
        ({"base": "nf5"}, r"adapter\.base = 'nf5'"),
    ):
        with pytest.raises(UserError, match=text):
            LoRA(**wrong)
    with pytest.raises(UserError, match=r"adapter\.dora = True: PEFT's files support it for attention only.*targets="):
        adapted("mla", LoRA(dora=True))
    with pytest.raises(UserError, match=r"has none of these parts.*down_proj.*q_proj"):
        adapted("gqa", LoRA(targets=("experts",)))


def test_nf4_packs_by_hand_and_loses_what_it_must() -> None:
    weight = torch.zeros(2, 128)
    weight[0, 0], weight[0, 1], weight[0, 64], weight[1, 127] = 1.0, -1.0, 0.5, -3.0
    values, scale = formats.nf4(weight)
    assert values.shape == (2, 64) and scale.tolist() == [[1.0, 0.5], [0.0, 3.0]]
    # level 7 is zero, 15 is the block's largest magnitude; the first of two numbers is in the high bits
    assert values[0, 0] == 0xF0 and values[0, 32] == 0xF7 and values[1, 63] == 0x70 and values[0, 1] == 0x77
    assert torch.equal(formats.from_nf4(values, scale, torch.float32), weight)
    normal = torch.randn(64, 4096, generator=torch.Generator().manual_seed(0))
    error = (formats.from_nf4(*formats.nf4(normal), torch.float32) - normal).abs().mean().item()
    assert 0.0720 < error < 0.0735, "the error of bitsandbytes is 0.0725 to 0.073"
    short = torch.randn(3, 72)  # ends in an incomplete block
    assert (formats.from_nf4(*formats.nf4(short), torch.float32) - short).abs().max() < 0.5
    values, scale = formats.int8(normal)
    assert values.abs().max() == 127
    assert ((formats.from_int8(values, scale, torch.float32) - normal).abs() <= scale * 0.501).all()
