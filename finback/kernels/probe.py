"""Measures this machine: the GEMM peak, which MFU is relative to, and the faster form of routed experts."""

import time
from collections.abc import Callable, Mapping
from functools import partial

import torch

from finback.kernels import moe_gemm
from finback.kernels.moe_gemm import Experts

LEAST = 8  # fewest products to time


def gemm_peak(dtype: torch.dtype, device: torch.device, size: int = 768, budget: float = 0.15) -> float:
    """FLOP/s of the fastest of many products of (size, size) matrices, with this process's threads; `budget` in seconds."""
    a, b = (torch.randn(size, size, device=device).to(dtype) for _ in range(2))
    best, started, done = float("inf"), time.perf_counter(), 0
    # on a busy machine the first product, which is slow, may use up the budget: LEAST products run in any case
    while done < LEAST or time.perf_counter() - started < budget:
        done += 1
        begin = time.perf_counter()
        torch.mm(a, b)
        if device.type == "cuda":
            torch.cuda.synchronize()
        best = min(best, time.perf_counter() - begin)
    return 2 * size**3 / best


def experts_seconds(
    tokens: int, choices: int, shape: tuple[int, int, int], dtype: torch.dtype, device: torch.device
) -> dict[str, float]:
    """Seconds of one forward and backward pass by each form of routed experts, the fastest of six.

    shape is (experts, hidden, width); tokens choose experts uniformly.
    """
    experts, hidden, width = shape
    x = torch.randn(tokens, hidden, device=device).to(dtype).requires_grad_()
    index = torch.rand(tokens, experts, device=device).topk(choices).indices
    weight = torch.rand(tokens, choices, device=device)
    sizes = (experts, 2 * width, hidden), (experts, hidden, width)
    gate_up, down = (torch.randn(size, device=device).requires_grad_() for size in sizes)

    def turn(form: Experts) -> None:
        form(x, index, weight, gate_up, down).sum().backward()  # type: ignore[no-untyped-call]
        gate_up.grad[0, 0, 0].item()  # type: ignore[index]  # reading a value waits for the GPU

    forms = {"loop": moe_gemm.routed_experts, "grouped_mm": moe_gemm.grouped_experts}
    return fastest({name: partial(turn, form) for name, form in forms.items()})


def fastest(works: Mapping[str, Callable[[], object]]) -> dict[str, float]:
    """Seconds of the fastest of six runs of each work. Works alternate, so that load from other programs affects all of them."""
    best = dict.fromkeys(works, float("inf"))
    for _ in range(6):
        for name, work in works.items():
            begin = time.perf_counter()
            work()
            best[name] = min(best[name], time.perf_counter() - begin)
    return best
