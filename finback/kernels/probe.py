"""What this machine can do, measured: the GEMM peak that MFU is counted against, and the quicker form of experts."""

import time
from collections.abc import Callable, Mapping
from functools import partial

import torch

from finback.kernels import moe_gemm
from finback.kernels.moe_gemm import Experts

LEAST = 8  # products


def gemm_peak(dtype: torch.dtype, device: torch.device, size: int = 768, budget: float = 0.15) -> float:
    """FLOP/s of the best of many square products with this process's threads."""
    a, b = (torch.randn(size, size, device=device).to(dtype) for _ in range(2))
    best, started, done = float("inf"), time.perf_counter(), 0
    # a program that holds the cores must not leave the first, slow product as the only one
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
    """Seconds of forward and backward of both forms of routed experts; the fastest of six turns each.

    shape is (experts, hidden, width); the choices are spread evenly.
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
    """Seconds of each work in the fastest of six turns, so that another program's burst hits all of them."""
    best = dict.fromkeys(works, float("inf"))
    for _ in range(6):
        for name, work in works.items():
            begin = time.perf_counter()
            work()
            best[name] = min(best[name], time.perf_counter() - begin)
    return best
