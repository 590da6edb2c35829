"""A model created, loaded and saved by shards: the same numbers as on one rank, and each rank holds only its own."""

import dataclasses
import json
from pathlib import Path
from unittest import mock

import pytest
import torch
import torch.distributed as dist
from safetensors.torch import load_file
from torch import Tensor
from transformers import AutoModelForCausalLM

from finback.checkpoint import models, shares
from finback.checkpoint.export import Format, export
from finback.checkpoint.shares import Seeded, Share, Values, runs
from finback.checkpoint.tensor_file import TensorFile
from finback.config import UserError
from finback.model.config import ModelConfig
from finback.model.transformer import Transformer
from finback.parallel.build import build
from finback.parallel.build import shares as shares_of
from finback.parallel.export import export_shares, save_shares
from finback.parallel.layout import Layout
from finback.parallel.mesh import Mesh
from tests.many import MANY, on_ranks, pipeline
from tests.test_context import OSS
from tests.test_gguf_export import MODELS

# matrices of several FP8 blocks, whose heights are not multiples of a block
WIDE = dataclasses.replace(
    MANY, hidden_size=160, intermediate_size=300, moe_intermediate_size=140, num_hidden_layers=2, n_routed_experts=4
)
TIED = dataclasses.replace(MANY, tie_word_embeddings=True, vocab_size=327)


def model(config: ModelConfig, seed: int = 5) -> Transformer:
    """Random weights, and router biases like those after training."""
    whole = Transformer(config).initialise(seed)
    for number, router in enumerate(whole.routers()):
        router.bias.copy_(torch.linspace(-1, 1, config.n_routed_experts) * (number + 1))
    return whole


def boxes(whole: dict[str, Tensor], members: int) -> list[Share]:
    """All tensors, split among members along the first dimension, unevenly if needed, or experts along the second."""
    found = []
    for name, tensor in whole.items():
        dim = 1 if tensor.ndim == 3 and len(tensor) % members else 0
        for start, part in zip(_starts(tensor.size(dim), members), tensor.chunk(members, dim), strict=False):
            offset = [0] * tensor.ndim
            offset[dim] = start
            local = torch.full(part.shape, torch.nan)
            found.append(Share(name, tuple(tensor.shape), tuple(offset), local))
    return found


