"""The C++ kernels and packed matrices against the plain implementation."""

import dataclasses
import subprocess
import sys

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from finback.engine.engine import Engine, EngineConfig
from finback.engine.request import SamplingParams
from finback.kernels import moe_gemm, native, norm, packed, reference
from finback.kernels.swiglu import swiglu
from finback.model.cache import Cache, Pool
from finback.model.config import ModelConfig
from finback.model.native import NativeGQA, NativeMLA, use_native
from finback.model.pack import PackedGQA, pack
from finback.model.replace import recast
from finback.model.transformer import Transformer
from tests.test_model import DENSE, SPARSE, TOY, random_model
from tests.toy import environment

pytestmark = pytest.mark.skipif(native.library() is None, reason="no C++ compiler: only the plain implementation runs")
BOTH = pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
CONFIGS = {
    "mla": TOY,
    "mla, half-split": dataclasses.replace(TOY, rope_interleaved=False, q_lora_rank=None),
    "dense": DENSE,
    "dense, norms": dataclasses.replace(DENSE, qk_norm=True, tie_word_embeddings=False),
    "dense, biases": dataclasses.replace(DENSE, attention_bias="qkv"),
    "dense, windows": dataclasses.replace(
        DENSE, sliding_window=9, layer_types=("sliding_attention", "full_attention"), local_rope_theta=300.0
    ),
}


def passes(model: Transformer) -> torch.Tensor:
    """Hidden states of a prompt, of single tokens and of a pair, on scattered pages, one row ahead of the others."""
    config = use_native(model).config
    pool = Pool(config, 13, model.compute, torch.device("cpu"))
    table = torch.tensor([[5, 2, 9, 12], [1, 8, 3, 10], [4, 6, 7, 11]])
    tokens = torch.randint(0, config.vocab_size, (3, 60), generator=torch.Generator().manual_seed(1))
    rows, lengths, states = torch.arange(3)[:, None], [20, 3, 31], []
    with torch.inference_mode():
        model(tokens[:, :31], Cache(pool, table, [0, 0, 0], 31, lengths))
        for new in (1, 2, 1, 8):
            at = torch.tensor(lengths)[:, None] + torch.arange(new)
            states.append(model(tokens[rows, at], Cache(pool, table, lengths, new, starts=[0, 1, 18])).float())
            lengths = [n + new for n in lengths]
    return torch.cat(states, dim=1)


@pytest.mark.parametrize("config", CONFIGS.values(), ids=CONFIGS)
def test_decoding_equals_the_plain_lines(config: ModelConfig, monkeypatch: pytest.MonkeyPatch) -> None:
    model = random_model(config)
    if config.attention == "gqa":  # as in a packed model, in fp32
        for block in model.blocks:
            a = recast(block.attention, PackedGQA)
            a.stacked = torch.nn.Linear(config.hidden_size, a.query.weight.size(0) + a.key_value.weight.size(0))
            with torch.no_grad():
                a.stacked.weight.copy_(torch.cat([a.query.weight, a.key_value.weight]))
                a.stacked.bias.zero_()
                if a.query.bias is not None:
                    a.stacked.bias.copy_(torch.cat([a.query.bias, a.key_value.bias]))
    fast = passes(model)
    assert len({type(block.attention) for block in model.blocks} & {NativeMLA, NativeGQA}) == 1
    monkeypatch.setattr(native, "library", lambda: None)
    plain = passes(model)
    assert (fast - plain).abs().max() <= 1e-4 and fast.abs().max() > 0.1


@pytest.mark.parametrize("config", [*CONFIGS.values(), SPARSE], ids=[*CONFIGS, "sparse"])
def test_a_packed_model_answers_as_before(config: ModelConfig, monkeypatch: pytest.MonkeyPatch) -> None:
    """Packed bf16 and plain bf16 against fp32: packing adds no error to that of bf16."""
    exact = passes(random_model(config))

    def in_bf16() -> Transformer:
        model = Transformer(dataclasses.replace(config, initializer_range=0.1), torch.bfloat16, torch.bfloat16).eval()
        model.load_state_dict({n: t.bfloat16() for n, t in random_model(config).state_dict().items()})
        return model

    monkeypatch.setattr(native, "library", lambda: None)
    plain = passes(in_bf16())
    monkeypatch.undo()
    fast = passes(pack(in_bf16(), "bf16"))
    # the median: where two experts score alike, rounding chooses another one, and that token's state differs a lot
    assert (fast - exact).abs().median() <= 1.3 * (plain - exact).abs().median()
    int8 = passes(pack(in_bf16(), "int8"))
    assert (int8 - exact).abs().median() <= 0.1 * exact.abs().median()


