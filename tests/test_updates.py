"""Native parameter updates against torch's own operations, to the bit, and the rounding of bf16 parameters."""

import math

import pytest
import torch
from torch import Tensor

from finback.engine.engine import Engine, EngineConfig
from finback.engine.request import SamplingParams
from finback.kernels import native
from finback.kernels.updates import (
    AdamPart,
    Along,
    MuonPart,
    adamw,
    mixed,
    momentum,
    step_along,
    stochastically_rounded,
)
from finback.model.transformer import Transformer
from finback.train.optim import Adam
from tests.toy import CONFIG

BETAS = (0.9, 0.95)
# whole vectors of eight, less than one, several and a remainder, and more than one thread's block
SHAPES = ((4, 8), (5,), (3, 7), (129, 257))


def same(found: Tensor, wanted: Tensor) -> bool:
    """Bit-identical where torch uses the vectors that updates.cpp follows, elsewhere equal within rounding."""
    if torch.backends.cpu.get_cpu_capability() in ("AVX2", "AVX512"):
        return torch.equal(found, wanted)
    bf16 = found.dtype == torch.bfloat16
    return torch.allclose(found.float(), wanted.float(), rtol=2**-7 if bf16 else 1e-6, atol=1e-6)


def random(*shape: int, seed: int, wide: bool = False) -> Tensor:
    """Normal numbers; `wide`: magnitudes over seven decades."""
    g = torch.Generator().manual_seed(seed)
    x = torch.randn(*shape, generator=g)
    return x * 10 ** (torch.rand(*shape, generator=g) * 7 - 6) if wide else x


def adam_runs(dtype: torch.dtype, scale: float, decay: float, steps: int = 12) -> list[Tensor]:
    """Parameters and moments after some steps."""
    values = [random(*shape, seed=i).to(dtype) for i, shape in enumerate(SHAPES)]
    moments = [(torch.zeros(shape), torch.zeros(shape), torch.zeros(())) for shape in SHAPES]
    for step in range(steps):
        gradients = [random(*shape, seed=100 * step + i, wide=True) for i, shape in enumerate(SHAPES)]
        parts = [
            AdamPart(v, g, *m, seed=7 + i) for i, (v, g, m) in enumerate(zip(values, gradients, moments, strict=True))
        ]
        adamw(parts, 1e-3 * (step + 1), BETAS, decay, scale)
    return [*values, *(t for each in moments for t in each)]


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize(("scale", "decay"), [(1.0, 0.0), (0.37, 0.1)])
def test_adamw_has_the_bits_of_torchs(
    dtype: torch.dtype, scale: float, decay: float, monkeypatch: pytest.MonkeyPatch
) -> None:
    """With weight decay, bias correction and a clipped gradient; in fp32 also torch's own optimizer."""
    found = adam_runs(dtype, scale, decay)
    monkeypatch.setattr(native, "library", lambda: None)
    wanted = adam_runs(dtype, scale, decay)
    assert all(map(same, found, wanted))
    if dtype == torch.float32:
        theirs = [torch.nn.Parameter(random(*shape, seed=i)) for i, shape in enumerate(SHAPES)]
        optimizer = torch.optim.AdamW(theirs, betas=BETAS, weight_decay=decay, fused=True)
        for step in range(12):
            optimizer.param_groups[0]["lr"] = 1e-3 * (step + 1)
            for i, p in enumerate(theirs):
                p.grad = random(*p.shape, seed=100 * step + i, wide=True) * scale
            optimizer.step()
        assert all(same(a, b.detach()) for a, b in zip(found, theirs, strict=False))


def muon_runs(dtype: torch.dtype, weights: torch.dtype) -> list[Tensor]:
    """Momentum, update directions in a dtype, and parameters after the update."""
    values = [random(*shape, seed=i).to(weights) for i, shape in enumerate(SHAPES)]
    buffers, found = [torch.zeros(shape) for shape in SHAPES], list[Tensor]()
    for step in range(6):
        gradients = [random(*shape, seed=100 * step + i, wide=True) for i, shape in enumerate(SHAPES)]
        directions = [None, *(torch.empty(shape, dtype=dtype) for shape in SHAPES[1:])]
        momentum([MuonPart(*each) for each in zip(gradients, buffers, directions, strict=True)], 0.95, 0.37)
        step_along([Along(v, g, 0.77, seed=step) for v, g in zip(values, gradients, strict=True)], 1e-2, 0.05)
        found += [d for d in directions if d is not None]
    return [*found, *buffers, *values]


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_muons_passes_have_the_bits_of_torchs(dtype: torch.dtype, monkeypatch: pytest.MonkeyPatch) -> None:
    found = muon_runs(dtype, dtype)
    monkeypatch.setattr(native, "library", lambda: None)
    wanted = muon_runs(dtype, dtype)
    assert all(map(same, found, wanted))


