"""Intervals of scores and of differences: published and worked examples, a second method, and simulated coverage."""

import importlib.util
import json
import math
import sys
from itertools import product
from pathlib import Path
from types import ModuleType

import numpy as np
import pytest

from finback.comparison import harness
from finback.suites.intervals import limits_of_difference, limits_of_mean, limits_of_moments, mid_p, student
from finback.suites.statistics import interval, paired

ROOT = Path(__file__).parent.parent


def limits(gaps: list[float], level: float = 0.95) -> tuple[float, float]:
    low, high = limits_of_difference(np.array(gaps, dtype=float), level)
    return float(low), float(high)


def shares(right: list[float], n: list[float], level: float = 0.95) -> list[tuple[float, float]]:
    return list(zip(*mid_p(np.array(right, dtype=float), np.array(n, dtype=float), level), strict=True))


def test_mid_p_against_the_published_table() -> None:
    # Newcombe 1998, Two-sided confidence intervals for the single proportion, table I, method 6
    table = {(81, 263): (0.2544, 0.3658), (15, 148): (0.0601, 0.1581), (0, 20): (0, 0.1391), (1, 29): (0.0017, 0.1585)}
    found = shares([right for right, _ in table], [n for _, n in table])
    for each, published in zip(found, table.values(), strict=True):
        assert each == pytest.approx(published, abs=5e-5)


def test_mid_p_by_hand() -> None:
    # 1 of 2: P(2) + P(1) / 2 = p^2 + p (1 - p) = p. 1 of 1: p / 2 is 0.025. 2 of 3: p^3 + 3 p^2 (1 - p) / 2 is 0.025
    half, one, two = shares([1, 1, 2], [2, 1, 3])
    assert half == pytest.approx((0.025, 0.975)) and one == pytest.approx((0.05, 1))
    assert 1.5 * two[0] ** 2 - 0.5 * two[0] ** 3 == pytest.approx(0.025)
    for n in (5, 30, 1000):
        assert shares([0, n], [n, n])[0] == pytest.approx((0, 1 - 0.05 ** (1 / n)))
        assert shares([0, n], [n, n])[1] == pytest.approx((0.05 ** (1 / n), 1))
    # with many answers it equals that of the normal distribution
    assert shares([16_000], [32_000])[0] == pytest.approx(
        (0.5 - 1.96 / 2 / 32_000**0.5, 0.5 + 1.96 / 2 / 32_000**0.5), abs=1e-5
    )
    assert shares([1], [2], level=0.8)[0] == pytest.approx((0.1, 0.9))


@pytest.mark.slow  # importing it takes longer than all the others
def test_mid_p_of_parts_of_answers_against_scipy() -> None:
    special = pytest.importorskip("scipy.special")
    right = np.array([1e-3, 0.4, 1, 3.3, 14.7, 640, 63_000.5])
    n = np.array([30, 30, 2.5, 5, 120, 1920, 64_000])
    low, high = mid_p(right, n)
    for x, share, tail in ((right, low, 0.025), (n - right, 1 - high, 0.025)):
        halves = special.betainc(x, n - x + 1, share) + special.betainc(x + 1, n - x, share)
        assert halves[share > 1e-300] / 2 == pytest.approx(tail, rel=1e-6)


def test_student_against_tables() -> None:
    table = {1: 12.706, 2: 4.303, 3: 3.182, 5: 2.571, 10: 2.228, 30: 2.042, 120: 1.980}
    for degrees, quantile in table.items():
        assert student(0.975, degrees) == pytest.approx(quantile, rel=0.004)


def test_scores_of_0_and_1_are_a_share() -> None:
    for right, n in ((0, 5), (5, 5), (3, 10), (29, 30), (250, 500)):
        assert interval([1.0] * right + [0.0] * (n - right)) == pytest.approx(shares([right], [n])[0])


