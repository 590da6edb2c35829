"""Folders in the formats of AWQ, GPTQ, compressed-tensors and bitsandbytes, packed here one number at a time."""

import json
import random
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors import safe_open
from safetensors.torch import load_file, save_file
from torch import Tensor

from finback.checkpoint import packed_folders
from finback.checkpoint.export import export
from finback.checkpoint.inference import load_for_inference
from finback.checkpoint.models import load
from finback.checkpoint.packed_folders import PackedShards
from finback.checkpoint.shards import Shards
from finback.config import UserError
from finback.kernels import formats
from finback.model.frozen import unfreeze
from finback.model.quantized import QuantizedLinear, QuantizedMoE
from finback.model.transformer import Transformer
from finback.report.verify import verify
from tests.toy import DENSE

Parts = dict[str, Tensor]
GROUP = 32
PACKED = Path(__file__).parent / "data/packed.safetensors"
CONFIG = replace(DENSE, hidden_size=64, intermediate_size=128, num_hidden_layers=1, head_dim=16, initializer_range=0.15)
EXPERTS = replace(
    CONFIG,
    n_routed_experts=4,
    n_shared_experts=0,
    first_k_dense_replace=0,
    num_experts_per_tok=2,
    moe_intermediate_size=64,
    qk_norm=True,
    scoring_func="softmax",
)
FP4 = (0.0, 0.5, 1.0, 1.5, 2.0, 3.0, 4.0, 6.0)


