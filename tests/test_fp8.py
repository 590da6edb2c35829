"""FP8 training: numbers worked by hand, fast forms against plain ones, error bounds against fp64, what stays exact."""

from collections.abc import Callable
from dataclasses import dataclass, field, replace
from typing import get_args

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from finback.engine.engine import Engine
from finback.engine.request import SamplingParams
from finback.kernels import fp8, fp8_hopper, fp8_train, native, reference
from finback.kernels.fp8_products import Emulated, Operand, Products, round_, round_e5m6, round_tiles
from finback.kernels.fp8_train import AFTER_ATTENTION, LINEAR, ROUTED, Numerics
from finback.model.config import TINY, ModelConfig
from finback.model.moe import MoE
from finback.model.recompute import Policy, use_recompute
from finback.model.transformer import Transformer
from finback.train.precision import use_fp8
from tests.toy import CONFIG, DENSE, V4, backward, toy_model

SHAPES = ((1, 1), (5, 7), (128, 128), (130, 260), (256, 384))


def normal(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed))


def heavy(*shape: int, seed: int = 0) -> Tensor:
    """Numbers that span many powers of two, as gradients do."""
    return normal(*shape, seed=seed) * normal(*shape, seed=seed + 1).mul(3).exp()


def error(got: Tensor, exact: Tensor) -> float:
    """The relative error over all numbers together."""
    return ((got.double() - exact.double()).norm() / exact.double().norm()).item()


def grad_of(function: Callable[..., Tensor], *inputs: Tensor) -> tuple[Tensor, list[Tensor]]:
    """A function's value, and the gradients of its inputs for a fixed gradient of its output."""
    leaves = [x.clone().requires_grad_() for x in inputs]
    y = function(*leaves)
    y.backward(heavy(*y.shape, seed=77).to(y.dtype))
    return y.detach(), [leaf.grad for leaf in leaves if leaf.grad is not None]


@dataclass(frozen=True)
class Exact:
    """Quantizes without rounding, so that only the wiring of the three products is tested. Records its inputs."""

    calls: list[tuple[str, bool, tuple[int, ...]]] = field(default_factory=list)
    weights: list[Tensor] = field(default_factory=list)

    def tiles(self, x: Tensor, power_of_two: bool = False) -> Operand:
        self.calls.append(("tiles", power_of_two, tuple(x.shape)))
        return (x.float(),)

    def columns(self, x: Tensor, power_of_two: bool = False) -> Operand:
        self.calls.append(("columns", power_of_two, tuple(x.shape)))
        return (x.float().T,)

    def blocks(self, weight: Tensor, power_of_two: bool = False) -> Operand:
        self.weights.append(weight)
        return (weight,)

    def keep(self, x: Tensor) -> Tensor:
        return x.float()

    def multiply(self, a: Operand, b: Operand) -> Tensor:
        return a[0] @ b[0].T

    def dequantize(self, operand: Operand) -> Tensor:
        return operand[0]


# formats


def test_tiles_by_hand() -> None:
    row = torch.tensor([[448.0, 17.0, 19.0, -0.3, 2**-9, 2**-10, 3 * 2**-10, 447.0]])
    values, scale = fp8.quantize_tiles(row)
    assert scale.tolist() == [[1.0]]
    # spacing is 2 from 16 on, and ties go to even mantissas; spacing is 2^-9 near 0
    assert values.float().tolist() == [[448.0, 16.0, 20.0, -0.3125, 2**-9, 0.0, 2**-8, 448.0]]
    five, two = torch.full((1, 1), 5.0), torch.full((1, 1), 7.0)
    assert fp8.quantize_tiles(five)[1].item() == pytest.approx(5 / 448)
    assert fp8.quantize_tiles(five, power_of_two=True)[1].item() == 2**-6  # 5/448 rounded up
    assert fp8.quantize_tiles(two, power_of_two=True)[1].item() == 2**-6  # 7/448 is already a power of two


