"""Statistics of scores: worked examples, and scipy where it is installed. test_intervals.py has the intervals."""

import math
from itertools import combinations

import numpy as np
import pytest

from finback.suites.intervals import student
from finback.suites.statistics import holm, interval, majority, paired, pass_at_k, sign_flips


def test_pass_at_k_counts_the_choices_that_hold_a_right_one() -> None:
    # 5 samples, 2 right: of the 10 pairs, C(3, 2) = 3 contain none
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
        (["1/2", "0.5", "8", "8", "9"], [True, True, False, False, False], 0.5),  # all right answers count as one
        ([None, None, "7"], [False, False, True], 1),  # an empty answer has no vote
        ([None, None], [False, False], 0),
        ([None, "8"], [True, False], 0.5),  # a right answer without a short form still counts
        (["right", "right", "7"], [False, False, True], 0),  # a wrong answer may have any text
    ],
)
def test_majority(votes: list[str | None], right: list[bool], share: float) -> None:
    assert majority(votes, right) == share


@pytest.mark.slow  # importing it takes longer than all the others
def test_against_scipy() -> None:
    stats = pytest.importorskip("scipy.stats")
    for degrees in (4, 7, 20, 99):
        assert student(0.975, degrees) == pytest.approx(stats.t.ppf(0.975, degrees), rel=2e-3)
    gaps = np.random.default_rng(3).normal(0.2, 0.5, 12)
    test = stats.permutation_test((gaps,), lambda x: x.mean(), permutation_type="samples", n_resamples=math.inf)
    assert sign_flips(gaps, 0) == pytest.approx(test.pvalue)


def test_mcnemar_is_a_special_case_of_sign_flips() -> None:
    # 9 questions only the first answers right, 2 only the second: the exact test's p is 2 * 67 / 2^11
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
    assert (same.mean, same.p) == (0, 1) and same.low < -0.5 and same.high > 0.5 and not same.is_significant


def test_pairing_sees_what_two_intervals_do_not() -> None:
    # hard and easy questions; one model is a little better on each
    base = [i / 40 for i in range(36)]
    better = [x + 0.05 + 0.02 * (i % 3) for i, x in enumerate(base)]
    one, other = interval(better), interval(base)
    assert one[0] < other[1], "the intervals overlap"
    gap = paired(better, base, 0)
    assert gap.is_significant and gap.low <= gap.mean <= gap.high and gap.mean == pytest.approx(0.07)
