"""Weights that stay quantized as in their GGUF file: kernels against the gguf library and plain products."""

import copy
import dataclasses
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor

from finback.checkpoint import gguf_export
from finback.checkpoint.inference import load_for_inference
from finback.checkpoint.models import load
from finback.config import UserError
from finback.engine.engine import Engine, EngineConfig
from finback.engine.request import SamplingParams
from finback.kernels import native, quants, reference
from finback.kernels.quants import KINDS, BlockLinear, Kind, blocks
from finback.model.block_calls import BlockTable
from finback.model.config import ModelConfig
from finback.model.layers import Linear
from finback.model.pack import PackedGQA, pack, product_of
from finback.model.quantized import QuantizedLinear
from finback.model.transformer import Transformer
from tests.test_decode import passes
from tests.test_gguf_export import MODELS, filled

pytest.importorskip("gguf")
compiled = pytest.mark.skipif(native.library() is None, reason="no C++ compiler: matrices are dequantized")
WIDE: dict[str, Any] = {"hidden_size": 256, "intermediate_size": 256, "vocab_size": 160, "max_position_embeddings": 256}
HEADS = {"num_attention_heads": 4, "num_key_value_heads": 2, "head_dim": 32}
LATENT = {"q_lora_rank": 32, "v_head_dim": 16, "moe_intermediate_size": 32}
FILES: dict[str, tuple[ModelConfig, Any]] = {
    # interleaved rows, two kinds in one matrix, an untied head
    "llama, q4_k_m": (dataclasses.replace(MODELS["llama"], tie_word_embeddings=False, **WIDE, **HEADS), "q4_k_m"),
    # biases, and rows that do not fill a panel
    "qwen2, q5_0": (
        dataclasses.replace(MODELS["qwen2"], **WIDE | HEADS | {"hidden_size": 96, "vocab_size": 155}),
        "q5_0",
    ),
    "V3, q8_0": (dataclasses.replace(MODELS["V3"], **WIDE, **LATENT), "q8_0"),
}


