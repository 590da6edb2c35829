"""A model filled and written share by share: the same numbers as on one rank, none of which holds more than its own."""

import dataclasses
from pathlib import Path
from unittest import mock

import pytest
import torch
import torch.distributed as dist
from torch import Tensor

from finback.checkpoint import models, shares
from finback.checkpoint.export import export
from finback.checkpoint.shares import Seeded, Share, Values, runs
from finback.config import UserError
from finback.model.config import ModelConfig
from finback.model.transformer import Transformer
from finback.parallel.build import build
from finback.parallel.build import shares as shares_of
from finback.parallel.layout import Layout
from finback.parallel.mesh import Mesh
from tests.many import MANY, on_ranks, pipeline

# matrices of several FP8 blocks, none a whole number of them high
WIDE = dataclasses.replace(
    MANY, hidden_size=160, intermediate_size=300, moe_intermediate_size=140, num_hidden_layers=2, n_routed_experts=4
)
TIED = dataclasses.replace(MANY, tie_word_embeddings=True, vocab_size=327)


def model(config: ModelConfig, seed: int = 5) -> Transformer:
    """Random weights, and router biases as training leaves them."""
    whole = Transformer(config).initialise(seed)
    for number, router in enumerate(whole.routers()):
        router.bias.copy_(torch.linspace(-1, 1, config.n_routed_experts) * (number + 1))
    return whole


def boxes(whole: dict[str, Tensor], members: int) -> list[Share]:
    """All tensors, cut among members along the first dimension, unevenly where they must, or experts along the second."""
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
def test_files_give_every_share_what_one_rank_reads(tmp_path: Path, fmt: str) -> None:
    export(model(WIDE), tmp_path / "out", fmt, shard_bytes=200_000)  # type: ignore[arg-type]
    whole = models.load(tmp_path / "out").state_dict()
    config, values = models.stored(tmp_path / "out")
    assert config == models.load(tmp_path / "out").config
    for members in (1, 3, 7):
        parts = boxes(whole, members)
        values.fill(parts)
        agree(parts, whole)


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
    with pytest.raises(UserError, match=r"embed = .*\(320, 32\), where model.json calls for \(327, 32\)"):
        models.stored(tmp_path)


LAYOUTS = [
    Layout(dp=4),
    Layout(dp=4, ep=2),
    Layout(dp=4, ep=2, sharding="zero1"),
    pipeline("interleaved", dp=2, ep=2),
    pipeline("1f1b", dp=2, sharding="zero1"),
]


def _built(folder: str) -> None:
    whole = models.load(Path(folder)).state_dict()
    config, stored = models.stored(Path(folder))
    sources: list[tuple[Values, dict[str, Tensor]]] = [(stored, whole), (Seeded(config, 3), _seeded(config))]
    for layout in LAYOUTS:
        mesh = Mesh.of(layout, "cpu")
        for values, expected in sources:
            made = build(config, layout, mesh, values, loss=lambda *_: (torch.zeros(()), torch.zeros(3)))
            mine = shares_of(made.models, mesh)
            agree(mine, expected)
            for each in made.models:
                assert torch.equal(each.cos, Transformer(config).cos), "buffers are there as well"
                assert not any(router.load.any() for router in each.routers())
            held = sum(share.local.numel() for share in mine)
            if layout == Layout(dp=4):
                assert held < 0.27 * sum(tensor.numel() for tensor in whole.values())
            everyone: list[set[str]] = [set()] * 4
            dist.all_gather_object(everyone, {share.name for share in mine})
            assert set.union(*everyone) == whole.keys() - ({"head.weight"} if config.tie_word_embeddings else set())


def _seeded(config: ModelConfig) -> dict[str, Tensor]:
    return Transformer(config).initialise(3).state_dict()


@pytest.mark.parametrize("config", [WIDE, pytest.param(TIED, marks=pytest.mark.slow)], ids=["wide", "tied"])
def test_ranks_fill_their_shares_alone(tmp_path: Path, config: ModelConfig) -> None:
    export(model(config), tmp_path / "out", "fp8")
    on_ranks(4, _built, str(tmp_path / "out"))
