"""Gradients that ranks sum in buckets: the numbers of one exchange, sent while the backward pass runs, and bf16's bound."""

from typing import Any

import pytest
import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed.device_mesh import init_device_mesh

from finback.config import UserError
from finback.parallel.buckets import Buckets
from finback.parallel.layout import Layout
from tests.many import Way, continued, on_many, on_ranks, pipeline

U = 2.0**-8  # the largest relative error of rounding to bf16


def _parameters() -> list[nn.Parameter]:
    """Three, of 64, 32 and 32 bytes; the values are the same on all ranks."""
    return [nn.Parameter(torch.linspace(-1, 1, n) + n) for n in (16, 8, 8)]


def _backward(parameters: list[nn.Parameter], skips: bool) -> None:
    """Adds this rank's gradients, of different sizes within a parameter; one may be unused."""
    g = torch.Generator().manual_seed(dist.get_rank())
    total = torch.zeros(())
    for number, p in enumerate(parameters):
        factor = torch.randn(len(p), generator=g) * 10.0 ** torch.randint(-3, 3, (len(p),), generator=g)
        if not (skips and number == 1):
            total = total + (p.square() * factor).sum()
    total.backward()  # type: ignore[no-untyped-call]


def _summed(size: int, dtype: torch.dtype, arms: bool, skips: bool = False) -> tuple[Tensor, list[bool]]:
    """The sums of two passes, and which buckets had been sent when the passes ended."""
    mesh = init_device_mesh("cpu", (dist.get_world_size(),))
    parameters = _parameters()
    found = Buckets(parameters, mesh, size, dtype)
    _backward(parameters, False)
    if arms:
        found.arm()
    _backward(parameters, skips)
    sent = [bucket.work is not None for bucket in found.buckets]
    found.sum_()
    return found.flat, sent


def _agree() -> None:
    fp32, bf16, world = torch.float32, torch.bfloat16, dist.get_world_size()
    late, sent = _summed(40, fp32, arms=False)
    assert sent == [False, False], "two parameters of 32 bytes, and one of 64"
    early, sent = _summed(40, fp32, arms=True)
    assert sent == [True, True] and torch.equal(early, late)
    whole, sent = _summed(0, fp32, arms=True)
    assert sent == [False] and (world > 2 or torch.equal(whole, late)), "of two numbers there is only one sum"
    torch.testing.assert_close(whole, late, rtol=1e-5, atol=1e-5)
    # a rank's unused parameter holds its bucket back, and on other ranks nothing
    skips = dist.get_rank() == 0
    (early, sent), (late, _) = (_summed(40, fp32, arms, skips) for arms in (True, False))
    assert sent == [not skips, not skips] and torch.equal(early, late)
    # each number is rounded once, and each sum of two
    parameters = _parameters()
    mesh = init_device_mesh("cpu", (world,))
    mine = Buckets(parameters, mesh, 0, fp32)
    for _ in range(2):
        _backward(parameters, False)
    sizes = mine.flat.abs()
    dist.all_reduce(sizes)
    off = (_summed(40, bf16, arms=True)[0] - whole).abs()
    assert off.any() and (off <= world * U * (1 + U) ** world * sizes).all()


@pytest.mark.parametrize("ranks", [2, 3])
def test_sums_in_buckets_are_those_of_one_exchange(ranks: int) -> None:
    """To the bit in fp32, during the pass or after it; in bf16 within the rounding of numbers and of partial sums."""
    on_ranks(ranks, _agree)


def test_a_sum_of_two_in_bf16_by_hand() -> None:
    """1 + 2^-8 is halfway and rounds to 1 (to even), 3 + 2^-6 is a number of 8 bits: together 4 + 2^-6 rounds to 4."""
    on_ranks(2, _by_hand)


def _by_hand() -> None:
    parameter = nn.Parameter(torch.ones(2))
    found = Buckets([parameter], init_device_mesh("cpu", (2,)), 1, torch.bfloat16)
    assert parameter.grad is not None
    parameter.grad.copy_(torch.tensor([1 + 2.0**-8, 2.0**-8] if dist.get_rank() == 0 else [3 + 2.0**-6, 2.0**-9]))
    found.sum_()
    assert parameter.grad.tolist() == [4.0, 2.0**-8 + 2.0**-9]


def _trained() -> None:
    ways: list[list[Any]] = []
    way = Way(rows=(8, 4), optimizer="adamw")
    for layout in (
        Layout(dp=2, ep=2, micro_batches=2, sharding="zero1"),
        Layout(dp=2, ep=2, micro_batches=2, sharding="zero1", bucket_mb=0.02),
        Layout(dp=2, ep=2, micro_batches=2, sharding="zero1", bucket_mb=0.02, reduce="bf16"),
    ):
        trainer = on_many(layout, way)
        ways.append(continued(trainer, way, 0, 4))
    plain, overlapped, rounded = (torch.tensor(numbers) for numbers in ways)
    assert torch.equal(plain, overlapped)
    # the first loss is that of the same weights; roundings of single numbers mostly cancel in the norm
    assert torch.equal(plain[0, :3], rounded[0, :3]) and not torch.equal(plain, rounded)
    assert (plain[0, 3] - rounded[0, 3]).abs() <= U * plain[0, 3]
    assert (plain[:, 0] - rounded[:, 0]).abs().max() <= 0.01


def test_overlapped_training_has_the_same_bits() -> None:
    """Two micro-batches, of which the second overlaps, and experts on two ranks, whose tokens travel meanwhile."""
    on_ranks(2, _trained)


def test_layouts_without_whole_gradients_are_refused() -> None:
    for knobs in ({"reduce": "bf16"}, {"bucket_mb": 25}):
        with pytest.raises(UserError, match=f"layout.{next(iter(knobs))}.*whole on every rank"):
            Layout(dp=2, **knobs)  # type: ignore[arg-type]
    with pytest.raises(UserError, match=r"layout\.bucket_mb.*only after its passes"):
        pipeline("1f1b", sharding="zero1", bucket_mb=25)
    with pytest.raises(UserError, match=r"layout\.bucket_mb.*negative"):
        Layout(dp=2, sharding="zero1", bucket_mb=-1)
