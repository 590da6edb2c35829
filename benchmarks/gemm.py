"""Contestants that only multiply matrices: the peak of each layout of processes and threads, in the same run."""

from collections.abc import Sequence
from multiprocessing.connection import Connection
from typing import Any

import torch
from driver import CORES, Contestant, Settings
from record import spread

from finback.kernels.probe import gemm_peak

DTYPES = {"fp32": torch.float32, "bf16": torch.bfloat16}
LAYOUTS = list(dict.fromkeys([(1, 1), (1, CORES), (CORES, 1)]))  # (ranks, threads of each)


def worker(pipe: Connection, settings: Settings) -> None:
    """A contestant that measures matrix products: FLOP/s of this process for each precision."""
    pipe.send({})
    while True:
        pipe.recv()
        pipe.send({name: gemm_peak(dtype, torch.device("cpu")) for name, dtype in DTYPES.items()})


def contestants() -> list[Contestant]:
    """The GEMM probe in each layout in which something is timed."""
    return [Contestant(f"gemm {r}x{t}", worker, {}, ranks=r, threads=t) for r, t in LAYOUTS]


def take(contestant: Contestant, seconds: float, replies: list[Any]) -> None:
    """Add the ranks' peaks up: they multiplied at the same time."""
    for name in DTYPES:
        contestant.record.setdefault(name, []).append(sum(reply[name] for reply in replies))


def results(taken: Sequence[Contestant]) -> dict[str, dict[str, dict[str, float]]]:
    """Layout -> precision -> spread of FLOP/s."""
    return {c.layout: {name: spread(c.record[name]) for name in DTYPES} for c in taken}
