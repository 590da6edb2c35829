"""Measures this machine for planning: matrix products, memory, gradient exchange, and real training steps.

All ranks do the same at the same time, as in training, and the slowest counts. The cost per unit of each kind of work is
fitted to the steps of some small models, with nonnegative costs and least squared relative errors.
"""

import dataclasses
import datetime
import itertools
import math
import os
import platform
import resource
import statistics
import sys
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import psutil
import torch

from finback.kernels.probe import gemm_peak
from finback.model.config import TINY, ModelConfig
from finback.model.transformer import Transformer
from finback.parallel.mesh import World
from finback.planner import this_machine
from finback.planner.calibration_file import FORMAT
from finback.planner.this_machine import Shape
from finback.runs import processor
from finback.runs.files import write_json
from finback.stages import pretrain  # noqa: F401 - its libraries are part of a rank's process memory
from finback.train.batch import of_windows
from finback.train.loss import LossTerms, training_losses
from finback.train.optim import Adam, Gradients, Muon, clip_scale, is_matrix
from finback.train.precision import COMPUTE

GEMM_SIZES = (64, 128, 256, 512, 1024)
BUDGET = 35.0  # time for the models below, in seconds; the rest is skipped


def _dense(hidden: int, layers: int) -> ModelConfig:
    return ModelConfig(
        vocab_size=1024,
        hidden_size=hidden,
        num_hidden_layers=layers,
        num_attention_heads=hidden // 32,
        intermediate_size=3 * hidden,
        attention="gqa",
        num_key_value_heads=hidden // 64,
        head_dim=32,
        max_position_embeddings=1024,
    )


def _wide(hidden: int, layers: int, experts: int = 8, vocab: int = 1024) -> ModelConfig:
    return dataclasses.replace(
        TINY,
        hidden_size=hidden,
        num_hidden_layers=layers,
        num_attention_heads=hidden // 32,
        vocab_size=vocab,
        intermediate_size=2 * hidden,
        moe_intermediate_size=hidden // 2,
        q_lora_rank=3 * hidden // 4,
        kv_lora_rank=hidden // 2,
        n_routed_experts=experts,
    )


def references() -> list[tuple[ModelConfig, int, int]]:
    """(model, rows per rank, tokens per row): together they separate the kinds of work."""
    return [
        (TINY, 16, 128),
        (TINY, 2, 64),
        (TINY, 4, 512),
        (dataclasses.replace(TINY, n_routed_experts=32), 8, 128),
        (_wide(256, 3), 8, 128),
        (_dense(192, 4), 16, 128),
        (_wide(128, 2, vocab=8192), 8, 128),
        (TINY, 32, 64),
        (_dense(320, 2), 4, 256),
        (_wide(320, 3), 4, 128),
    ]


def calibrate(world: World, path: Path, say: Callable[[str], None]) -> dict[str, Any]:
    """Measures with all ranks of `world`; rank 0 writes the file. Takes under a minute."""
    begin = time.perf_counter()
    cpu = torch.device("cpu")
    process = _process_bytes(world)
    gemm = {
        name: {str(size): sum(world.gather(gemm_peak(dtype, cpu, size, 0.1))) for size in GEMM_SIZES}
        for name, dtype in COMPUTE.items()
    }
    say(f"products: {', '.join(f'{n} {max(v.values()) / 1e9:,.0f} GFLOP/s' for n, v in gemm.items())}")
    bandwidth = sum(world.gather(_bandwidth()))
    say(f"memory: {bandwidth / 1e9:,.1f} GB/s")
    steps = _steps(world, begin, say)
    measured = {"exchange": _exchange(world)}
    errors = {}
    for part, features in (("passes", this_machine.passes), ("update", this_machine.update)):
        for name in COMPUTE:
            rows = [s for s in steps if s["shape"].compute == name]
            work = [features(s["shape"]) for s in rows]
            taken, key = [s[part] for s in rows], f"{part}_{name}"
            measured[key] = fit(work, taken)
            errors[key] = _worst(work, taken, measured[key])
    result = {
        "format": FORMAT,
        "date": datetime.datetime.now(datetime.UTC).strftime("%Y-%m-%d %H:%M UTC"),
        "cpu": processor.name(),
        "gpu": torch.cuda.get_device_name() if torch.cuda.is_available() else None,
        "torch": torch.__version__,
        "python": platform.python_version(),
        "ranks": world.size,
        "load_average": os.getloadavg()[0] if hasattr(os, "getloadavg") else None,
        "memory_bytes": int(psutil.virtual_memory().total),
        "gemm_flops_per_second": gemm,
        "memory_bytes_per_second": bandwidth,
        "process_bytes": process,
        "models": len(steps) // len(COMPUTE),
        "models_planned": len(references()),
        "measured": measured,
        "largest_error_of_fit": errors,
        "training_flops_per_second": _training_rates(world, steps),
        "seconds": round(time.perf_counter() - begin, 1),
    }
    if world.rank == 0:
        path.parent.mkdir(parents=True, exist_ok=True)
        write_json(path, result)
    world.barrier()
    return result


