"""Statistics of scores: worked examples, scipy where it is installed, and what intervals promise, by simulation."""

import math
from itertools import combinations

import numpy as np
import pytest

from finback.suites import statistics
from finback.suites.statistics import holm, interval, majority, paired, pass_at_k, sign_flips, student, wilson


def test_pass_at_k_counts_the_choices_that_hold_a_right_one() -> None:
    # 5 samples, 2 right: of the 10 choices of 2, C(3, 2) = 3 hold none
    assert pass_at_k(5, 2, 2) == pytest.approx(0.7)
    for n, c in ((4, 0), (4, 1), (6, 3), (6, 6)):
        for k in range(1, n + 1):
            chosen = list(combinations([i < c for i in range(n)], k))
            assert pass_at_k(n, c, k) == pytest.approx(sum(map(any, chosen)) / len(chosen))


@pytest.mark.parametrize(
    ("votes", "right", "share"),
    [
        (["7", "7", "8"], [True, True, False], 1),
        (["7", "8", "8"], [True, False, False], 0),
        (["7", "8"], [True, False], 0.5),  # a tie is broken by chance
        (["1/2", "0.5", "8", "8", "9"], [True, True, False, False, False], 0.5),  # right answers are one answer
        ([None, None, "7"], [False, False, True], 1),  # who says nothing has no vote
        ([None, None], [False, False], 0),
        ([None, "8"], [True, False], 0.5),  # right without a short form still counts
        (["right", "right", "7"], [False, False, True], 0),  # a wrong answer may be called anything
    ],
)
def test_majority(votes: list[str | None], right: list[bool], share: float) -> None:
    assert majority(votes, right) == share


def test_wilson_against_the_published_example() -> None:
    # Newcombe 1998, table I: 81 of 263 gives 0.2553 to 0.3662, 0 of 20 gives 0 to 0.1611
    assert wilson(81 / 263, 263) == pytest.approx((0.2553, 0.3662), abs=5e-5)
    assert wilson(0, 20) == pytest.approx((0, 0.1611), abs=5e-5)


def test_student_against_tables() -> None:
    table = {1: 12.706, 2: 4.303, 3: 3.182, 5: 2.571, 10: 2.228, 30: 2.042, 120: 1.980}
    for degrees, quantile in table.items():
        assert student(0.975, degrees) == pytest.approx(quantile, rel=0.004)


@pytest.mark.slow  # importing it takes longer than all the others
def test_against_scipy() -> None:
    stats = pytest.importorskip("scipy.stats")
    for degrees in (4, 7, 20, 99):
        assert student(0.975, degrees) == pytest.approx(stats.t.ppf(0.975, degrees), rel=2e-3)
    rng = np.random.default_rng(3)
    found = wilson(13 / 40, 40)
    theirs = stats.binomtest(13, 40).proportion_ci(method="wilson")
    assert found == pytest.approx((theirs.low, theirs.high), abs=1e-6)
    gaps = rng.normal(0.2, 0.5, 12)
    test = stats.permutation_test((gaps,), lambda x: x.mean(), permutation_type="samples", n_resamples=math.inf)
    assert sign_flips(gaps, 0) == pytest.approx(test.pvalue)
    values = rng.beta(2, 2, 80)
    theirs = stats.bootstrap((values,), np.mean, n_resamples=10_000, method="percentile", rng=1).confidence_interval
    assert interval(list(values), 0) == pytest.approx((theirs.low, theirs.high), abs=0.006)


def test_mcnemar_is_a_special_case_of_sign_flips() -> None:
    # 9 questions only the first has right, 2 only the second: the exact test's p is 2 * 67 / 2^11
    gaps = np.array([1.0] * 9 + [-1.0] * 2 + [0.0] * 30)
    assert sign_flips(gaps, 0) == pytest.approx(2 * (1 + 11 + 55) / 2**11)
    many = np.array([1.0] * 40 + [-1.0] * 20)
    exact = 2 * sum(math.comb(60, k) for k in range(40, 61)) / 2**60
    assert sign_flips(many, 0) == pytest.approx(exact, abs=0.005)


def test_holm_by_hand() -> None:
    assert holm([0.01, 0.04, 0.03]) == pytest.approx([0.03, 0.06, 0.06])
    assert holm([0.5, 0.9]) == pytest.approx([1, 1]) and holm([]) == []


def test_nothing_is_told_apart_by_too_little() -> None:
    assert not paired([1], [0], 0).is_significant
    assert not paired([1] * 5, [0] * 5, 0).is_significant  # 5 of 5 happens one time in 16
    assert paired([1] * 6, [0] * 6, 0).is_significant
    same = paired([0.25, 0.5, 1], [0.25, 0.5, 1], 0)
    assert (same.mean, same.low, same.high, same.p) == (0, 0, 0, 1) and not same.is_significant


def test_pairing_sees_what_two_intervals_do_not() -> None:
    # hard and easy questions; one model is a little better on each
    base = [i / 40 for i in range(36)]
    better = [x + 0.05 + 0.02 * (i % 3) for i, x in enumerate(base)]
    one, other = interval(better, 0), interval(base, 0)
    assert one[0] < other[1], "the intervals overlap"
    gap = paired(better, base, 0)
    assert gap.is_significant and gap.low <= gap.mean <= gap.high and gap.mean == pytest.approx(0.07)


def test_the_same_seed_gives_the_same_interval() -> None:
    values = [float(i % 3 == 0) for i in range(60)]
    assert interval(values, 4) == interval(values, 4) != interval(values, 5)


def test_all_right_is_no_promise() -> None:
    low, high = interval([1.0] * 20, 0)
    assert high == 1 and low == pytest.approx(0.839, abs=1e-3)  # Wilson's, as for 0 of 20 above
    low, high = interval([0.0], 0)
    assert low == 0 and high > 0.7


@pytest.mark.parametrize(
    ("n", "samples", "spread"),
    [(40, 4, 2.0), *(pytest.param(*case, marks=pytest.mark.slow) for case in ((40, 1, None), (120, 8, 0.5)))],
)
def test_coverage(n: int, samples: int, spread: float | None, monkeypatch: pytest.MonkeyPatch) -> None:
    """Of many intervals, 93 to 97 % hold the truth; questions differ in how hard they are by a beta distribution."""
    monkeypatch.setattr(statistics, "RESAMPLES", 1000)
    rng, runs, truth = np.random.default_rng(11), 200, (0.3, 0.5, 0.8)
    held = 0
    for run in range(runs):
        for p in truth:
            hard = np.full(n, p) if spread is None else rng.beta(p * spread, (1 - p) * spread, n)
            low, high = interval(list(rng.binomial(samples, hard) / samples), run)
            held += low <= p <= high
    assert 0.93 <= held / (runs * len(truth)) <= 0.97


def test_coverage_of_differences(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(statistics, "RESAMPLES", 1000)
    rng, runs, held, alarms = np.random.default_rng(5), 300, 0, 0
    for run in range(runs):
        hard = rng.uniform(size=40)
        base, equal = (rng.binomial(4, hard) / 4 for _ in range(2))
        better = rng.binomial(4, hard + 0.2 * (1 - hard)) / 4
        gap = paired(list(better), list(base), run)
        held += gap.low <= 0.1 <= gap.high
        alarms += paired(list(equal), list(base), run).is_significant
    assert 0.93 <= held / runs <= 0.97 and alarms / runs <= 0.06