def test_tiles_are_128_wide_and_the_last_one_shorter() -> None:
    x = torch.ones(2, 300)
    x[0, 130], x[1, 299] = 448.0, 896.0
    assert fp8.quantize_tiles(x)[1].mul(448).tolist() == [[1.0, 448.0, 1.0], [1.0, 1.0, 896.0]]
    padded = F.pad(x, (0, 84))
    assert torch.equal(fp8.quantize_tiles(padded)[1], fp8.quantize_tiles(x)[1])
    assert fp8.quantize(F.pad(x, (0, 0, 0, 126)))[1].equal(fp8.quantize(x)[1])


def test_what_is_too_large_saturates_and_what_is_no_number_stays_none() -> None:
    odd = torch.tensor([500.0, -1e9, torch.inf, torch.nan, 0.0])
    assert fp8.e4m3(odd).float().nan_to_num(nan=7.0).tolist() == [448.0, -448.0, 448.0, 7.0, 0.0]


@pytest.mark.parametrize("bad", [torch.nan, torch.inf, -torch.inf])
@pytest.mark.parametrize("power_of_two", [False, True])
def test_a_bad_number_spoils_its_tile_and_no_other(bad: float, power_of_two: bool) -> None:
    x = heavy(4, 256)
    x[1, 3] = bad
    for back in (fp8.dequantize_tiles(*fp8.quantize_tiles(x, power_of_two)), round_tiles(x, 1, power_of_two)):
        assert back[1, :128].isnan().all() and back.isnan().sum() == 128
    y, _ = grad_of(lambda x, w: fp8_train.linear(x, w, LINEAR), x, heavy(8, 256))
    assert not y[1].isfinite().any() and y[[0, 2, 3]].isfinite().all()


def test_zeros_and_tiny_gradients() -> None:
    """The gradient of a mean over many tokens is far below the 1e-4 at which DeepSeek's inference code clamps."""
    x = torch.cat([torch.zeros(3, 128), 1e-12 * normal(3, 128), 1e38 * normal(3, 128).clamp(-3, 3)], dim=1)
    for back in (fp8.dequantize_tiles(*fp8.quantize_tiles(x)), round_tiles(x, 1)):
        assert not back[:, :128].any() and back.isfinite().all()
        for part in (slice(128, 256), slice(256, 384)):
            assert error(back[:, part], x[:, part]) < 0.04


def test_rounding_is_the_formats() -> None:
    """Every E4M3 number, all midpoints between neighbours, and the floats next to them; chosen numbers for E5M6."""
    codes = torch.arange(256, dtype=torch.uint8).view(torch.float8_e4m3fn).float()
    exact = codes[codes.isfinite()].sort().values
    halves = (exact[1:] + exact[:-1]) / 2
    every = torch.cat([exact, halves, halves.nextafter(exact[1:]), halves.nextafter(exact[:-1]), heavy(9999)])
    every = every.clamp(-448, 448)
    assert torch.equal(round_(every.clone(), 3, -6), every.to(torch.float8_e4m3fn).float())
    # 1 + 2^-7 is a tie between 1 and 1 + 2^-6; 65024 is the largest and sets the factor to 1
    row = torch.tensor([[65024.0, 1 + 2**-7, 1 + 3 * 2**-7, 2**-20, 2**-21]])
    assert round_e5m6(row).tolist() == [[65024.0, 1.0, 1 + 2**-5, 2**-20, 0.0]]
    x = normal(64, 200)
    assert error(round_e5m6(x), x) < 0.006 < 0.02 < error(round_tiles(x, 1), x) < 0.03