def test_a_difference_by_hand() -> None:
    # no gains and no losses seen: either may still happen, at the rate that 0 of 5 allows
    once = 1 - 0.05 ** (1 / 5)
    assert limits([0] * 5) == pytest.approx((-once, once))
    # always gained: l = 0.05^(1/6) of 6 of 6 and u = 1 - l of 0 of 6, which would exclude each other's increase: 1 - (1 - l) - u
    sixth = 1 - 0.05 ** (1 / 6)
    assert limits([1] * 6) == pytest.approx((1 - 2 * sixth, 1))
    # 5 gained, 15 alike: 0.09786 to 0.47022 of 5 of 20 and 0 to 0.13911 of 0 of 20; the correlation of 0.09786 and 0.13911 is
    # -sqrt(0.09786 x 0.13911 / (0.90214 x 0.86089)) = -0.13239
    low = 0.25 - math.sqrt(0.15214**2 + 0.13911**2 + 2 * 0.13239 * 0.15214 * 0.13911)
    assert limits([1] * 5 + [0] * 15) == pytest.approx((low, 0.47022), abs=2e-5)
    # half gained, half lost: both 1 of 2, 0.025 to 0.975, with correlation -1: the distances add up
    assert limits([1, -1]) == pytest.approx((-0.95, 0.95))


def tango(only_one: int, only_other: int, n: int) -> tuple[float, float]:
    """Tango's score interval (1998) of a difference of paired proportions, by bisection."""

    def statistic(delta: float) -> float:
        linear = -only_one - only_other + (2 * n - only_one + only_other) * delta
        root = math.sqrt(linear**2 + 8 * n * only_other * delta * (1 - delta))
        other = (root - linear) / (4 * n)
        return (only_one - only_other - n * delta) / math.sqrt(max(n * (2 * other + delta * (1 - delta)), 1e-12))

    def where(value: float) -> float:
        low, high = -1.0, 1.0
        for _ in range(60):
            middle = (low + high) / 2
            low, high = (middle, high) if statistic(middle) > value else (low, middle)
        return low

    return where(1.959964), where(-1.959964)


@pytest.mark.parametrize(("one", "other", "n"), [(40, 20, 160), (0, 0, 30), (9, 2, 41), (3, 0, 100), (60, 10, 500)])
def test_differences_beside_the_score_interval_of_tango(one: int, other: int, n: int) -> None:
    found, score = limits([1] * one + [-1] * other + [0] * (n - one - other)), tango(one, other, n)
    assert found == pytest.approx(score, abs=0.15 * (score[1] - score[0]))


def test_no_interval_is_without_width() -> None:
    steps = (-1, -0.5, 0, 0.25, 1)
    for n in range(1, 5):
        gaps = np.array(list(product(steps, repeat=n)))
        low, high = limits_of_difference(gaps)
        mean = gaps.mean(axis=1)
        assert (high - low).min() > 0.3 and (low <= mean).all() and (mean <= high).all()
        assert (low >= -1).all() and (high <= 1).all()
        low, high = limits_of_mean(abs(gaps))
        assert (high - low).min() > 0.3 and (low >= 0).all() and (high <= 1).all()
    for n in (1, 5, 30, 500, 5000):
        for value in (0, 1, 0.5, 1 / 64, 1 - 1 / 64):
            low, high = interval([value] * n)
            assert low <= value <= high and high - low > 0.0005
            same = paired([value] * n, [value] * n, 0)
            assert same.mean == 0 and same.low == -same.high < -0.0005 and not same.is_significant


def test_both_ways_round_are_alike() -> None:
    rng = np.random.default_rng(1)
    values, gaps = rng.beta(0.3, 2, (20, 30)), rng.uniform(-1, 1, (20, 30)) ** 5
    low, high = limits_of_mean(values)
    other = limits_of_mean(1 - values)
    assert other == (pytest.approx(1 - high), pytest.approx(1 - low))
    low, high = limits_of_difference(gaps)
    assert limits_of_difference(-gaps) == (pytest.approx(-high), pytest.approx(-low))
    assert limits_of_difference(gaps[3]) == (pytest.approx(low[3]), pytest.approx(high[3]))


def test_more_samples_help_as_far_as_questions_are_alike() -> None:
    rng = np.random.default_rng(2)
    alike, unlike = rng.binomial(64, 0.5, 100) / 64, rng.binomial(64, rng.integers(0, 2, 100)) / 64
    one_sample = interval([1.0] * 50 + [0.0] * 50)
    width = one_sample[1] - one_sample[0]
    low, high = interval(list(alike))
    assert high - low < width / 3
    low, high = interval(list(unlike))
    assert high - low == pytest.approx(width, rel=0.02)