def _starts(length: int, members: int) -> range:
    return range(0, length, -(-length // members))


def agree(found: list[Share], whole: dict[str, Tensor]) -> None:
    for share in found:
        box = tuple(slice(o, o + n) for o, n in zip(share.offset, share.local.shape, strict=True))
        assert torch.equal(share.local, whole[share.name][box]), share.name


def test_where_a_box_lies_in_what_is_stored_row_by_row() -> None:
    assert list(runs((4, 3), (1, 0), (2, 3))) == [(3, 6)]
    assert list(runs((2, 4, 3), (0, 2, 0), (2, 2, 3))) == [(6, 6), (18, 6)]
    assert list(runs((2, 4, 3), (1, 0, 0), (1, 4, 3))) == [(12, 12)]
    assert list(runs((5,), (4,), (1,))) == [(4, 1)] and list(runs((5, 2), (5, 0), (0, 2))) == []


@pytest.mark.parametrize("members", [1, 3])
def test_a_seed_gives_every_share_what_one_rank_draws(members: int) -> None:
    whole = dict(Transformer(TIED).initialise(5).named_parameters())
    for drawn in (48, 1 << 20):
        parts = boxes(whole, members)
        with mock.patch.object(shares, "DRAWN", drawn):
            Seeded(TIED, 5).fill(parts)
        agree(parts, whole)


@pytest.mark.parametrize("fmt", ["fp32", "bf16", "fp8"])
def test_files_give_every_share_what_one_rank_reads(tmp_path: Path, fmt: Format) -> None:
    export(model(WIDE), tmp_path / "out", fmt, shard_bytes=200_000)
    whole = models.load(tmp_path / "out").state_dict()
    config, values = models.stored(tmp_path / "out")
    assert config == models.load(tmp_path / "out").config
    for members in (1, 3, 7):
        parts = boxes(whole, members)
        values.fill(parts)
        agree(parts, whole)
    raw = json.loads((tmp_path / "out/config.json").read_text())
    for field, value, words in (
        ("num_nextn_predict_layers", 2, r"missing, with \d+ more: the weights are not those of config.json"),
        ("intermediate_size", 304, r"shape \[300, 160\], but config.json requires \[304, 160\]"),
    ):
        (tmp_path / "out/config.json").write_text(json.dumps(raw | {field: value}))
        with pytest.raises(UserError, match=words):
            models.stored(tmp_path / "out")


def test_a_stages_own_file_gives_shares_and_is_checked(tmp_path: Path) -> None:
    whole = model(TIED)
    models.save(tmp_path, whole)
    parts = boxes(dict(whole.named_parameters()), 3)
    models.stored(tmp_path)[1].fill(parts)
    agree(parts, whole.state_dict())
    file = tmp_path / "model.safetensors"
    content = bytearray(file.read_bytes())
    content[-9] ^= 1
    file.write_bytes(content)
    with pytest.raises(UserError, match="does not match its digest"):
        models.stored(tmp_path)
    models.save(tmp_path / "..", model(dataclasses.replace(TIED, vocab_size=320)))
    file.write_bytes((tmp_path / "../model.safetensors").read_bytes())
    with pytest.raises(UserError, match=r"embed = .*\(320, 32\), but model.json requires \(327, 32\)"):
        models.stored(tmp_path)


LAYOUTS = [
    Layout(dp=4, ep=2),
    pipeline("interleaved", dp=2, ep=2),
    Layout(dp=4),
    Layout(dp=4, ep=2, sharding="zero1"),
    pipeline("1f1b", dp=2, sharding="zero1"),
]
FORMATS: tuple[Format, ...] = ("fp32", "bf16", "fp8")


def _together(folder: str, layouts: int) -> None:
    for number, layout in enumerate(LAYOUTS[:layouts]):
        mesh = Mesh.of(layout, "cpu")
        _fill(Path(folder) / "quantized", layout, mesh)
        _export(Path(folder), number, layout, mesh)
    _fail(Path(folder), mesh, layout)


def _made(config: ModelConfig, layout: Layout, mesh: Mesh, values: Values) -> list[Share]:
    made = build(config, layout, mesh, values, loss=lambda *_: (torch.zeros(()), torch.zeros(3)))
    for each in made.models:
        assert torch.equal(each.cos, Transformer(config).cos), "buffers must exist as well"
        assert not any(router.load.any() for router in each.routers())
    return shares_of(made.models, mesh)


def _fill(folder: Path, layout: Layout, mesh: Mesh) -> None:
    """From FP8 files and from a seed, against one rank's numbers."""
    whole = models.load(folder).state_dict()
    config, stored = models.stored(folder)
    seeded = Transformer(config).initialise(3).state_dict()
    for values, expected in ((stored, whole), (Seeded(config, 3), seeded)):
        mine = _made(config, layout, mesh, values)
        agree(mine, expected)
        if layout == Layout(dp=4):
            held = sum(share.local.numel() for share in mine)
            assert held < 0.27 * sum(tensor.numel() for tensor in whole.values())
        everyone: list[set[str]] = [set()] * 4
        dist.all_gather_object(everyone, {share.name for share in mine})
        tied = {"head.weight"} if config.tie_word_embeddings else set()
        assert set.union(*everyone) == whole.keys() - tied


def _export(folder: Path, number: int, layout: Layout, mesh: Mesh) -> None:
    config, stored = models.stored(folder / "start")
    mine = _made(config, layout, mesh, stored)
    for fmt in FORMATS if number < 2 else FORMATS[:1]:
        export_shares(config, mine, folder / f"{number}-{fmt}", fmt, shard_bytes=60_000)
    save_shares(config, mine, folder / f"{number}")


def _fail(folder: Path, mesh: Mesh, layout: Layout) -> None:
    """A full disk on one rank, and an existing folder: all ranks stop and leave no files."""
    config, stored = models.stored(folder / "start")
    mine = _made(config, layout, mesh, stored)
    full = OSError(28, "No space left on device")
    for function, name in ((export_shares, "full"), (save_shares, "full-own")):
        with (
            mock.patch.object(TensorFile, "write", side_effect=full if dist.get_rank() == 2 else None),
            mock.patch.object(TensorFile, "close", return_value=""),
            pytest.raises(OSError, match=r"No space left.*rank 2"),
        ):
            function(config, mine, folder / name)
    with pytest.raises(UserError, match="start': exists and is not empty"):
        export_shares(config, mine, folder / "start")


def _tensors(folder: Path) -> dict[str, Tensor]:
    return {name: tensor for file in folder.glob("*.safetensors") for name, tensor in load_file(file).items()}


def together(tmp_path: Path, config: ModelConfig, layouts: int) -> Transformer:
    """Loads and exports on four ranks; returns the model on one rank, which all their exports must equal."""
    whole = model(config)
    (tmp_path / "start").mkdir()
    models.save(tmp_path / "start", whole)
    (tmp_path / "0").mkdir()
    models.save(tmp_path / "0", Transformer(config).initialise(9))  # what a stage on one rank wrote there
    export(whole, tmp_path / "quantized", "fp8")
    on_ranks(4, _together, str(tmp_path), layouts)
    for fmt in FORMATS:
        export(whole, tmp_path / fmt, fmt)
    for number in range(layouts):
        for fmt in FORMATS if number < 2 else FORMATS[:1]:
            folder = tmp_path / f"{number}-{fmt}"
            found, expected = _tensors(folder), _tensors(tmp_path / fmt)
            assert found.keys() == expected.keys()
            for name, tensor in expected.items():
                assert tensor.dtype == found[name].dtype and torch.equal(tensor.float(), found[name].float()), name
            assert (folder / "config.json").read_text() == (tmp_path / fmt / "config.json").read_text()
            assert len(list(folder.glob("*.safetensors"))) >= 4, "all ranks must write"
        for name, tensor in models.load(tmp_path / f"{number}").state_dict().items():
            assert torch.equal(tensor, whole.state_dict()[name]), name
    assert not list(tmp_path.rglob(".*")) and not list((tmp_path / "full-own").iterdir()), "no temporary files are left"
    assert not (tmp_path / "full").exists()
    return whole


def _joined(folder: str) -> None:
    layouts = {"gpt_oss": Layout(cp=2, ep=2), "phi3": Layout(dp=2)}
    for name, layout in layouts.items():
        config, stored = models.stored(Path(folder) / name)
        mine = _made(config, layout, Mesh.of(layout, "cpu"), stored)
        export_shares(config, mine, Path(folder) / f"{name} of two", "bf16", shard_bytes=60_000)


def test_ranks_write_together_what_a_family_keeps_as_one(tmp_path: Path) -> None:
    """The experts of a layer of gpt-oss; the queries, keys and values of Phi 3. The ranks' files equal one rank's."""
    for name, config in {"gpt_oss": OSS, "phi3": MODELS["phi3"]}.items():
        whole = Transformer(config).initialise(5)
        for parameter in whole.parameters():
            parameter.data.add_(0.1 * torch.randn_like(parameter))
        (tmp_path / name).mkdir()
        models.save(tmp_path / name, whole)
        export(whole, tmp_path / f"{name} of one", "bf16")
    on_ranks(2, _joined, str(tmp_path))
    for name in ("gpt_oss", "phi3"):
        found, expected = (_tensors(tmp_path / f"{name} of {n}") for n in ("two", "one"))
        assert found.keys() == expected.keys() and any("_proj" in key for key in found)
        for key, tensor in expected.items():
            assert tensor.dtype == found[key].dtype and torch.equal(tensor, found[key]), key
        assert AutoModelForCausalLM.from_pretrained(tmp_path / f"{name} of two").config.model_type == name
        index = json.loads((tmp_path / f"{name} of two/model.safetensors.index.json").read_text())
        assert index["weight_map"].keys() == found.keys()


@pytest.mark.slow
def test_ranks_fill_and_write_together_what_one_does(tmp_path: Path) -> None:
    whole = together(tmp_path, WIDE, 2)
    theirs = AutoModelForCausalLM.from_pretrained(tmp_path / "0-fp32")
    tokens = torch.arange(3, 19)[None]
    torch.testing.assert_close(theirs(tokens).logits, whole.eval().logits(whole(tokens)), atol=1e-5, rtol=0)
    victim = sorted((tmp_path / "1").glob("*.safetensors"))[1]
    content = bytearray(victim.read_bytes())
    content[-1] ^= 1
    victim.write_bytes(content)
    for read in (models.load, models.stored):
        with pytest.raises(UserError, match="does not match its digest"):
            read(tmp_path / "1")
    victim.unlink()
    with pytest.raises(UserError, match="the file is missing"):
        models.load(tmp_path / "1")


@pytest.mark.slow
@pytest.mark.parametrize("config", [WIDE, TIED], ids=["wide", "tied"])
def test_every_layout_does(tmp_path: Path, config: ModelConfig) -> None:
    together(tmp_path, config, len(LAYOUTS))
