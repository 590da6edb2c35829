"""How often finback's intervals cover the true value: scores of one model, and differences of two, on simulated questions.

A question's rate of right answers is drawn from a beta distribution of the given spread, its samples from that rate, so
samples are clustered; a share of the questions is as hard for the second model as for the first. The former intervals
(Wilson's formula and a bootstrap) are measured for comparison. One thread, some minutes: python benchmarks/coverage.py
"""

import argparse
import itertools
import math
import time
from collections.abc import Callable, Iterator
from dataclasses import asdict, dataclass
from pathlib import Path
from statistics import NormalDist
from typing import Any

import numpy as np

from finback.suites.intervals import LEVEL, Limits, limits_of_difference, limits_of_mean, student

QUESTIONS = (5, 10, 30, 100, 500)
SAMPLES = (1, 4, 64)
RATES = (0.02, 0.05, 0.1, 0.2, 0.5, 0.98)
DIFFERENCES = (0, 0.02, 0.1, 0.3, 0.6, 0.9, 1.0)
# alpha + beta of the questions' rates: 0: each is 0 or 1; inf: all are equal; "rare": a few questions are always right
SPREADS: tuple[float | str, ...] = (0, 0.5, 1, 2, 4, 20, math.inf, "rare")
FEWER: tuple[float | str, ...] = (0, 1, 10, math.inf, "rare")
ALIKE = (0, 0.9, 1)  # share of the questions that are as hard for the second as for the first
POOL = 20_000  # rates to draw from
Z = NormalDist().inv_cdf((1 + LEVEL) / 2)


@dataclass(frozen=True)
class Cell:
    """One setting of the simulation. `two` is None for a single model."""

    n: int
    samples: int
    one: float
    two: float | None
    spread: float | str
    alike: float = 0
    # answers score any number in 0..1, not only 0 or 1
    is_graded: bool = False


@dataclass(frozen=True)
class Found:
    """Coverage in all repetitions, and in those whose scores or differences are not all equal; mean widths."""

    coverage: float
    varied: float | None
    # share of repetitions in which all scores or differences are equal
    constant: float
    width: float
    narrowest: float
    before: float
    width_before: float


def single_cells() -> Iterator[Cell]:
    for n, samples, rate in itertools.product(QUESTIONS, SAMPLES, RATES):
        for spread in SPREADS if samples > 1 else (math.inf,):
            yield Cell(n, samples, rate, None, spread)
        for spread in (1, 10) if samples < 64 else ():
            yield Cell(n, samples, rate, None, spread, is_graded=True)


def protocol_cells() -> Iterator[Cell]:
    """R1's protocol: 30 questions, 64 samples of each."""
    for rate, spread in itertools.product((0.02, 0.98), SPREADS):
        yield Cell(30, 64, rate, None, spread)


def pair_cells() -> Iterator[Cell]:
    for n, samples, difference in itertools.product(QUESTIONS, SAMPLES, DIFFERENCES):
        if (n, samples) == (500, 4):  # lies between two others, and is the slowest
            continue
        middle = (0.5 + difference / 2, 0.5 - difference / 2)
        for one, two in {middle, (0.02 + difference, 0.02), (0.98, 0.98 - difference)}:
            if not 0 <= two <= one <= 1:
                continue
            for spread, alike in itertools.product(FEWER if samples > 1 else (0,), ALIKE):
                if spread != math.inf or alike == 0:
                    yield Cell(n, samples, one, two, spread, alike)
            if samples < 64:
                yield Cell(n, samples, one, two, 10, 0.9, is_graded=True)


def rates(rate: float, spread: float | str, rng: np.random.Generator) -> np.ndarray:
    """Questions' rates in order [POOL]; their mean is the true score."""
    if rate in (0, 1) or spread == math.inf:
        return np.full(POOL, rate)
    if spread == 0:
        return np.arange(POOL) >= round((1 - rate) * POOL)
    if spread == "rare":
        rest = min(rate, 1 - rate) / 2
        few = np.where(np.arange(POOL) >= round((1 - rest / (1 - rest)) * POOL), 1.0, rest)
        return few if rate <= 0.5 else 1 - few[::-1]
    return np.sort(rng.beta(rate * float(spread), (1 - rate) * float(spread), POOL))


def scores(cell: Cell, rate: np.ndarray, rng: np.random.Generator) -> np.ndarray:
    """Each question's mean over samples, for its rate."""
    if not cell.is_graded:
        return rng.binomial(cell.samples, rate) / cell.samples
    # a beta distribution has no parameter of 0
    up, down = (np.maximum(2 * share, 1e-9)[..., None] for share in (rate, 1 - rate))
    drawn: np.ndarray = rng.beta(up, down, size=(*rate.shape, cell.samples))
    return drawn.mean(axis=-1)