def words(numbers: list[list[int]], bits: int) -> Tensor:
    """Packs rows of numbers into rows of int32 words, lowest bit first; numbers may cross words."""
    packed = []
    for row in numbers:
        stream = sum(number << bits * place for place, number in enumerate(row))
        count = -(-len(row) * bits // 32)
        found = [stream >> 32 * place & 0xFFFFFFFF for place in range(count)]
        packed.append([n - (1 << 32) if n >> 31 else n for n in found])
    return torch.tensor(packed, dtype=torch.int32)


def draw(w: Tensor, top: int, group: int, low: int = 0) -> tuple[Tensor, Tensor, Tensor]:
    """Integers low..top in a matrix's shape, and scales and zeros for groups of its rows."""
    seed = torch.Generator().manual_seed(w.numel() + top)
    groups = w.size(1) // group
    q = torch.randint(low, top + 1, tuple(w.shape), generator=seed)
    scale = (torch.rand(w.size(0), groups, generator=seed) * 0.02 + 0.005).half()
    zero = torch.randint(low, top + 1, (w.size(0), groups), generator=seed)
    return q, scale, zero


def by_group(q: Tensor, scale: Tensor, zero: Tensor, group: Callable[[int], int]) -> Tensor:
    index = torch.tensor([group(column) for column in range(q.size(1))])
    return (q - zero[:, index]).float() * scale.float()[:, index]


def awq(w: Tensor) -> tuple[Parts, Tensor]:
    q, scale, zero = draw(w, 15, GROUP)

    def packed(numbers: Tensor) -> Tensor:
        """Columns (in, out) -> words (in, out / 8): nibble k of a word holds the column at this place of its eight."""
        order = (0, 2, 4, 6, 1, 3, 5, 7)
        rows = numbers.T.tolist()
        return words([[row[start + k] for start in range(0, len(row), 8) for k in order] for row in rows], 4)

    parts = {"qweight": packed(q), "qzeros": packed(zero), "scales": scale.T.contiguous()}
    return parts, by_group(q, scale, zero, lambda column: column // GROUP)


def gptq(bits: int, v2: bool = False, permuted: bool = False) -> Callable[[Tensor], tuple[Parts, Tensor]]:
    def pack(w: Tensor) -> tuple[Parts, Tensor]:
        q, scale, zero = draw(w, (1 << bits) - 1, GROUP)
        index = [column // GROUP for column in range(w.size(1))]
        if permuted:
            random.Random(0).shuffle(index)
        stored = zero if v2 else (zero - 1) % (1 << bits)
        parts = {
            "qweight": words(q.tolist(), bits).T.contiguous(),
            "qzeros": words(stored.T.tolist(), bits),
            "scales": scale.T.contiguous(),
            "g_idx": torch.tensor(index, dtype=torch.int32),
        }
        return parts, by_group(q, scale, zero, index.__getitem__)

    return pack


def integers(bits: int, symmetric: bool, group: int = GROUP) -> Callable[[Tensor], tuple[Parts, Tensor]]:
    def pack(w: Tensor) -> tuple[Parts, Tensor]:
        half = 1 << bits - 1
        size = group or w.size(1)
        q, scale, zero = draw(w, half - 1, size, -half)
        zero = torch.zeros_like(zero) if symmetric else zero
        parts = {
            "weight_packed": words((q + half).tolist(), bits),
            "weight_scale": scale,
            "weight_shape": torch.tensor(w.shape),
        }
        if not symmetric:
            parts["weight_zero_point"] = words((zero + half).T.tolist(), bits).T.contiguous()
        return parts, by_group(q, scale, zero, lambda column: column // size)

    return pack


def int8(w: Tensor) -> tuple[Parts, Tensor]:
    q, scale, _ = draw(w, 127, w.size(1), -127)
    return {"weight": q.to(torch.int8), "weight_scale": scale, "input_scale": torch.ones(1)}, q * scale.float()


def fp8(per_row: bool) -> Callable[[Tensor], tuple[Parts, Tensor]]:
    def pack(w: Tensor) -> tuple[Parts, Tensor]:
        scale = (w.abs().amax(1, keepdim=True) if per_row else w.abs().max().view(1)) / 448
        values = (w / scale).to(torch.float8_e4m3fn)
        return {"weight": values, "weight_scale": scale}, values.float() * scale

    return pack


def floats4(scales: str) -> Callable[[Tensor], tuple[Parts, Tensor]]:
    def pack(w: Tensor) -> tuple[Parts, Tensor]:
        q, _, _ = draw(w, 15, GROUP)
        table = torch.tensor([*FP4, *(-each for each in FP4)])
        bytes_ = (q[:, ::2] | q[:, 1::2] << 4).to(torch.uint8)
        size = 16 if scales == "nvfp4" else 32
        exponents = torch.arange(w.numel() // size).view(len(w), -1) % 5 + 118
        if scales == "nvfp4":
            factors = (exponents.float() / 16).to(torch.float8_e4m3fn)
            whole = factors.float() / 70.0
            parts = {"weight_packed": bytes_, "weight_scale": factors, "weight_global_scale": torch.tensor([70.0])}
        else:
            whole = 2.0 ** (exponents - 127)
            parts = {"weight_packed": bytes_, "weight_scale": exponents.to(torch.uint8)}
        return parts, table[q] * whole.repeat_interleave(size, dim=1)

    return pack


def bits4(nested: bool) -> Callable[[Tensor], tuple[Parts, Tensor]]:
    def pack(w: Tensor) -> tuple[Parts, Tensor]:
        seed = torch.Generator().manual_seed(w.numel())
        q = torch.randint(0, 16, (w.numel(),), generator=seed)
        levels = torch.tensor(formats.NF4_LEVELS)
        state: dict[str, Any] = {"quant_type": "nf4", "blocksize": 64, "shape": list(w.shape), "dtype": "float16"}
        parts = {"weight": (q[::2] << 4 | q[1::2]).to(torch.uint8)[:, None], "weight.quant_map": levels}
        absmax = torch.rand(w.numel() // 64, generator=seed) * 0.3
        if nested:
            state |= {"nested_blocksize": 256, "nested_dtype": "float32", "nested_offset": 0.125}
            codes = torch.randint(0, 256, absmax.shape, generator=seed)
            table, outer = torch.linspace(-1, 1, 256), torch.rand(-(-len(absmax) // 256), generator=seed)
            absmax = torch.tensor([float(table[c] * outer[n // 256]) + 0.125 for n, c in enumerate(codes.tolist())])
            parts |= {
                "weight.absmax": codes.to(torch.uint8),
                "weight.nested_absmax": outer,
                "weight.nested_quant_map": table,
            }
        else:
            parts["weight.absmax"] = absmax
        text = torch.frombuffer(bytearray(json.dumps(state).encode()), dtype=torch.uint8)
        parts["weight.quant_state.bitsandbytes__nf4"] = text
        return parts, (levels[q] * absmax.repeat_interleave(64)).view(w.shape)

    return pack


def bits8(w: Tensor) -> tuple[Parts, Tensor]:
    q, scale, _ = draw(w, 127, w.size(1), -127)
    scb = scale.float()[:, 0] * 127
    return {"weight": q.to(torch.int8), "SCB": scb, "weight_format": torch.tensor(0, dtype=torch.uint8)}, q * scb[
        :, None
    ] / 127


def groups(bits: int) -> dict[str, Any]:
    return {"config_groups": {"group_0": {"weights": {"num_bits": bits}}}}


BNB = {"quant_method": "bitsandbytes"}
CT = {"quant_method": "compressed-tensors"}
KINDS: dict[str, tuple[dict[str, Any], Callable[[Tensor], tuple[Parts, Tensor]], bool]] = {
    # name: quantization_config, packing, whether it can be kept
    "awq": ({"quant_method": "awq", "bits": 4, "version": "gemm"}, awq, True),
    "gptq": ({"quant_method": "gptq", "bits": 4}, gptq(4), True),
    "gptq v2": ({"quant_method": "gptq", "bits": 4, "checkpoint_format": "gptq_v2"}, gptq(4, v2=True), True),
    "gptq v2 by its newer name": ({"quant_method": "gptq", "bits": 4, "format": "gptq_v2"}, gptq(4, v2=True), True),
    "gptq by activation": ({"quant_method": "gptq", "bits": 4, "desc_act": True}, gptq(4, permuted=True), False),
    "gptq 8": ({"quant_method": "gptq", "bits": 8}, gptq(8), False),
    "gptq 3": ({"quant_method": "gptq", "bits": 3}, gptq(3), True),
    "gptq 2": ({"quant_method": "gptq", "bits": 2}, gptq(2), True),
    "w4": (CT | groups(4), integers(4, True), True),
    "w4 asymmetric": (CT | groups(4), integers(4, False), True),
    "w4 by row": (CT | groups(4), integers(4, True, 0), True),
    "w8 packed": (CT | groups(8), integers(8, True), False),
    "int8": (CT | groups(8), int8, True),
    "fp8 by row": (CT | groups(8), fp8(True), False),
    "fp8": (CT | groups(8), fp8(False), False),
    "nvfp4": (CT | groups(4), floats4("nvfp4"), False),
    "mxfp4": (CT | groups(4), floats4("mxfp4"), True),
    "nf4": (BNB, bits4(False), True),
    "nf4 twice": (BNB, bits4(True), True),
    "bits8": (BNB, bits8, True),
}


def packed_folder(folder: Path, kind: str, config: Any = CONFIG) -> dict[str, Tensor]:
    """Writes a folder of this kind; returns the dequantized matrices by name. Embedding, norms and head are plain."""
    export(Transformer(config).initialise(0), folder, "fp32")
    settings, pack, _ = KINDS[kind]
    stored, wanted = {}, {}
    for name, tensor in load_file(folder / "model.safetensors").items():
        if name.endswith("_proj.weight"):
            parts, wanted[name] = pack(tensor)
            stored |= {name.removesuffix("weight") + part: value for part, value in parts.items()}
        else:
            stored[name] = wanted[name] = tensor
    save_file(stored, folder / "model.safetensors", metadata={"format": "pt"})
    raw = json.loads((folder / "config.json").read_text()) | {"quantization_config": settings}
    (folder / "config.json").write_text(json.dumps(raw))
    return wanted


@pytest.mark.parametrize("kind", KINDS)
def test_what_is_read_is_what_was_packed(kind: str, tmp_path: Path) -> None:
    wanted = packed_folder(tmp_path / "packed", kind)
    model = load(tmp_path / "packed")
    export(model, tmp_path / "out", "fp32")
    found = load_file(tmp_path / "out/model.safetensors")
    assert found.keys() == wanted.keys()
    for name, tensor in wanted.items():
        torch.testing.assert_close(found[name], tensor.float(), rtol=1e-6, atol=1e-8, msg=name)
    kept = load_for_inference(tmp_path / "packed", "kept")
    packed = [m for m in kept.modules() if isinstance(m, QuantizedLinear)]
    assert len(packed) == (4 + 2 - 1 if KINDS[kind][2] else 0)  # keys and values are one matrix, and gate and up too
    plain = load(tmp_path / "packed", torch.bfloat16, "bf16").eval()
    tokens = torch.randint(320, (2, 12))
    with torch.no_grad():
        assert torch.equal(kept.logits(kept(tokens)), plain.logits(plain(tokens)))


with safe_open(PACKED, "pt") as _file:
    PACKERS = _file.metadata()


@pytest.mark.parametrize("kind", sorted(PACKERS))
def test_what_packers_pack_is_what_they_unpack(kind: str, tmp_path: Path) -> None:
    """Matrices packed by autoawq 0.2.9, auto-gptq 0.7.1 and compressed-tensors 0.20.1, and their own dequantization."""
    held = {name.removeprefix(f"{kind}."): t for name, t in load_file(PACKED).items() if name.startswith(f"{kind}.")}
    wanted = held.pop("wanted")
    save_file(held, tmp_path / "model.safetensors")
    settings = json.loads(PACKERS[kind])
    packed_folders.check(settings)
    found = PackedShards(Shards(tmp_path), settings, CONFIG)
    assert list(found.specs) == ["proj.weight"] and found.specs["proj.weight"].shape == wanted.shape
    torch.testing.assert_close(found.read("proj.weight"), wanted, rtol=1e-6, atol=1e-8)


@pytest.mark.parametrize("kind", ["awq", "gptq by activation", "int8", "nf4"])
def test_matrices_that_are_packed_as_one_are_read_as_several(kind: str, tmp_path: Path) -> None:
    """Phi-3's queries, keys and values, and its gate and up."""
    wanted = packed_folder(tmp_path / "packed", kind, replace(CONFIG, partial_rotary_factor=0.5))
    assert "model.layers.0.self_attn.qkv_proj.weight" in wanted
    export(load(tmp_path / "packed"), tmp_path / "out", "fp32")
    found = load_file(tmp_path / "out/model.safetensors")
    for name, tensor in wanted.items():
        torch.testing.assert_close(found[name], tensor.float(), rtol=1e-6, atol=1e-8, msg=name)
    kept = load_for_inference(tmp_path / "packed", "kept")
    packed = [m for m in kept.modules() if isinstance(m, QuantizedLinear)]
    assert len(packed) == (5 if KINDS[kind][2] else 0)
    plain = load(tmp_path / "packed", torch.bfloat16, "bf16").eval()
    tokens = torch.randint(320, (2, 12))
    with torch.no_grad():
        assert torch.equal(kept.logits(kept(tokens)), plain.logits(plain(tokens)))


def test_experts_stay_packed_too(tmp_path: Path) -> None:
    packed_folder(tmp_path / "packed", "awq", EXPERTS)
    kept, plain = load(tmp_path / "packed", weights="kept"), load(tmp_path / "packed", weights="bf16")
    assert sum(isinstance(m, QuantizedMoE) for m in kept.modules()) == 1
    assert sum(p.nbytes for p in kept.parameters()) < 0.75 * sum(p.nbytes for p in plain.parameters())
    back = unfreeze(kept, torch.bfloat16)
    assert all(torch.equal(a, b) for a, b in zip(back.parameters(), plain.parameters(), strict=True))


def test_experts_of_gpt_oss_in_mxfp4_are_what_transformers_makes_of_them(tmp_path: Path) -> None:
    """Blocks along the interleaved rows of gate and up; kept packed, or dequantized."""
    from transformers.integrations.mxfp4 import convert_moe_packed_tensors

    config = replace(
        EXPERTS,
        **{"qk_norm": False, "attention_sinks": True, "swiglu_alpha": 1.702, "swiglu_limit": 7.0},
        tie_word_embeddings=False,
    )
    model = Transformer(config).initialise(0)
    export(model, tmp_path, "fp32")
    stored, wanted = load_file(tmp_path / "model.safetensors"), {}
    for name in [name for name in stored if name.endswith(("gate_up_proj", "down_proj"))]:
        values, scales = formats.mxfp4(stored.pop(name).transpose(1, 2).contiguous())
        assert (scales.max() - scales.min()).item() >= 1, "the scales must differ"
        blocks = values.unflatten(-1, (-1, 16))
        stored |= {f"{name}_blocks": blocks, f"{name}_scales": scales}
        wanted[name] = convert_moe_packed_tensors(blocks, scales, dtype=torch.float32)
    save_file(stored, tmp_path / "model.safetensors", metadata={"format": "pt"})
    raw = json.loads((tmp_path / "config.json").read_text())
    (tmp_path / "config.json").write_text(json.dumps(raw | {"quantization_config": {"quant_method": "mxfp4"}}))
    export(load(tmp_path), tmp_path / "out", "fp32")
    found = load_file(tmp_path / "out/model.safetensors")
    assert len(wanted) == 2 and all(torch.equal(found[name], tensor) for name, tensor in wanted.items())
    kept, plain = load_for_inference(tmp_path, "kept"), load(tmp_path, torch.bfloat16, "bf16").eval()
    assert sum(isinstance(m, QuantizedMoE) for m in kept.modules()) == 1
    tokens = torch.randint(320, (2, 12))
    with torch.no_grad():
        assert torch.equal(kept.logits(kept(tokens)), plain.logits(plain(tokens)))
    (tmp_path / "config.json").write_text(json.dumps(raw | {"quantization_config": BNB}))
    with pytest.raises(UserError, match="finback reads this family in bf16 and mxfp4"):
        load(tmp_path)


def test_int4_packs_what_it_reads() -> None:
    weight = torch.randn(6, 256, generator=torch.Generator().manual_seed(0))
    values, scale = formats.int4(weight)
    back = formats.from_int4(values, scale, torch.float32)
    assert values.shape == (6, 128) and scale.shape == (6, 2, 2)
    assert ((back - weight).abs() <= scale[..., 0].repeat_interleave(128, dim=1) / 2 + 1e-6).all()


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"quant_method": "quark"}, r"finback reads fp8 with weight_block_size \[128, 128\], awq, gptq, "),
        ({"quant_method": "awq", "bits": 4, "version": "gemv"}, "packed as 'gemv': finback reads gemm"),
        ({"quant_method": "awq", "bits": 4, "format": "gemv_fast"}, "packed as 'gemv_fast': finback reads gemm"),
        (
            {"quant_method": "gptq", "bits": 4, "checkpoint_format": "marlin"},
            "packed as 'marlin': finback reads gptq and",
        ),
        ({"quant_method": "gptq", "bits": 3, "format": "gptq_p"}, "packed as 'gptq_p'"),
        ({"quant_method": "gptq", "bits": 5.5}, r"5\.5 bits"),
        (BNB, "no tensor in the files is packed by bitsandbytes"),
    ],
)
def test_other_packings_are_refused(settings: dict[str, Any], message: str, tmp_path: Path) -> None:
    packed_folder(tmp_path, "gptq")
    raw = json.loads((tmp_path / "config.json").read_text()) | {"quantization_config": settings}
    (tmp_path / "config.json").write_text(json.dumps(raw))
    with pytest.raises(UserError, match=message):
        load(tmp_path)


def test_a_card_says_what_was_packed(tmp_path: Path) -> None:
    packed_folder(tmp_path, "gptq")
    card = verify(tmp_path)
    text = card.as_text()
    assert "gptq: 7 matrices are packed; activations are not quantized here" in text
    assert "not compared: transformers computes gptq by kernels of other packages" in text
