"""What this machine can do, measured: the GEMM peak that MFU is counted against."""

import time

import torch

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