def random_blocks(kind: Kind, rows: int, columns: int) -> Tensor:
    """Random bits, except factors near 1 / 100."""
    bits = np.random.default_rng(kind.number)
    found = bits.integers(0, 256, (rows, columns // kind.columns, kind.bytes), dtype=np.uint8)
    halves = (bits.random((*found.shape[:2], 2)) / 100 + 1e-3).astype(np.float16).view(np.uint8)
    if kind.name == "MXFP4":
        found[:, :, 0] = bits.integers(115, 125, found.shape[:2])
    elif kind.name == "Q6_K":
        found[:, :, -2:] = halves[:, :, :2]
    else:
        width = 4 if kind.name in ("Q4_1", "Q5_1", "Q4_K", "Q5_K") else 2
        found[:, :, :width] = halves[:, :, :width]
    return torch.from_numpy(found).flatten(1)


@compiled
@pytest.mark.parametrize("kind", KINDS.values(), ids=KINDS)
def test_a_product_is_that_of_the_numbers_and_a_row_the_same_in_any_company(kind: Kind) -> None:
    stored = random_blocks(kind, 43, 512)
    matrix, form = quants.numbers(kind.number, stored.numpy()), blocks(512, ((kind, 43),))
    x = torch.randn(11, 512, generator=torch.Generator().manual_seed(0))
    x[3, 32:64] = 0
    for dtype in (torch.float32, torch.bfloat16):
        rows = x.to(dtype)
        expected = reference.quantized_product(rows, matrix)
        for how in quants.forms():
            linear = BlockLinear([form], [stored.flatten()], [None], how)
            together = linear(rows)
            close = 1e-5 if dtype == torch.float32 else 5e-3  # bf16 outputs are rounded to 8 bits
            assert (together - expected).abs().max() <= close * expected.abs().max(), how
            assert torch.equal(together, torch.cat([linear(row[None]) for row in rows])), how
            assert torch.equal(together[:7], linear(rows[:7])), how
    assert torch.equal(linear.rows(torch.arange(43), torch.float32), matrix)
    assert torch.equal(form.dequantize(stored.flatten(), stored, torch.float32), matrix)


@compiled
def test_matrices_of_several_kinds_are_one_product() -> None:
    """Three stacked matrices, two of them one weight, with biases; none fills its last panel."""
    one, two, three = KINDS["Q4_K"], KINDS["Q6_K"], KINDS["Q8_0"]
    stored = [random_blocks(kind, rows, 256) for kind, rows in ((one, 20), (two, 7), (three, 33))]
    matrix = torch.cat(
        [quants.numbers(kind.number, s.numpy()) for kind, s in zip((one, two, three), stored, strict=True)]
    )
    formats = [blocks(256, ((one, 20), (two, 7))), blocks(256, ((three, 33),))]
    biases = [torch.arange(27.0), torch.arange(33.0)]
    values = [torch.cat([stored[0].flatten(), stored[1].flatten()]), stored[2].flatten()]
    linear, x = BlockLinear(formats, values, biases), torch.randn(2, 3, 256, generator=torch.Generator().manual_seed(1))
    expected = reference.quantized_product(x, matrix) + torch.cat(biases)
    assert linear.outputs == [27, 33] and (linear(x) - expected).abs().max() <= 1e-4 * expected.abs().max()


@pytest.fixture(scope="module", params=FILES)
def file(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Path:
    config, kind = FILES[request.param]
    path = tmp_path_factory.mktemp("quants") / "m.gguf"
    gguf_export.write(filled(config), path, kind, {})
    return path


@compiled
def test_a_model_keeps_its_file(file: Path) -> None:
    """Its products use the file's numbers, and requests give the same answers in any batch."""
    kept = pack(load(file, torch.float32, "kept").eval(), "kept")
    assert not any(isinstance(module, QuantizedLinear) for module in kept.modules())
    if kept.config.attention == "gqa":
        assert all(isinstance(block.attention, PackedGQA) for block in kept.blocks)
        held = (
            sum(tensor.nbytes for tensor in (*kept.parameters(), *kept.buffers())) - kept.cos.nbytes - kept.sin.nbytes
        )
        assert held <= 1.05 * file.stat().st_size  # some of a panel's 16 rows are empty
    prompts = torch.randint(0, 155, (3, 40), generator=torch.Generator().manual_seed(1)).tolist()
    usual = together(kept, prompts, EngineConfig(rows=8, tokens=512))
    assert usual == [together(kept, [prompt], EngineConfig(rows=8, tokens=512))[0] for prompt in prompts]
    assert usual == together(kept, prompts, EngineConfig(rows=8, tokens=96, chunk=7))  # in chunks, and preempted
    plain, tokens = load(file).eval(), torch.tensor(prompts)
    with torch.no_grad():
        for name, layer in plain.named_modules():
            if isinstance(layer, Linear) and not name.endswith("kv_up"):
                module, start = product_of(kept, name)
                x = torch.randn(3, layer.in_features, generator=torch.Generator().manual_seed(2))
                expected = reference.quantized_product(x, layer.weight) + (
                    0 if layer.bias is None else layer.bias.bfloat16()
                )
                found = module(x)[:, start : start + layer.out_features]
                assert (found - expected).abs().max() <= 1e-5 * expected.abs().max(), name
        part = plain.blocks[0].feed_forward
        x = torch.randn(3, kept.config.hidden_size, generator=torch.Generator().manual_seed(3))
        gate, up = reference.quantized_product(x, part.gate_up.weight).chunk(2, dim=-1)
        expected = reference.quantized_product(torch.nn.functional.silu(gate) * up, part.down.weight)
        # values between two integers may round to either
        assert (kept.blocks[0].feed_forward(x) - expected).abs().max() <= 3e-3 * expected.abs().max()
        assert torch.equal(kept.embedded(tokens), plain.embedded(tokens))
        found, exact = (model.logits(model(tokens)).log_softmax(-1) for model in (kept, plain))
    divergence = (exact.exp() * (exact - found)).sum(-1)
    # where two experts nearly tie, the other one may be chosen
    assert (divergence.median() if kept.config.n_routed_experts else divergence.mean()) <= 1e-2


ONE_CALL = {name: dataclasses.replace(MODELS[name], **WIDE, **HEADS) for name in ("llama", "qwen2", "qwen3")}


@compiled
@pytest.mark.parametrize("name", ONE_CALL)
@pytest.mark.parametrize("window", [None, 9])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_one_call_decodes_as_calls_by_block(
    name: str, window: int | None, dtype: torch.dtype, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Plain, with biases, with norms of heads."""
    gguf_export.write(filled(ONE_CALL[name]), tmp_path / "m.gguf", "q4_0", {})
    model, called, call = pack(load(tmp_path / "m.gguf", dtype, "kept").eval(), "kept"), list[str](), native.call
    for block in model.blocks:
        block.attention.window = window
    monkeypatch.setattr(native, "call", lambda name, *given: (called.append(name), call(name, *given)))
    fast = passes(model)
    assert called.count("decode_blocks") == (2 if window else 4)
    copied = copy.deepcopy(model)  # its weights are elsewhere
    del model
    assert torch.equal(passes(copied), fast)
    monkeypatch.setattr(BlockTable, "of", lambda model: None)
    called.clear()
    assert torch.equal(passes(copied), fast) and "decode_blocks" not in called


def together(model: Transformer, prompts: list[list[int]], config: EngineConfig) -> list[list[int]]:
    """Greedy answers to prompts in one batch."""
    engine = Engine(model, (), config)
    requests = [engine.submit(prompt, SamplingParams(0.0, 12), 0) for prompt in prompts]
    while engine.busy:
        engine.step()
    return [request.tokens for request in requests]


def test_without_a_compiler_matrices_are_dequantized(file: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(native, "library", lambda: None)
    kept, plain = load_for_inference(file, "kept"), load(file, torch.bfloat16, "bf16").eval()
    assert sum(isinstance(module, QuantizedLinear) for module in kept.modules()) >= 8
    tokens = torch.randint(0, 155, (2, 9), generator=torch.Generator().manual_seed(1))
    with torch.no_grad():
        assert torch.equal(kept.logits(kept(tokens)), plain.logits(plain(tokens)))


def test_adapters_do_not_know_a_file_by_its_blocks(tmp_path: Path) -> None:
    with pytest.raises(UserError, match="adapters identify a GGUF base by its bf16 weights"):
        load_for_inference(tmp_path / "m.gguf", "kept", {"mine": tmp_path})
