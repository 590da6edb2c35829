"""DeepSeek-V4's files as released: FP4 experts, FP8 with factors that are powers of two; MXFP4 to the bit."""

import dataclasses
import json
import math
import random
import struct
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import save_file
from torch import Tensor

from finback.checkpoint import names
from finback.checkpoint.export import export
from finback.checkpoint.hf_config import raw_config
from finback.checkpoint.inference import load_for_inference
from finback.checkpoint.models import load, load_audited, part
from finback.checkpoint.shards import Shards
from finback.config import UserError
from finback.kernels import formats, fp8, moe_gemm
from finback.model.quantized import QuantizedLinear, QuantizedMoE
from finback.model.transformer import Transformer
from finback.report.verify import verify
from tests.toy import V4

CONFIG = dataclasses.replace(V4, hidden_size=160, moe_intermediate_size=64, num_nextn_predict_layers=1)
LEVELS = (0.0, 0.5, 1.0, 1.5, 2.0, 3.0, 4.0, 6.0)
# stored in FP8 in the release, like the shared experts
FP8 = ("wq_a", "wq_b", "wkv", "wo_a", "wo_b", "e_proj", "h_proj")


def fp32(x: float) -> float:
    """The nearest fp32 number."""
    return float(struct.unpack("f", struct.pack("f", x))[0])


def plain_mxfp4(row: list[float]) -> tuple[list[int], list[int], list[float]]:
    """Bytes, E8M0 bytes and values of a row of fp32 numbers, one number at a time."""
    codes: list[int] = []
    powers: list[int] = []
    values: list[float] = []
    for start in range(0, len(row), 32):
        block = row[start : start + 32]
        ratio = fp32(max(max(map(abs, block)), 6 * 2.0**-126) / 6)
        power = next(n for n in range(-126, 128) if 2.0**n >= ratio)
        powers.append(power + 127)
        for x in block:
            off = [abs(abs(x) / 2.0**power - level) for level in LEVELS]
            nearest = [code for code, distance in enumerate(off) if distance == min(off)]
            code = next(c for c in nearest if c % 2 == 0) if len(nearest) > 1 else nearest[0]
            negative = math.copysign(1.0, x) < 0
            codes.append(code + 8 * negative)
            values.append((-1.0 if negative else 1.0) * LEVELS[code] * 2.0**power)
    return [codes[i] + 16 * codes[i + 1] for i in range(0, len(codes), 2)], powers, values


def test_mxfp4_is_a_plain_reimplementation_to_the_bit() -> None:
    """For numbers of all sizes, ties, zeros of both signs, blocks of zeros; and products with the unpacked values."""
    rng = random.Random(0)
    blocks = [[rng.gauss(0, 1) * 10.0 ** rng.randint(-30, 30) for _ in range(32)] for _ in range(40)]
    blocks += [[rng.choice((1, -1)) * (a + b) / 2 for a, b in zip(LEVELS * 4, (*LEVELS[1:], 6.0) * 4, strict=True)]]
    blocks += [
        [0.0, -0.0] * 16,
        [1e-44, -3e-39] * 16,
        [6.0, *[0.25, 0.75, 1.25, 1.75, 2.5, 3.5, 5.0, -5.0] * 3, *[0.0] * 7],
    ]
    rows = [[fp32(x) for x in (*blocks[i], *blocks[i + 1])] for i in range(0, len(blocks), 2)]
    weight = torch.tensor(rows)
    values, scale = formats.mxfp4(weight)
    back = formats.from_mxfp4(values, scale, torch.float32)
    for i, row in enumerate(rows):
        bytes_, powers, numbers = plain_mxfp4(row)
        assert values[i].tolist() == bytes_ and scale[i].tolist() == powers
        assert back[i].view(torch.int32).tolist() == torch.tensor(numbers).view(torch.int32).tolist()
    assert torch.equal(formats.round_mxfp4(weight).view(torch.int32), back.view(torch.int32))
    broken = weight.index_fill(
        1, torch.tensor([3]), torch.nan
    )  # a NaN makes its whole block NaN, and leaves the next block finite
    assert formats.round_mxfp4(broken)[:, :32].isnan().all() and formats.round_mxfp4(broken)[:, 32:].isfinite().all()
    again = formats.mxfp4(back)
    assert torch.equal(formats.from_mxfp4(*again, torch.float32), back)
    assert formats.powers_of_two(torch.tensor([0, 1, 127, 254, 255], dtype=torch.uint8)).tolist()[:4] == [
        *(2.0**-127, 2.0**-126, 1.0, 2.0**127)
    ]