@pytest.mark.parametrize("compiled", [True, False])
@pytest.mark.parametrize("power_of_two", [True, False])
def test_fast_operands_are_the_plain_ones_to_the_bit(
    compiled: bool, power_of_two: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    if not compiled:
        monkeypatch.setattr(native, "library", lambda: None)
    elif native.library() is None:
        pytest.skip("no C++ compiler: only the plain implementation runs")
    for shape in SHAPES:
        for x in (heavy(*shape), heavy(*shape).bfloat16(), normal(*shape) * 1e-20, torch.full(shape, 7.0)):
            for fast, plain in (
                (Emulated().tiles(x, power_of_two), fp8.quantize_tiles(x, power_of_two)),
                (Emulated().columns(x, power_of_two), fp8.quantize_tiles(x.T.contiguous(), power_of_two)),
            ):
                assert torch.equal(fast[0], fp8.dequantize_tiles(*plain))
        assert torch.equal(Emulated().blocks(x)[0], fp8.dequantize(*fp8.quantize(x), torch.float32))


def test_powers_of_two_cost_nothing_when_tiles_turn() -> None:
    """V3 3.3.3: requantizing from 1 x 128 to 128 x 1 rounds again, unless the factors are powers of two."""
    x = normal(256, 256)
    kept = {p: round_tiles(x, 1, p) for p in (True, False)}
    again = {p: round_tiles(k, 0, p) for p, k in kept.items()}
    normal_ones = kept[True].abs() > kept[True].abs().amax() * 2**-12
    assert torch.equal(again[True][normal_ones], kept[True][normal_ones])
    assert error(again[False], kept[False]) > 0.01


# products


@pytest.mark.parametrize("shape", [(3, 5, 7), (128, 128, 128), (70, 130, 300), (16, 200, 1024)])
def test_one_product_is_the_promoted_one_but_for_the_order_of_summation(shape: tuple[int, int, int]) -> None:
    m, n, k = shape
    a, b, w = heavy(m, k), heavy(n, k, seed=5), heavy(n, k, seed=9)
    plain, fast = Products(), Emulated()
    for right, other in ((plain.tiles(b), fast.tiles(b)), (plain.blocks(w), fast.blocks(w))):
        left = plain.tiles(a)
        # the factors stay in fp64 to the end
        wide = fp8.expand_tiles(left[1].double(), k) * left[0].double()
        scale = reference._per_row(right[1].double(), n)
        exact_right = fp8.expand_tiles(scale, k) * right[0].double()
        exact, bound = wide @ exact_right.T, wide.abs() @ exact_right.abs().T * (k + 8) * 2.0**-24
        for got in (plain.multiply(left, right), fast.multiply(fast.tiles(a), other)):
            assert ((got.double() - exact).abs() <= bound).all()


def tensor_core_sum(a: Tensor, b: Tensor) -> Tensor:
    """a (m, k) · b (n, k)^T of E4M3 numbers, summed as Hopper's tensor cores do, as described in V3 3.3.2 and ISCA.

    An instruction takes 32 products. They and the running sum are shifted to the exponent of the largest of them, and
    fraction bits below the 13th are cut off; the new sum is cut likewise, to 1 + 8 + 13 bits. Needs (m, n, 32) numbers.
    """
    total = a.new_zeros(a.size(0), b.size(0), 1)
    for start in range(0, a.size(1), 32):
        part = slice(start, start + 32)
        terms = torch.cat([total, a[:, None, part] * b[None, :, part]], dim=-1)
        unit = _last_bit(terms.abs().amax(dim=-1, keepdim=True))
        total = (terms / unit).trunc().sum(dim=-1, keepdim=True) * unit
        unit = _last_bit(total.abs())
        total = (total / unit).trunc() * unit
    return total.squeeze(-1)


def _last_bit(x: Tensor) -> Tensor:
    """The weight of the 13th fraction bit of numbers as large as x."""
    exponent = torch.frexp(x).exponent - 1
    return torch.ldexp(torch.ones_like(x), exponent - 13)


def test_tensor_cores_by_hand() -> None:
    """13 bits after the leading one: 2^-13 added to 1 stays, 2^-14 does not; negative numbers are cut towards 0."""
    for small, kept in ((2**-6, 1 + 2**-13), (2**-7, 1.0)):
        a, b = torch.tensor([[1.0, small]]), torch.tensor([[1.0, 2**-7]])
        assert tensor_core_sum(a, b).item() == kept
        assert tensor_core_sum(-a, b).item() == -kept
    # each is cut off, though the sum of all 16 is large enough to keep
    assert tensor_core_sum(torch.tensor([[1.0] + 16 * [2**-7]]), torch.tensor([[1.0] + 16 * [2**-7]])).item() == 1
    # the next instruction adds its products to the running sum
    late = torch.zeros(1, 64)
    late[0, 0], late[0, 40] = 1.0, 2**-7
    assert tensor_core_sum(late, late).item() == 1.0
    assert tensor_core_sum(torch.zeros(2, 64), torch.ones(3, 64)).tolist() == [[0.0] * 3] * 2


def test_promotion_is_why_fourteen_bits_are_enough() -> None:
    """V3 3.3.2: at K = 4096 sums in 14 bits are up to 2 % wrong; promoted every 128 products they are not."""
    a, b = (normal(16, 4096, seed=s).abs() for s in (0, 1))
    one, other = fp8.quantize_tiles(a), fp8.quantize_tiles(b)
    exact = reference.fp8_product(*one, *other).double()
    promoted = reference.fp8_product(*one, *other, accumulate=tensor_core_sum)
    whole = fp8.e4m3(a * 64), fp8.e4m3(b * 64)  # one factor for the whole tensor, as without promotion
    unpromoted = tensor_core_sum(*(t.float() for t in whole))
    true = whole[0].double() @ whole[1].double().T
    wrong = ((unpromoted - true) / true).abs().max().item()
    right = ((promoted - exact) / exact).abs().max().item()
    assert wrong > 0.005 and right < 0.001 and wrong > 10 * right


def test_tiles_take_outliers_that_one_factor_cannot() -> None:
    """V3 3.3.2: a channel that is thousands of times larger ruins the other channels: in its tile, or everywhere."""
    x, w = normal(64, 512), normal(256, 512, seed=3)
    x[:, 7] *= 300_000
    w[:, 7] = 0.0  # removes the outlier's own contribution, so that the error of the other channels shows
    exact = x.double() @ w.double().T
    tensor_scale = x.abs().max() / 448
    coarse = fp8.e4m3(x / tensor_scale).double() * tensor_scale.double() @ w.double().T
    fine = Emulated().multiply(Emulated().tiles(x), (w,))
    assert error(coarse, exact) > 0.8
    assert error(fine, exact) < 0.5  # a quarter of the channels share the outlier's tile


# the three products of a linear map, and modules that use them


@pytest.mark.parametrize("numerics", [LINEAR, AFTER_ATTENTION])
def test_linear_is_three_products_with_the_papers_tiles(numerics: Numerics) -> None:
    x, w = heavy(2, 100, 300), normal(200, 300, seed=3)
    p = Products()
    y, (d_x, d_w) = grad_of(lambda x, w: fp8_train.linear(x, w, replace(numerics, products=p)), x, w)
    rows, grad = x.flatten(0, 1), heavy(2, 100, 200, seed=77).flatten(0, 1)
    two = numerics.input_power_of_two
    seen = fp8.dequantize_tiles(*fp8.quantize_tiles(rows, two))
    weight = fp8.dequantize(*fp8.quantize(w), torch.float32)
    kept = round_e5m6(rows) if numerics.keep_e5m6 else seen  # hence two roundings
    turned = [fp8.dequantize_tiles(*fp8.quantize_tiles(t.T.contiguous(), q)) for t, q in ((grad, False), (kept, two))]
    wanted = (seen @ weight.T, fp8.dequantize_tiles(*fp8.quantize_tiles(grad)) @ weight, turned[0] @ turned[1].T)
    for got, exact in zip((y, d_x, d_w), wanted, strict=True):
        assert error(got.reshape(exact.shape), exact) < 1e-6


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("numerics", [LINEAR, AFTER_ATTENTION])
def test_linear_is_as_far_from_fp32_as_three_bits_are(numerics: Numerics, dtype: torch.dtype) -> None:
    """Rounding to 3 mantissa bits has an error of 2.6 % (rms), and a product of two rounded numbers one of 3.7 %."""
    x, w = normal(384, 300).to(dtype), normal(200, 300, seed=3)
    y, grads = grad_of(lambda x, w: fp8_train.linear(x, w, numerics), x, w)
    exact_y, exact = grad_of(lambda x, w: F.linear(x.float(), w), x, w)
    assert y.dtype == grads[0].dtype == dtype and grads[1].dtype == torch.float32
    for got, wanted in zip((y, *grads), (exact_y, *exact), strict=True):
        assert 0.02 < error(got, wanted) < 0.05
    # no bias: the component along the exact gradient equals the exact gradient
    along = (grads[1] * exact[1]).sum() / exact[1].square().sum()
    assert along.item() == pytest.approx(1, abs=0.01)


def test_feed_forwards_without_rounding_are_the_plain_ones() -> None:
    x, gate_up, down = normal(40, 24), normal(6, 32, 24, seed=1), normal(6, 24, 16, seed=2)
    index = torch.rand(40, 6, generator=torch.Generator().manual_seed(4)).topk(2, dim=1).indices
    index[index == 5] = 0  # one expert without tokens, and tokens that choose an expert twice
    weight = normal(40, 2, seed=5).sigmoid()
    exact = replace(ROUTED, products=Exact())
    routed = grad_of(lambda *a: fp8_train.routed_experts(a[0], index, *a[1:], exact), x, weight, gate_up, down)
    plain = grad_of(lambda *a: reference.routed_experts(a[0], index, *a[1:]), x, weight, gate_up, down)
    for got, wanted in zip((routed[0], *routed[1]), (plain[0], *plain[1]), strict=True):
        assert error(got, wanted) < 1e-6

    def swiglu(x: Tensor, gate_up: Tensor, down: Tensor) -> Tensor:
        gate, up = (x @ gate_up.T).chunk(2, dim=-1)
        return (F.silu(gate) * up) @ down.T

    one = x.view(2, 20, 24), gate_up[0], down[0]
    got, wanted = grad_of(lambda *a: fp8_train.swiglu(*a, exact), *one), grad_of(swiglu, *one)
    assert max(error(a, b) for a, b in zip((got[0], *got[1]), (wanted[0], *wanted[1]), strict=True)) < 1e-6


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_experts_in_fp8_fast_against_plain_and_near_fp32(dtype: torch.dtype) -> None:
    x, weight = normal(300, 130).to(dtype), normal(300, 2, seed=5).sigmoid()
    gate_up, down = 0.1 * normal(4, 140, 130, seed=1), 0.1 * normal(4, 130, 70, seed=2)
    index = torch.rand(300, 4, generator=torch.Generator().manual_seed(4)).topk(2, dim=1).indices
    y, found = {}, {}
    for name, products in (("fast", Emulated()), ("plain", Products()), ("exact", Exact())):
        numerics = replace(ROUTED, products=products)
        y[name], found[name] = grad_of(
            lambda *a, n=numerics: fp8_train.routed_experts(a[0], index, *a[1:], n), x, weight, gate_up, down
        )
    for fast, plain, exact in zip(*([y[n], *found[n]] for n in y), strict=True):
        # the order of summation occasionally changes a later rounding
        assert error(fast, plain) < 4e-3
        assert 0.02 < error(fast, exact) < 0.12


def test_a_feed_forward_rounds_where_the_paper_does() -> None:
    """Computes one expert step by step with ROUTED's numerics (V3 3.3.3)."""
    x, gate_up, down = normal(200, 140), 0.1 * normal(260, 140, seed=1), 0.1 * normal(140, 130, seed=2)
    y, (d_x, d_gate_up, d_down) = grad_of(lambda *a: fp8_train.swiglu(*a, ROUTED), x, gate_up, down)

    def across(t: Tensor, two: bool = False) -> Tensor:
        return fp8.dequantize_tiles(*fp8.quantize_tiles(t, two))

    def along(t: Tensor, two: bool = False) -> Tensor:
        return across(t.T.contiguous(), two)

    w_in, w_out = (fp8.dequantize(*fp8.quantize(w), torch.float32) for w in (gate_up, down))
    sent = across(x, True)
    hidden = sent @ w_in.T
    gate, up = hidden.chunk(2, dim=1)
    wanted_y = across(F.silu(gate) * up) @ w_out.T
    arrived = across(heavy(200, 140, seed=77), True)
    gate, up = across(hidden).chunk(2, dim=1)  # stored in FP8; its SwiGLU is recomputed
    s = gate.sigmoid()
    d_act = arrived @ w_out
    d_hidden = torch.cat([d_act * up * (s + gate * s * (1 - s)), d_act * gate * s], dim=1)
    wanted = (
        wanted_y,
        across(d_hidden) @ w_in,
        along(d_hidden) @ along(sent, True).T,
        along(arrived, True) @ along(gate * s * up).T,
    )
    for got, exact in zip((y, d_x, d_gate_up, d_down), wanted, strict=True):
        assert error(got, exact) < 2e-3  # the order of summation occasionally changes a rounding


def test_what_is_sent_is_quantized_once_with_powers_of_two() -> None:
    """Tokens are quantized before they are copied to experts, and gradients before down: both V3 3.3.3."""
    seen = Exact()
    numerics = replace(ROUTED, products=seen)
    index = torch.tensor([[0, 1]] * 10)
    grad_of(
        lambda *a: fp8_train.routed_experts(a[0], index, *a[1:], numerics),
        normal(10, 24),
        normal(10, 2),
        normal(2, 32, 24),
        normal(2, 24, 16),
    )
    tiles = [(two, shape) for kind, two, shape in seen.calls if kind == "tiles"]
    assert tiles == [
        (True, (10, 24)),
        (False, (20, 16)),
        (False, (20, 32)),  # x, down's input, SwiGLU's saved input
        (True, (20, 24)),
        (False, (20, 32)),  # gradients of down's output and of SwiGLU's input
    ]
    columns = {(two, shape) for kind, two, shape in seen.calls if kind == "columns"}
    assert columns == {(True, (10, 24)), (False, (10, 16)), (False, (10, 32))}


# the model


def tokens(rows: int, length: int, vocab: int) -> Tensor:
    return torch.randint(0, vocab, (rows, length + 2), generator=torch.Generator().manual_seed(6))


def test_exactly_the_papers_modules_are_in_fp8() -> None:
    """Not embedding, head, routers, norms, attention and the MTP projection (V3 3.3.1; BF16 in the release)."""
    seen = Exact()
    model = use_fp8(toy_model().train(), seen)
    backward(model, tokens(2, 12, 320), 0.3, 1e-4)
    names = {p.data_ptr(): n for n, p in model.named_parameters()}
    quantized = {names[w.data_ptr()] for w in seen.weights}
    attention = [f"attention.{n}.weight" for n in ("q_down", "q_up", "kv_down", "kv_up", "out")]
    experts = ["gate_up", "down", "shared.gate_up.weight", "shared.down.weight"]
    blocks = {"blocks.0": ["gate_up.weight", "down.weight"], "blocks.1": experts, "mtp.0.block": experts}
    assert quantized == {f"{b}.{n}" for b in blocks for n in attention} | {
        f"{b}.feed_forward.{n}" for b, found in blocks.items() for n in found
    }
    modules = dict(model.named_modules())
    holders = {n: m.experts.keywords if isinstance(m, MoE) else vars(m) for n, m in modules.items()}
    places = {n: replace(given["numerics"], products=None) for n, given in holders.items() if "numerics" in given}
    assert {n for n, place in places.items() if place == AFTER_ATTENTION} == {f"{b}.attention.out" for b in blocks}
    assert {n for n, place in places.items() if place == ROUTED} == {
        "blocks.1.feed_forward",
        "mtp.0.block.feed_forward",
    }
    high = ("embed", "head", "router", "norm", "project")
    assert all(any(h in n for h in high) for n in set(names.values()) - quantized)


SPARSE = replace(CONFIG, index_topk=4, index_n_heads=4, index_head_dim=8)


@pytest.mark.parametrize("config", [CONFIG, SPARSE, replace(V4, vocab_size=320)], ids=["v3", "v3.2", "v4"])
def test_without_rounding_the_model_is_the_fp32_model(config: ModelConfig) -> None:
    """V4's experts are clamped at 1, and its groups of heads have separate projections."""
    losses, gradients = [], []
    made = [Transformer(replace(config, initializer_range=0.15)).initialise(1).train() for _ in range(2)]
    for model in (made[0], use_fp8(made[1], Exact())):
        losses.append(backward(model, tokens(2, 12, 320), 0.3, 1e-4).main)
        gradients.append([p.grad for p in model.parameters() if p.grad is not None])
    torch.testing.assert_close(losses[0], losses[1])
    torch.testing.assert_close(gradients[0], gradients[1])


def test_a_geglu_is_in_fp8_as_linear_maps() -> None:
    """Gemma's feed-forward has no operator of its own."""
    config = replace(DENSE, activation="gelu_tanh", norms="both", norm_offset=True)
    seen = Exact()
    plain, model = (Transformer(config).initialise(1).train() for _ in range(2))
    use_fp8(model, seen)
    losses = [backward(each, tokens(2, 12, 320), 0.0, 0.0).main for each in (plain, model)]
    torch.testing.assert_close(*losses)
    names = {p.data_ptr(): n for n, p in model.named_parameters()}
    assert {names[w.data_ptr()] for w in seen.weights} == {
        n for n, p in model.named_parameters() if n.startswith("blocks") and p.ndim > 1
    }


@pytest.mark.parametrize("compute", [torch.float32, torch.bfloat16])
def test_the_models_gradient_in_fp8_is_near(compute: torch.dtype) -> None:
    """A whole model against the same model without FP8; the plain form agrees with the fast one.

    Every token uses all experts, since a changed choice would change gradients by more than rounding does.
    """
    config = replace(TINY, num_hidden_layers=2, initializer_range=0.05, n_routed_experts=2)
    found: dict[str, tuple[float, dict[str, Tensor]]] = {}
    for name, products in (("none", None), ("fast", Emulated()), ("plain", Products())):
        model = Transformer(config, compute).initialise(0).train()
        model = model if products is None else use_fp8(model, products)
        loss = backward(model, tokens(2, 64, 1024), 0.3, 1e-4).main.item()
        found[name] = loss, {n: p.grad for n, p in model.named_parameters() if p.grad is not None}
    assert found["fast"][0] == pytest.approx(found["none"][0], rel=2e-3)
    assert found["fast"][0] == pytest.approx(found["plain"][0], rel=2e-4)
    for name, exact in found["none"][1].items():
        fast, plain = found["fast"][1][name], found["plain"][1][name]
        assert error(fast, plain) < 0.1 and error(fast, exact) < 0.3, name


def test_training_in_fp8_repeats_itself_and_learns() -> None:
    def train() -> list[float]:
        model = use_fp8(Transformer(CONFIG, torch.bfloat16).initialise(3).train())
        optimiser, losses = torch.optim.AdamW(model.parameters(), lr=1e-2), []
        for _ in range(12):
            optimiser.zero_grad()
            losses.append(backward(model, tokens(4, 24, 320), 0.3, 1e-4).main.item())
            optimiser.step()
        return losses

    first = train()
    assert first == train() and first[-1] < first[0] - 1


def test_recomputation_changes_no_bit() -> None:
    gradients = []
    for policy in get_args(Policy):
        model = use_recompute(use_fp8(toy_model().train()), policy)
        backward(model, tokens(2, 12, 320), 0.3, 1e-4)
        gradients.append([p.grad for p in model.parameters()] + [r.load for r in model.routers()])
    for others in gradients[1:]:
        assert all(torch.equal(a, b) for a, b in zip(gradients[0], others, strict=True))  # type: ignore[arg-type]


def test_a_model_in_fp8_answers_and_has_the_plain_models_state() -> None:
    plain, model = toy_model(), use_fp8(toy_model())
    state = model.state_dict()
    assert state.keys() == plain.state_dict().keys()
    assert all(torch.equal(state[name], tensor) for name, tensor in plain.state_dict().items())
    prompt = list(range(5, 40))
    answer = Engine(model, ()).generate([prompt], SamplingParams(temperature=0.7, max_tokens=12), [1])[0]
    ids = torch.tensor([prompt + answer.tokens])
    with torch.no_grad():
        logp = (model.logits(model(ids)) / 0.7).log_softmax(dim=-1)[0, len(prompt) - 1 : -1]
    whole = logp.gather(1, ids[0, len(prompt) :, None])[:, 0]
    # the engine reads latents in absorbed form, whose two products are not those of a linear map
    assert (torch.tensor(answer.logprobs) - whole).abs().max() < 0.5


def test_masters_must_be_fp32() -> None:
    with pytest.raises(AssertionError, match="fp32 masters"):
        use_fp8(Transformer(CONFIG, torch.bfloat16, torch.bfloat16))


# Hopper


@pytest.mark.parametrize("shape", [(256, 384, 512), (100, 70, 300), (1, 3, 5)])
@pytest.mark.parametrize("in_blocks", [True, False])
def test_operands_are_laid_out_as_scaled_mm_wants_them(shape: tuple[int, int, int], in_blocks: bool) -> None:
    """Checks shapes and strides through torch's own checks, which run without a GPU; nothing is computed."""
    m, n, k = shape

    def empty(*size: int, dtype: torch.dtype = torch.float32) -> Tensor:
        return torch.empty(size, dtype=dtype, device="meta")

    a, b = (empty(rows, k, dtype=torch.float8_e4m3fn) for rows in (m, n))
    factors = [empty(rows, fp8.blocks(k)) for rows in (m, fp8.blocks(n) if in_blocks else n)]
    out = fp8_hopper.product(a, factors[0], b, factors[1])
    assert out.shape == (m, n) and out.dtype == torch.float32


@pytest.mark.parametrize("shape", [(256, 384, 512), (100, 70, 300), (1, 3, 5)])
def test_hopper_multiplies_as_the_plain_form(shape: tuple[int, int, int]) -> None:
    lacks = fp8_hopper.missing(torch.device("cuda" if torch.cuda.is_available() else "cpu"))
    if lacks is not None:
        pytest.skip(lacks)
    m, n, k = shape
    a, b = heavy(m, k).cuda(), heavy(n, k, seed=5).cuda()
    plain, fast = Products(), Products(fp8_hopper.product)
    for right in (plain.tiles(b), plain.blocks(b)):
        left = plain.tiles(a)
        wanted = plain.multiply(left, right)
        bound = plain.multiply((left[0].float().abs(), left[1]), (right[0].float().abs(), right[1]))
        # 13 bits after the leading one of at most 128 terms, cut off
        assert ((fast.multiply(left, right) - wanted).abs() <= bound * 2.0**-9).all()