def _bandwidth(size: int = 1 << 24, rounds: int = 5) -> float:
    """Bytes per second of a copy much larger than the caches, read and written."""
    a, b = torch.ones(size), torch.zeros(size)
    best = math.inf
    for _ in range(rounds):
        begin = time.perf_counter()
        b.copy_(a)
        best = min(best, time.perf_counter() - begin)
    return 2 * 4 * size / best


def _steps(world: World, begin: float, say: Callable[[str], None]) -> list[dict[str, Any]]:
    """Seconds of both parts of a training step of each reference model, on the slowest rank."""
    found: list[dict[str, Any]] = []
    for model, rows, length in references():
        for name in COMPUTE:
            if max(world.gather(time.perf_counter() - begin)) > BUDGET:
                say("out of time: skipping the remaining models")
                return found
            shape = Shape(model, rows, length, name, world.size)
            parts = time_step(shape, world, enough=BUDGET / (2 * len(COMPUTE) * len(references())))
            slowest = {part: max(world.gather(value)) for part, value in parts.items()}
            found.append({"shape": shape, **slowest})
    return found


def time_step(shape: Shape, world: World, rounds: int = 3, enough: float = math.inf) -> dict[str, float]:
    """Seconds of forward and backward together, and of the update, in a real step on this rank, without exchange.

    The first round does not count: it initializes libraries, and oneDNN compiles a bf16 product for each new shape. All rounds
    are equal, with learning rate 0, like later steps of a long run. After `enough` seconds one round suffices.
    """
    alone = _Share(world.rank, world.size)
    model = Transformer(shape.model, COMPUTE[shape.compute]).initialise(0).train()
    named = list(model.named_parameters())
    gradients = Gradients([p for _, p in named])
    muon = Muon([(n, p) for n, p in named if is_matrix(n, p)], alone, compute=COMPUTE[shape.compute])
    adam = Adam([(n, p) for n, p in named if not is_matrix(n, p)], (0.9, 0.95), 0.0)
    width = shape.length + 1 + shape.model.num_nextn_predict_layers
    generator = torch.Generator().manual_seed(0)
    tokens = torch.randint(shape.model.vocab_size, (shape.rows, width), generator=generator)
    depths = shape.model.num_nextn_predict_layers
    batch, terms = of_windows(tokens, depths), LossTerms([float(shape.rows * shape.length)] * (1 + depths))
    taken: dict[str, list[float]] = {"passes": [], "update": []}
    started = time.perf_counter()
    for round_ in range(rounds + 1):
        world.barrier()
        begin = time.perf_counter()
        gradients.zero()
        training_losses(model, batch, terms).total(terms).backward()  # type: ignore[no-untyped-call]
        middle = time.perf_counter()
        scale = clip_scale(gradients.summed(alone), 1.0)
        muon.step(0.0, scale)
        adam.step(0.0, scale)
        if round_:
            taken["passes"].append(middle - begin)
            taken["update"].append(time.perf_counter() - middle)
            if world.any(time.perf_counter() - started > enough):
                break
    return {part: _undisturbed(seconds) for part, seconds in taken.items()}


