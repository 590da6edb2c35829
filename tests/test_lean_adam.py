"""AdamW with 8-bit moments and with moments in host memory, against torch's AdamW."""

from pathlib import Path
from typing import Any, get_args

import pytest
import torch
import torch.distributed as dist
from torch import nn
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.tensor import DTensor, Shard, distribute_tensor

from finback.train import lean_adam
from finback.train.lean_adam import Int8Moment, LeanAdam, Moments, levels, pack, unpack
from finback.train.optim import Adam
from finback.train.sharded_optim import ShardedLeanAdam
from tests.many import on_ranks

BETAS = (0.9, 0.95)


def named(seed: int = 0) -> list[tuple[str, nn.Parameter]]:
    """A matrix with rows of five blocks and several slices, one with short rows, and a vector too small for 8 bits."""
    g = torch.Generator().manual_seed(seed)
    return [
        (n, nn.Parameter(torch.randn(*s, generator=g))) for n, s in (("a", (13, 1280)), ("b", (96, 64)), ("c", (64,)))
    ]


def gradients(parameters: list[tuple[str, nn.Parameter]], seed: int) -> None:
    g = torch.Generator().manual_seed(seed)
    for _, p in parameters:
        p.grad = torch.randn(p.shape, generator=g) * 10.0 ** torch.randint(-4, 1, p.shape, generator=g)


def learnt(optimizer: Adam | LeanAdam, first: int = 0, last: int = 6) -> list[torch.Tensor]:
    for step in range(first, last):
        gradients(list(optimizer.named), step)
        optimizer.step(1e-2)
    return [p.detach().clone() for _, p in optimizer.named]