def test_questions_alike_so_far_do_not_promise_the_next() -> None:
    # 30 questions at 0.5 to 2 %: an exception may come, but fewer than if the 30 answers were only right or wrong
    values = [1 / 64] * 20 + [2 / 64] * 5 + [0.0] * 5
    low, high = interval(values)
    assert low < np.mean(values) / 2 and 0.04 < high < 0.095


def test_intervals_from_a_standard_error() -> None:
    scores = np.array([1.0] * 20 + [0.0] * 60)
    error = float(scores.std(ddof=1)) / len(scores) ** 0.5
    assert harness.interval(0.25, error, 80) == pytest.approx(interval(list(scores)))
    low, high = harness.interval(1.0, 0.0, 30)
    assert (low, high) == pytest.approx((0.05 ** (1 / 30), 1))
    assert harness.interval(12.5, 0.4, 30) == pytest.approx((12.5 - 2.045 * 0.4, 12.5 + 2.045 * 0.4), abs=1e-3)
    assert harness.interval(0.5, 0.1, None) == pytest.approx((0.304, 0.696), abs=1e-4)
    graded = np.random.default_rng(3).beta(2, 5, 50)
    found = limits_of_moments(graded.mean(), graded.var(ddof=1), 50)
    assert found == pytest.approx(interval(list(graded)))


@pytest.fixture(scope="module")
def coverage() -> ModuleType:
    """benchmarks/coverage.py; pytest's plugins import another module of that name."""
    spec = importlib.util.spec_from_file_location("interval_coverage", ROOT / "benchmarks/coverage.py")
    assert spec is not None and spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    sys.modules[spec.name] = module  # dataclasses look up their types here
    spec.loader.exec_module(module)
    return module


def test_coverage_of_every_way_in_which_two_can_differ(coverage: ModuleType) -> None:
    for n in (5, 6, 12, 30):
        found = coverage.enumerate_pairs(n)
        assert found["mean"] >= 0.95 and found["min"] >= 0.91, n
        assert found["min_single"] >= 0.91


def test_coverage_at_the_protocol_of_r1(coverage: ModuleType) -> None:
    found = [coverage.measure(cell, 400, 1000 + i) for i, cell in enumerate(coverage.protocol_cells())]
    assert len(found) == 16 and min(f.coverage for f in found) >= 0.92
    assert np.mean([f.coverage for f in found]) >= 0.94 > 0.85 > min(f.before for f in found)
    assert min(f.varied for f in found if f.constant < 0.5) >= 0.9 and min(f.narrowest for f in found) > 0.005


def test_coverage_of_differences(coverage: ModuleType) -> None:
    cells = [cell for cell in coverage.pair_cells() if cell.n <= 100][::97]
    found = [coverage.measure(cell, 300, 2000 + i) for i, cell in enumerate(cells)]
    assert len(found) >= 20 and min(f.coverage for f in found) >= 0.9
    assert np.mean([f.coverage for f in found]) >= 0.94 > np.mean([f.before for f in found])
    assert min(f.narrowest for f in found) > 0.005


def test_the_committed_coverage_is_within_its_bounds(coverage: ModuleType) -> None:
    cells = list(coverage.pair_cells())
    assert {cell.n for cell in cells} == {5, 10, 30, 100, 500} and {cell.samples for cell in cells} == {1, 4, 64}
    assert {0.0, 1.0} <= {round(cell.one - cell.two, 9) for cell in cells} and {cell.alike for cell in cells} == {
        0,
        0.9,
        1,
    }
    results = json.loads((ROOT / "benchmarks/results/coverage.json").read_text(encoding="utf-8"))
    assert results["differences"]["all"]["cells"] == len(cells)
    assert min(found["min"] for found in results["one_answer_each"].values()) >= 0.9
    for grid in ("r1_protocol", "scores", "differences"):
        found = results[grid]["all"]
        assert found["mean"] >= 0.94 and found["min"] >= 0.9 and found["narrowest"] > 0
        assert found["mean_where_scores_vary"] >= 0.94 and found["min_where_scores_vary"] >= 0.9