@pytest.mark.parametrize("rows", [1, 3, 40])
@pytest.mark.parametrize("bias", [False, True])
def test_int8_is_rounded_per_output(rows: int, bias: bool) -> None:
    generator = torch.Generator().manual_seed(rows)
    weights = [torch.randn(48, 64, generator=generator), 5 * torch.randn(16, 64, generator=generator)]
    biases = [torch.randn(48, generator=generator), torch.randn(16, generator=generator)] if bias else [None, None]
    x = torch.randn(2, rows, 64, generator=generator).bfloat16()
    layer = packed.PackedLinear(weights, biases, "int8")
    exact = x.float() @ torch.cat(weights).T + (torch.cat([b for b in biases if b is not None]) if bias else 0)
    error = (layer(x).float() - exact).pow(2).mean() / exact.pow(2).mean()
    assert layer(x).shape == (2, rows, 64) and error <= 3e-4
    assert (layer.matrix(torch.float32) - torch.cat(weights)).abs().max() <= 5 * 4 / 127
    assert layer.outputs == [48, 16]


@BOTH
@given(st.integers(1, 20), st.integers(1, 90))
@settings(max_examples=30)
def test_norm_and_swiglu(dtype: torch.dtype, tokens: int, size: int) -> None:
    generator = torch.Generator().manual_seed(size)
    x, y = (3 * torch.randn(1, tokens, size, generator=generator).to(dtype) for _ in range(2))
    gain = torch.rand(size, generator=generator)
    tolerance = {"atol": 1e-5, "rtol": 1e-5} if dtype == torch.float32 else {"atol": 0.02, "rtol": 0.02}
    before = x.clone()
    with torch.inference_mode():
        total, normed = norm.add_rms_norm(x, y, gain, 1e-6)
        assert torch.equal(total, x + y) and torch.equal(x, before)
        torch.testing.assert_close(normed, reference.rms_norm(x + y, gain, 1e-6), **tolerance)
        wide = torch.cat([x, y], dim=-1)
        plain = torch.nn.functional.silu(x.float()) * y.float()
        torch.testing.assert_close(swiglu(wide).float(), plain, **tolerance)


def test_swiglu_holds_at_extremes() -> None:
    x = torch.tensor([[-200.0, -90.0, 0.0, 90.0, 3e38, 1.0, 1.0, 1.0, 1.0, 1.0]])
    y = swiglu(x)[0]
    assert y[:3].abs().max() < 1e-30 and y[3] == 90 and y[4] == x[0, 4]


@BOTH
@pytest.mark.parametrize("tokens", [1, 5, 32])
def test_experts(dtype: torch.dtype, tokens: int) -> None:
    generator = torch.Generator().manual_seed(tokens)
    x = torch.randn(tokens, 24, generator=generator).to(dtype)
    index = torch.stack([torch.randperm(6, generator=generator)[:3] for _ in range(tokens)])
    weight = torch.rand(tokens, 3, generator=generator)
    gate_up, down = (torch.randn(*s, generator=generator).to(dtype) for s in ((6, 20, 24), (6, 24, 10)))
    with torch.inference_mode():
        fast = moe_gemm.routed_experts(x, index, weight, gate_up, down)
    plain = reference.routed_experts(x.float(), index, weight, gate_up.float(), down.float())
    limit = 1e-5 if dtype == torch.float32 else 0.01
    assert (fast.float() - plain).abs().max() <= limit * plain.abs().max()


def test_bf16_is_rounded_as_torch_rounds() -> None:
    """Through the norm of single values with gain g: the result is ±g in fp32, rounded once."""
    values = torch.tensor([1 + 2**-8, 1 + 3 * 2**-8, 1 + 2**-9, 1.00390625 + 2**-20, 3.0e38, 1e-40])
    for value in values:
        with torch.inference_mode():
            out = norm.rms_norm(torch.ones(1, 1, dtype=torch.bfloat16), value[None], 0.0)
        assert out.item() == value.bfloat16().item()


@pytest.mark.slow
def test_without_kernels_everything_still_runs() -> None:
    code = (
        "from tests.test_batching import *\nfrom finback.kernels import native\nassert native.library() is None\n"
        "e = Engine(MODELS['mla'], (), EngineConfig(tokens=512))\ns = e.submit(PROMPT, SamplingParams(0.0, 9), 0)\nfinish(e)\nprint(s.tokens)"
    )
    run = subprocess.run(
        [sys.executable, "-c", code], env=environment() | {"FINBACK_NATIVE": "0"}, capture_output=True, text=True
    )
    from tests.test_batching import MODELS, PROMPT

    engine = Engine(MODELS["mla"], (), EngineConfig(tokens=512))
    assert run.stdout.strip() == str(engine.generate([PROMPT], SamplingParams(0.0, 9), [0])[0].tokens), run.stderr