def draw(cell: Cell, repetitions: int, rng: np.random.Generator) -> tuple[np.ndarray, float]:
    """Scores, or differences of two models' scores [repetitions, questions], and their true mean."""
    shape = repetitions, cell.n
    place = rng.integers(0, POOL, shape)
    one = rates(cell.one, cell.spread, rng)
    if cell.two is None:
        return scores(cell, one[place], rng), float(one.mean())
    two = rates(cell.two, cell.spread, rng)
    other = np.where(rng.random(shape) < cell.alike, place, rng.integers(0, POOL, shape))
    values = scores(cell, one[place], rng) - scores(cell, two[other], rng)
    return values, float(one.mean() - two.mean())


def measure(cell: Cell, repetitions: int, seed: int, compared: int = 100) -> Found:
    """Simulates a cell repeatedly. The former intervals are computed for the first `compared` repetitions only."""
    rng = np.random.default_rng(seed)
    values, truth = draw(cell, repetitions, rng)
    formula: Callable[[np.ndarray], Limits] = limits_of_mean if cell.two is None else limits_of_difference
    low, high = formula(values)
    holds = (low <= truth + 1e-9) & (truth <= high + 1e-9)
    varied = np.ptp(values, axis=-1) > 0
    low_before, high_before = before(values[:compared], cell.two is None, rng)
    held = (low_before <= truth + 1e-9) & (truth <= high_before + 1e-9)
    return Found(
        float(holds.mean()),
        float(holds[varied].mean()) if varied.any() else None,
        float(1 - varied.mean()),
        float((high - low).mean()),
        float((high - low).min()),
        float(held.mean()),
        float((high_before - low_before).mean()),
    )


def enumerate_pairs(n: int) -> dict[str, float]:
    """Exact coverage if each of two models answers n questions once, over all shares of gained and lost questions.

    Every pair of counts of gained and lost questions has a probability, and its interval covers the truth or not. `single`: one model.
    """
    counts = np.array([(gained, lost) for gained in range(n + 1) for lost in range(n + 1 - gained)])
    place = np.arange(n)
    is_gained, is_either = place < counts[:, :1], place < counts.sum(axis=1, keepdims=True)
    low, high = limits_of_difference(np.where(is_gained, 1.0, np.where(is_either, -1.0, 0.0)))
    factorial = np.array([math.lgamma(i + 1) for i in range(n + 1)])
    gained, lost = counts.T
    ways = factorial[n] - factorial[gained] - factorial[lost] - factorial[n - gained - lost]
    shares = np.concatenate([[0.002, 0.005, 0.01], np.arange(0.02, 0.99, 0.02), [0.99, 0.995]])
    covered, single = [], []
    for p in shares:
        for q in shares[shares <= 1 - p + 1e-9]:
            alike = max(1 - p - q, 1e-12)
            chance = np.exp(ways + gained * math.log(p) + lost * math.log(q) + (n - gained - lost) * math.log(alike))
            covered.append(chance[(low <= p - q) & (p - q <= high)].sum())
    right = np.arange(n + 1)
    low, high = limits_of_mean((place < right[:, None]).astype(float))
    for p in np.linspace(0.002, 0.998, 499):
        chance = np.exp(factorial[n] - factorial - factorial[::-1] + right * math.log(p) + (n - right) * math.log1p(-p))
        single.append(chance[(low <= p) & (p <= high)].sum())
    return {
        "mean": float(np.mean(covered)),
        "min": float(min(covered)),
        "mean_single": float(np.mean(single)),
        "min_single": float(min(single)),
    }