def test_momentum_by_hand() -> None:
    buffer, direction = torch.tensor([2.0]), torch.empty(1)
    momentum([MuonPart(torch.tensor([4.0]), buffer, direction)], 0.5, scale=0.25)
    assert buffer.item() == 2.0 and direction.item() == 2.0  # 0.5 · 2 + 1, then 1 + 0.5 · 2
    value = torch.tensor([1.0])
    step_along([Along(value, direction, scale=3.0)], lr=0.1, weight_decay=1.0)
    assert value.item() == pytest.approx(0.9 - 0.1 * 6)


def test_bf16_is_rounded_to_a_neighbour_with_the_right_mean() -> None:
    """Values a quarter, a half and nine tenths of the way between two bf16 numbers; infinity and NaN stay."""
    shares, count = (0.0, 0.25, 0.5, 0.9), 1 << 16
    for share in shares:
        for sign in (1, -1):
            values = torch.full((count,), sign * (1 + share / 128))
            found = stochastically_rounded(values, mixed(3)).float()
            assert set(found.abs().tolist()) <= {1.0, 1 + 1 / 128}
            mean = ((found.double().mean().abs() - 1) * 128).item()
            assert abs(mean - share) < 5 * math.sqrt(share * (1 - share) / count) + 1e-4  # five standard errors
    kept = stochastically_rounded(torch.tensor([math.inf, -math.inf, math.nan]), mixed(3))
    assert kept[:2].tolist() == [math.inf, -math.inf] and kept[2].isnan()


def test_rounding_depends_on_seed_and_place_alone() -> None:
    values = torch.full((1000,), 1 + 1 / 256)
    first = stochastically_rounded(values, mixed(1))
    assert torch.equal(first, stochastically_rounded(values, mixed(1)))
    assert torch.equal(first[300:], stochastically_rounded(values[300:], mixed(1), offset=300))
    for other in (stochastically_rounded(values, mixed(2)), first.roll(1)):
        assert 350 < int((first != other).sum()) < 650, "seeds must give independent rounding"


def test_many_small_steps_move_a_bf16_parameter_as_far_as_fp32() -> None:
    """Each step is a tenth of the distance to the next number; rounding to nearest would never move."""
    moved = {}
    for dtype in (torch.float32, torch.bfloat16):
        value = torch.ones(4096, dtype=dtype)
        for step in range(40):
            step_along([Along(value, torch.full((4096,), -1.0), 1.0, seed=step)], lr=0.1 / 128, weight_decay=0.0)
        moved[dtype] = value.double().mean().item() - 1
    assert moved[torch.float32] == pytest.approx(40 * 0.1 / 128, rel=1e-4)
    assert moved[torch.bfloat16] == pytest.approx(moved[torch.float32], rel=0.03)  # the standard error is 0.7 %


@pytest.mark.parametrize("is_native", [True, False])
def test_an_engine_notices_an_update(is_native: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    """It reads the prompt again, although it has kept the pages of the same prompt from before."""
    if not is_native:
        monkeypatch.setattr(native, "serves", lambda x: False)
    model, prompt, sampling = Transformer(CONFIG).initialise(0), list(range(3, 43)), SamplingParams(max_tokens=4)
    kept = Engine(model, [1], EngineConfig(reuse=True))
    before = kept.generate([prompt], sampling, [0])[0].logprobs
    named = list(model.named_parameters())
    for number, (_, parameter) in enumerate(named):
        parameter.grad = random(*parameter.shape, seed=number)
    Adam(named, BETAS, 0.0).step(0.05)
    after, fresh = (e.generate([prompt], sampling, [0])[0].logprobs for e in (kept, Engine(model, [1])))
    assert after != before and after == pytest.approx(fresh, abs=1e-5)