def stored_fp8(weight: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """E4M3 values, E8M0 factors and the dequantized matrix, quantized as in the release."""
    scale = torch.empty(fp8.blocks(weight.size(0)), fp8.blocks(weight.size(1)))
    for i, j in ((i, j) for i in range(len(scale)) for j in range(scale.size(1))):
        block = weight[128 * i : 128 * (i + 1), 128 * j : 128 * (j + 1)]
        scale[i, j] = 2.0 ** math.ceil(math.log2(max(block.abs().max().item(), 1e-4) / 448))
    spread = scale.repeat_interleave(128, 0)[: len(weight)].repeat_interleave(128, 1)[:, : weight.size(1)]
    values = (weight / spread).to(torch.float8_e4m3fn)
    return values, scale.to(torch.float8_e8m0fnu), values.float() * spread


def release(folder: Path, config: Any = CONFIG) -> dict[str, Tensor]:
    """Writes a folder in the release's format; returns the dequantized tensors by our names."""
    state = Transformer(config).initialise(0).state_dict()
    stored: dict[str, Tensor] = {}
    for ours, theirs in names.table(config).items():
        for index, name in enumerate(theirs):
            piece = part(state[ours], index, len(theirs))
            stem, _, kind = name.rpartition(".")
            if ".experts." in name:
                values, scale = formats.mxfp4(piece)
                stored |= {name: values.view(torch.int8), f"{stem}.scale": scale.view(torch.float8_e8m0fnu)}
                piece.copy_(formats.from_mxfp4(values, scale, torch.float32))
            elif kind == "weight" and (".shared_experts." in name or stem.endswith(FP8)) and "compressor" not in name:
                values, scale, exact = stored_fp8(piece)
                stored |= {name: values, f"{stem}.scale": scale}
                piece.copy_(exact)
            elif name.endswith("tid2eid"):
                stored[name] = piece.long()
            else:
                precise = kind != "weight" or piece.ndim == 1
                stored[name] = piece.float() if precise else piece.bfloat16()
                piece.copy_(stored[name])
    folder.mkdir()
    save_file({name: tensor.contiguous() for name, tensor in stored.items()}, folder / "model.safetensors")
    quantization = {"quant_method": "fp8", "fmt": "e4m3", "scale_fmt": "ue8m0", "weight_block_size": [128, 128]}
    raw = raw_config(config, "bfloat16") | {"expert_dtype": "fp4", "quantization_config": quantization}
    (folder / "config.json").write_text(json.dumps(raw))
    return state


def test_the_releases_files_are_read_widened_and_kept(tmp_path: Path) -> None:
    """Matrices have several blocks, the last of which is short."""
    folder, hidden = tmp_path / "release", CONFIG.hidden_size
    wanted = release(folder)
    model, audit = load_audited(folder)
    assert audit.holds and not audit.skipped.keys() - {n for n in audit.skipped if n.endswith("_scale_inv")}
    assert audit.notes == ["mxfp4: 96 matrices are packed; activations are not quantized here"]
    found = model.state_dict()
    assert all(torch.equal(found[name], tensor.to(found[name])) for name, tensor in wanted.items())
    kept, bf16 = load_for_inference(folder, "kept"), load(folder, torch.bfloat16, "bf16").eval()
    moes = [m for m in kept.modules() if isinstance(m, QuantizedMoE)]
    assert len(moes) == 4 and all(m.format is formats.MXFP4 for m in moes)
    linears = [m for m in kept.modules() if isinstance(m, QuantizedLinear)]
    assert linears and all(m.format is formats.FP8 for m in linears)
    tokens = torch.randint(0, 50, (2, 30), generator=torch.Generator().manual_seed(0))
    with torch.no_grad():
        assert torch.equal(kept.logits(kept(tokens)), bf16.logits(bf16(tokens)))
        moe, x = moes[0], torch.randn(6, hidden, generator=torch.Generator().manual_seed(1))
        index, weight = torch.tensor([[0, 1], [1, 0]] * 3), torch.full((6, 2), 0.5)
        dense = [
            torch.tensor([[plain_mxfp4(row)[2] for row in expert.tolist()] for expert in wanted[name][:2]])
            for name in ("blocks.0.feed_forward.gate_up", "blocks.0.feed_forward.down")
        ]
        expected = moe_gemm.routed_experts(x, index, weight, *dense, limit=1.0)
        assert torch.equal(moe.experts(x, index, weight, moe.gate_up, moe.down), expected)


def test_factors_that_are_lacking_are_named(tmp_path: Path) -> None:
    release(tmp_path / "release")
    raw = json.loads((tmp_path / "release/config.json").read_text())
    (tmp_path / "release/config.json").write_text(
        json.dumps({k: v for k, v in raw.items() if k != "quantization_config"})
    )
    with pytest.raises(UserError, match="FP8 without factors, or without quantization_config"):
        load(tmp_path / "release")


def test_exports_are_the_releases_form_and_come_back_to_the_bit(tmp_path: Path) -> None:
    """The release's names, dtypes and shapes; quantized tensors keep their numbers, and other widths are refused."""
    wanted = release(tmp_path / "release")
    export(load(tmp_path / "release"), tmp_path / "out", "fp8", shard_bytes=200_000)
    stored, found = (
        {n: (s.dtype, tuple(s.shape)) for n, s in Shards(tmp_path / name).specs.items()} for name in ("release", "out")
    )
    assert found.keys() == stored.keys()
    assert all(found[name] == spec for name, spec in stored.items() if spec[0] not in ("F32", "BF16"))
    model, audit = load_audited(tmp_path / "out")
    assert audit.holds and verify(tmp_path / "out").holds
    again = model.state_dict()
    assert all(torch.equal(again[name], tensor.to(again[name])) for name, tensor in wanted.items())
    raw = json.loads((tmp_path / "out/config.json").read_text())
    assert raw["expert_dtype"] == "fp4" and raw["quantization_config"]["scale_fmt"] == "ue8m0"
    with pytest.raises(UserError, match="blocks of 32, which do not divide moe_intermediate_size = 24"):
        export(Transformer(V4).initialise(0), tmp_path / "refused", "fp8")