def before(values: np.ndarray, is_single: bool, rng: np.random.Generator, resamples: int = 1000) -> Limits:
    """The intervals that finback computed formerly: percentiles of a bootstrap over questions, Wilson's formula near 0 and 1."""
    n, mean, variance = values.shape[1], values.mean(axis=1), values.var(axis=1, ddof=1)
    t = student((1 + LEVEL) / 2, n - 1)
    if n > 30:  # with many questions the percentiles equal Student's
        low, high = mean - t * np.sqrt(variance / n), mean + t * np.sqrt(variance / n)
    else:
        tail = NormalDist().cdf(-math.sqrt(n / (n - 1)) * t)
        counts = rng.multinomial(n, np.full(n, 1 / n), resamples)
        low, high = np.quantile(values @ counts.T / n, [tail, 1 - tail], axis=1)
    if not is_single:
        return np.maximum(low, -1), np.minimum(high, 1)
    worth = np.where(variance > 0, (Z / t) ** 2 * mean * (1 - mean) / np.maximum(variance / n, 1e-300), n)
    worth = np.maximum(n, worth)
    centre = mean + Z * Z / (2 * worth)
    spread = Z * np.sqrt(mean * (1 - mean) / worth + Z * Z / (4 * worth**2))
    is_extreme = n * np.minimum(mean, 1 - mean) < 10
    low = np.where(is_extreme, (centre - spread) / (1 + Z * Z / worth), low)
    high = np.where(is_extreme, (centre + spread) / (1 + Z * Z / worth), high)
    return np.maximum(low, 0), np.minimum(high, 1)


def summary(found: list[tuple[Cell, Found]]) -> dict[str, Any]:
    """Mean and minimum over the cells. Cells whose scores are nearly always equal are left out of `*_where_scores_vary`."""
    coverage = [f.coverage for _, f in found]
    varied = [f.varied for _, f in found if f.varied is not None and f.constant < 0.5]
    ratios = [f.width / f.width_before for _, f in found if f.width_before > 0]
    return {
        "cells": len(found),
        "mean": float(np.mean(coverage)),
        "min": min(coverage),
        "mean_where_scores_vary": float(np.mean(varied)),
        "min_where_scores_vary": min(varied),
        "mean_before": float(np.mean([f.before for _, f in found])),
        "min_before": min(f.before for _, f in found),
        "narrowest": min(f.narrowest for _, f in found),
        "width": float(np.mean([f.width for _, f in found])),
        "width_before": float(np.mean([f.width_before for _, f in found])),
        "width_ratio_median": float(np.median(ratios)) if ratios else None,
    }


def grid(cells: Iterator[Cell], repetitions: int, seed: int) -> dict[str, Any]:
    """All cells of a grid, summarized as a whole and by questions and samples, with the worst cells."""
    found = [(cell, measure(cell, repetitions, seed + i)) for i, cell in enumerate(cells)]
    by: dict[str, list[tuple[Cell, Found]]] = {}
    for cell, f in found:
        by.setdefault(f"{cell.n} x {cell.samples}", []).append((cell, f))
    worst = sorted(found, key=lambda pair: pair[1].coverage)[:10]
    return {
        "all": summary(found),
        "by_questions_and_samples": {name: summary(part) for name, part in by.items()},
        "worst": [row(cell, f) for cell, f in worst],
        "found": found,
    }


def row(cell: Cell, found: Found) -> dict[str, Any]:
    """One cell as JSON values."""
    return asdict(cell) | {"spread": str(cell.spread)} | asdict(found)


def table(parts: dict[str, dict[str, Any]]) -> str:
    """Summaries as Markdown."""
    head = "| questions x samples | coverage: mean, min | before | width | before |\n|---|---|---|---|---|"
    lines = [
        f"| {name} | {s['mean']:.1%}, {s['min']:.1%} | {s['mean_before']:.1%}, {s['min_before']:.0%} | {s['width']:.3f} | {s['width_before']:.3f} |"
        for name, s in parts.items()
    ]
    return "\n".join([head, *lines])


def main() -> None:
    # imports torch, which the simulation and its test do not need
    from record import header, write

    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--repetitions", type=int, default=500)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--out", type=Path, default=Path(__file__).parent / "results/coverage.json")
    arguments = parser.parse_args()
    results = header("coverage", {"repetitions": arguments.repetitions, "seed": arguments.seed, "level": LEVEL})
    results["one_answer_each"] = {str(n): enumerate_pairs(n) for n in (*range(5, 21), 30, 60, 100)}
    for n, exact in results["one_answer_each"].items():
        print(f"{n} questions, one answer each, exactly: mean {exact['mean']:.1%}, min {exact['min']:.1%}")
    for place, (name, cells) in enumerate(
        {"r1_protocol": protocol_cells(), "scores": single_cells(), "differences": pair_cells()}.items()
    ):
        began = time.perf_counter()
        results[name] = grid(cells, arguments.repetitions, arguments.seed + place * 1_000_000)
        found = results[name].pop("found")
        if name == "r1_protocol":
            results[name]["cells"] = [row(*each) for each in found]
        print(
            f"\n{name}, {time.perf_counter() - began:.0f} s\n\n{table({'all': results[name]['all'], **results[name]['by_questions_and_samples']})}"
        )
    write(results, arguments.out)


if __name__ == "__main__":
    main()