def _undisturbed(taken: Sequence[float]) -> float:
    """Median of the faster half: other programs may have slowed down the rest."""
    return statistics.median(sorted(taken)[: (len(taken) + 1) // 2])


class _Share(World):
    """A rank that does its share of the work but exchanges nothing."""

    def sum_(self, tensor: torch.Tensor) -> torch.Tensor:
        return tensor


def _exchange(world: World) -> dict[str, float]:
    """Seconds of an all-reduce: a fixed part, and a part per byte."""
    if world.size == 1:
        return {"fixed": 0.0, "byte": 0.0}
    times = {}
    for size in (1 << 10, 1 << 22):
        tensor = torch.ones(size)
        taken = []
        for _ in range(5):
            world.barrier()
            begin = time.perf_counter()
            world.sum_(tensor)
            taken.append(time.perf_counter() - begin)
        times[4 * size] = max(world.gather(_undisturbed(taken)))
    (small, quick), (large, slow) = sorted(times.items())
    per_byte = max(slow - quick, 0.0) / (large - small)
    return {"fixed": quick, "byte": per_byte}


def fit(work: Sequence[dict[str, float]], seconds: Sequence[float]) -> dict[str, float]:
    """Seconds per unit of each kind of work, nonnegative, minimizing squared relative errors."""
    names = list(work[0]) if work else []
    matrix = np.array([[row[name] / t for name in names] for row, t in zip(work, seconds, strict=True)])
    active = [i for i, name in enumerate(names) if matrix[:, i].any()]
    best, found = math.inf, dict[str, float]()
    # the best nonnegative solution is the least-squares solution for some subset of kinds, and there are few subsets
    for size in range(1, len(active) + 1):
        for chosen in itertools.combinations(active, size):
            scale = np.linalg.norm(matrix[:, chosen], axis=0)
            solution = np.linalg.lstsq(matrix[:, chosen] / scale, np.ones(len(matrix)), rcond=None)[0] / scale
            error = float(np.square(matrix[:, chosen] @ solution - 1).sum())
            if error < best and (solution >= 0).all():
                best, found = error, {names[i]: float(c) for i, c in zip(chosen, solution, strict=True)}
    return found


def _worst(work: Sequence[dict[str, float]], seconds: Sequence[float], costs: dict[str, float]) -> float:
    """Largest relative error of the fit on its own data."""
    predicted = [sum(costs.get(k, 0.0) * v for k, v in row.items()) for row in work]
    return max((abs(p / t - 1) for p, t in zip(predicted, seconds, strict=True)), default=0.0)


def _training_rates(world: World, steps: Sequence[dict[str, Any]]) -> dict[str, float]:
    """Counted FLOP/s of whole steps over all ranks, for the median model; for stages not planned step by step."""
    rates: dict[str, float] = {}
    for name in COMPUTE:
        chosen = [s for s in steps if s["shape"].compute == name]
        work = [this_machine.passes(s["shape"]) for s in chosen]
        speeds = (
            (w["products"] + w["attention"]) / (s["passes"] + s["update"]) for w, s in zip(work, chosen, strict=True)
        )
        rates[name] = world.size * statistics.median(speeds)
    return rates


def _process_bytes(world: World) -> float:
    """Memory of a rank's process besides model and batch: libraries, and what they allocate in a first training step.

    Measured as the peak of a fresh process minus the formula, so it must be measured first.
    """
    first = Shape(TINY, 16, 128, "fp32", world.size)
    time_step(first, world, rounds=2)
    return max(world.gather(peak_bytes() - this_machine.memory(first, 0.0).total))


def peak_bytes() -> float:
    """Peak memory of this process."""
    if sys.platform.startswith("linux"):  # getrusage would include the parent's
        fields = Path("/proc/self/status").read_text(encoding="utf-8").split()
        return float(fields[fields.index("VmHWM:") + 1]) * 1024
    unit = 1 if sys.platform == "darwin" else 1024
    return float(resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * unit)