def test_moments_in_the_hosts_memory_change_no_bit(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(lean_adam, "SLICE", 4096)
    plain, host = Adam(named(), BETAS, 0.1), LeanAdam(named(), BETAS, 0.1, "host")
    assert all(torch.equal(a, b) for a, b in zip(learnt(plain), learnt(host), strict=True))


def test_moments_in_eight_bits_step_by_hand_and_nearly_as_exact_ones(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(lean_adam, "SLICE", 4096)
    plain, lean = Adam(named(), BETAS, 0.1), LeanAdam(named(), BETAS, 0.1, "int8")
    start = [p.detach().clone() for _, p in lean.named]
    gradients(list(lean.named), 0)
    lean.step(1e-2)
    for (name, p), before in zip(lean.named, start, strict=True):  # the first step is lr · sign of the gradient
        assert p.grad is not None
        wanted = before * (1 - 1e-3) - 1e-2 * p.grad / (p.grad.abs() + 1e-8)
        torch.testing.assert_close(p.detach(), wanted, atol=1e-6, rtol=0)
        first, second = (each.read(slice(None), p.device) for each in lean.moments[name])
        if isinstance(lean.moments[name][0], Int8Moment):
            codes, scale = pack(0.1 * p.grad, signed=True)
            torch.testing.assert_close(first, unpack(codes, scale, signed=True))
        assert (second >= 0).all()
    exact, found = learnt(plain, 0, 40), learnt(lean, 1, 40)
    assert torch.equal(exact[2], found[2]), "small parameters stay exact"
    for a, b, before in zip(exact[:2], found[:2], start[:2], strict=True):
        assert not torch.equal(a, b)
        assert (a - b).norm() < 0.1 * (a - before).norm()


def test_levels_and_blocks() -> None:
    signed, unsigned = levels(True), levels(False)
    assert len(signed) == len(unsigned) == 256 and signed[-1] == unsigned[-1] == 1 and unsigned[0] == 0
    # around 1e-6: 0.55 in one interval, or 0.325 and 0.775 in two; around 1: 64 and 128 intervals
    assert unsigned[1:3].tolist() == pytest.approx([3.25e-7, 7.75e-7]) and signed[128].item() == pytest.approx(5.5e-7)
    assert signed[0].item() == pytest.approx(-(1 - 0.9 / 128)) and unsigned[-2].item() == pytest.approx(1 - 0.9 / 256)
    values = torch.randn(1000, generator=torch.Generator().manual_seed(0)) ** 5
    values[250:500] = 0  # one of four blocks of 250 values
    for sign in (True, False):
        given = values if sign else values.abs()
        codes, scale = pack(given, sign)
        again = unpack(codes, scale, sign)
        assert scale.tolist() == [block.abs().max() for block in given.split(250)] and not again[250:500].any()
        assert ((again - given).abs() <= (0.07 if sign else 0.05) * scale.repeat_interleave(250)).all()
        twice = pack(again, sign)
        if not sign:  # the largest magnitude is a level here, so packing again loses nothing
            assert torch.equal(twice[0], codes) and torch.equal(twice[1], scale)


@pytest.mark.parametrize("moments", [m for m in get_args(Moments) if m != "fp32"])
def test_a_state_goes_on_with_the_same_bits(moments: Moments) -> None:
    whole = LeanAdam(named(), BETAS, 0.1, moments)
    half = LeanAdam(named(), BETAS, 0.1, moments)
    learnt(half, 0, 3)
    rest = LeanAdam([(n, nn.Parameter(p.detach().clone())) for n, p in half.named], BETAS, 0.1, moments)
    rest.load_state({name: tensor.clone() for name, tensor in half.state().items()})
    assert all(torch.equal(a, b) for a, b in zip(learnt(whole), learnt(rest, 3), strict=True))
    bytes_held = sum(t.numel() * t.element_size() for t in whole.state().values())
    count = sum(p.numel() for _, p in whole.named)
    assert bytes_held < (2.1 if moments == "int8" else 8.1) * count


@pytest.mark.parametrize("signed", [True, False])
def test_the_nearest_level_is_that_of_a_search(signed: bool) -> None:
    """For random numbers, the levels, the midpoints between levels, and the floats next to those."""
    known = levels(signed)
    middles = (known[1:] + known[:-1]) / 2
    random = torch.randn(20_000, generator=torch.Generator().manual_seed(0)) * torch.logspace(-9, 0, 20_000)
    beside = [torch.nextafter(middles, torch.tensor(end)) for end in (-2.0, 2.0)]
    values = torch.cat([torch.tensor([0.0, 1.0]), known, middles, *beside, random.clamp(-1, 1)])
    values = (values if signed else values.abs())[:, None]  # one value per block, whose factor must be 1
    rows = torch.cat([torch.ones_like(values), values], dim=1)
    codes, scale = pack(rows, signed)
    expected = torch.bucketize(values, middles).clamp_min(0 if signed else (values > 0).int())
    assert torch.equal(codes[:, 1:].int(), expected.int()) and (scale == 1).all()


def _shared_out(expected: str) -> None:
    """On every rank: a share of the rows equals one rank's rows to the bit, also after resuming from its state."""
    mesh = init_device_mesh("cpu", (dist.get_world_size(),))
    for moments, whole in torch.load(expected, weights_only=False).items():
        shared = [(name, nn.Parameter(distribute_tensor(p, mesh, [Shard(0)]))) for name, p in named()]
        optimizer = ShardedLeanAdam(shared, BETAS, 0.1, moments)
        for step in range(6):
            if step == 3:
                state = {name: tensor.clone() for name, tensor in optimizer.state().items()}
                optimizer = ShardedLeanAdam(shared, BETAS, 0.1, moments)
                for name, tensor in optimizer.state().items():
                    tensor.copy_(state[name])
            plain = named()
            gradients(plain, step)
            for (_, mine), (_, p) in zip(shared, plain, strict=True):
                assert p.grad is not None
                mine.grad = distribute_tensor(p.grad, mesh, [Shard(0)])
            optimizer.step(1e-2)
        found = {name: tensor.clone() for name, tensor in (optimizer.state() | dict(shared)).items()}
        for name, tensor in whole.items():
            ours: Any = found[name]
            assert torch.equal(ours.full_tensor() if isinstance(ours, DTensor) else ours, tensor), (moments, name)


def test_ranks_with_some_rows_each_have_the_blocks_of_one(tmp_path: Path) -> None:
    """Includes numbers of rows that the ranks do not divide."""
    kinds: tuple[Moments, ...] = ("int8", "host")
    one = {moments: LeanAdam(named(), BETAS, 0.1, moments) for moments in kinds}
    for optimizer in one.values():
        learnt(optimizer)
    states = {m: o.state() | {n: p.detach() for n, p in o.named} for m, o in one.items()}
    torch.save(states, tmp_path / "one.pt")
    on_ranks(2, _shared_out, str(tmp_path / "one.pt"))


@pytest.mark.parametrize("moments", ["host", "int8"])
def test_some_rows_of_each_expert_are_updated_in_place(moments: Moments) -> None:
    """ZeRO-1 cuts experts by rows if ranks do not divide their number; such a share is not contiguous."""
    whole = torch.randn(3, 8, 1280, generator=torch.Generator().manual_seed(0))
    parts = [nn.Parameter(whole.clone()[:, 2:4]), nn.Parameter(whole[:, 2:4].clone())]
    assert not parts[0].is_contiguous()
    cut, plain = (learnt(LeanAdam([("a", part)], BETAS, 0.1, moments)) for part in parts)
    assert torch.equal(cut[0], plain[0]) and not torch.equal(plain[0], whole[:, 2:4])
