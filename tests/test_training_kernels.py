"""The C++ kernels between a training step's matrix products against their plain twins, forward and backward."""

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor

from finback.kernels import moe_gemm, native
from finback.kernels.attention import causal_attention
from finback.kernels.documents import masked
from finback.kernels.heads import rotate_heads, split_heads
from finback.kernels.norm import add_rms_norm, rms_norm
from finback.kernels.streams import mix, sinkhorn
from finback.kernels.swiglu import swiglu
from finback.model.config import TINY
from finback.model.logprobs import token_logprobs
from finback.model.transformer import Transformer
from finback.train.loss import cross_entropy

pytestmark = pytest.mark.skipif(native.library() is None, reason="no C++ compiler")
Outputs = Tensor | tuple[Tensor, ...]
IDS = torch.tensor([[0, 0, 0, 1, 1, 1, 1, 2, 2], [0] * 9])


def random(*shape: int) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(len(shape) + sum(shape)))


def angles(pairs: int) -> tuple[Tensor, Tensor]:
    turns = random(2, 9, pairs)
    return turns.cos(), turns.sin()


def routed(x: Tensor, weight: Tensor, gate_up: Tensor, down: Tensor) -> Tensor:
    index = torch.tensor([[i % 5, (2 * i + 1) % 5] for i in range(len(x))])
    index[:, 1] = torch.where(index[:, 0] == index[:, 1], (index[:, 1] + 1) % 5, index[:, 1])
    return moe_gemm.routed_experts(x, index, weight.float(), gate_up, down)


def logprobs(hidden: Tensor, head: Tensor) -> Tensor:
    model = Transformer(TINY)
    del model.head.weight
    model.head.weight = head
    logp, entropy = token_logprobs(model, hidden, torch.arange(len(hidden)) % 7, temperature=0.7)
    return torch.stack([logp, entropy.detach()])


def learnt(hidden: Tensor, head: Tensor) -> Tensor:
    labels = torch.arange(len(hidden)) % 11
    labels[::4] = -100
    return cross_entropy(hidden, head, labels)


CASES: dict[str, tuple[Callable[..., Outputs], list[Tensor]]] = {
    "norm": (lambda x, g: rms_norm(x, g, 1e-6), [random(3, 70, 33), random(33)]),
    "add_norm": (lambda x, y, g: add_rms_norm(x, y, g, 1e-6), [random(5, 60, 40), random(5, 60, 40) + 1, random(40)]),
    "add_norm, the sum alone": (
        lambda x, y, g: add_rms_norm(x, y, g, 1e-6)[0],
        [random(7, 8), random(7, 8), random(8)],
    ),
    "swiglu": (swiglu, [random(50, 2, 38)]),
    "swiglu, clamped": (lambda x: swiglu(x, 0.7), [random(50, 2, 38)]),
    "swiglu, rows transposed": (lambda x: swiglu(x.transpose(0, 1)), [random(50, 2, 38)]),
    "experts": (routed, [random(41, 24), random(41, 2).abs(), random(5, 26, 24), random(5, 24, 13)]),
    "attention": (
        lambda q, k, v: causal_attention(q, k, v, 0.3),
        [random(2, 3, 9, 20), random(2, 3, 9, 20) + 1, random(2, 3, 9, 16)],
    ),
    "attention, masked": (
        lambda q, k, v: causal_attention(q, k, v, 0.3, masked(IDS)),
        [random(2, 3, 9, 20), random(2, 3, 9, 20) + 1, random(2, 3, 9, 16)],
    ),
    "attention, heads that share keys": (
        lambda q, k, v: causal_attention(q, k, v, 0.3),
        [random(2, 6, 70, 20), random(2, 3, 70, 20) + 1, random(2, 3, 70, 16)],
    ),
    "rotate_heads": (lambda q: rotate_heads(q, *angles(3), True), [random(2, 9, 4, 14)]),
    "rotate_heads by halves": (lambda q: rotate_heads(q, *(t[:1] for t in angles(3)), False), [random(2, 9, 4, 6)]),
    "split_heads": (lambda kv, k: split_heads(kv, k, 8), [random(2, 9, 4, 13), random(2, 9, 6)]),
    "sinkhorn": (lambda x: sinkhorn(2 * x.float(), 20, 1e-6), [random(3, 7, 4, 4)]),
    "sinkhorn, one step": (lambda x: sinkhorn(x.float(), 1, 1e-6), [random(2, 17, 3, 3)]),
    "streams mixed": (
        lambda b, x, c, f: mix(b.float(), x, c.float(), f),
        [random(2, 9, 4, 4), random(2, 9, 4, 21), random(2, 9, 4), random(2, 9, 21)],
    ),
    "streams merged": (lambda a, x: mix(a.float(), x), [random(2, 9, 4, 1), random(2, 9, 4, 21)]),
    "cross-entropy": (learnt, [random(300, 16), random(50, 16)]),
    "log-probabilities": (logprobs, [random(30, 16), random(50, 16)]),
}


# whose sums the kernels take themselves, without products by a library
SUMMED = ("norm", "add_norm", "swiglu", "rotate_heads", "split_heads", "sinkhorn", "streams")


def values(name: str, dtype: torch.dtype) -> list[Tensor]:
    """Outputs, and gradients of a weighted sum of them."""
    function, given = CASES[name]
    inputs = [torch.nn.Parameter(t.to(dtype)) for t in given]
    made = function(*inputs)
    outputs = [made] if isinstance(made, Tensor) else list(made)
    total: Any = sum((out.float() * random(*out.shape)).sum() for out in outputs if out.requires_grad)
    used = [t for t in inputs if t.ndim]
    gradients = torch.autograd.grad(total, used, allow_unused=True)
    return [t.detach().float() for t in (*outputs, *gradients) if t is not None]


@pytest.mark.parametrize("name", CASES)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_kernels_are_their_plain_twins(name: str, dtype: torch.dtype, monkeypatch: pytest.MonkeyPatch) -> None:
    fast = values(name, dtype)
    monkeypatch.setattr(native, "library", lambda: None)
    plain, exact = values(name, dtype), values(name, torch.float32)
    assert len(fast) == len(plain)
    for ours, theirs, true in zip(fast, plain, exact, strict=True):
        if dtype == torch.float32:
            torch.testing.assert_close(ours, theirs, rtol=1e-5, atol=1e-5)
        else:  # at most as far from fp32 as the plain form, which rounds more often
            assert (ours - true).norm() <= 1.1 * (theirs - true).norm() + 1e-3 * true.norm()


def test_sums_are_the_same_whatever_the_number_of_threads() -> None:
    made, threads = [], torch.get_num_threads()
    try:
        for count in (1, 2):
            torch.set_num_threads(count)
            made.append([values(name, torch.float32) for name in CASES if name.split()[0] in SUMMED])
    finally:
        torch.set_num_threads(threads)
    for one, two in zip(*made, strict=True):
        assert all(torch.equal(a, b) for a, b in zip(one, two, strict=True))


def test_a_loss_that_is_not_finite_is_seen() -> None:
    hidden = random(8, 16)
    hidden[3, 2] = float("nan")
    assert learnt(hidden, random(50, 16)).isnan()
    assert logprobs(hidden, torch.nn.Parameter(random(50, 16)))[0].isnan().any()
