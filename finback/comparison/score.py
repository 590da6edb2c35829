"""Scores of one contestant on one suite, and differences between pairs of contestants. Does not import torch."""

from collections import Counter, defaultdict
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

from finback.comparison import remarks
from finback.comparison.judging import JudgedAnswer
from finback.suites import statistics
from finback.suites.intervals import LEVEL
from finback.suites.statistics import Difference
from finback.suites.suite import Suite

MAX_NO_ANSWER = 0.1  # no verdict on a contestant if a larger share of its answers lacks the requested form


@dataclass(frozen=True)
class Score:
    """One contestant on one suite. Shares are of all answers received; `failed` counts requests without an answer."""

    contestant: str
    suite: str
    # questions with at least one answer
    n: int
    answers: int
    failed: int
    # pass@1: the mean over questions of the mean over samples
    accuracy: float | None
    interval: tuple[float, float] | None
    # accuracy of the majority vote over samples
    majority: float | None
    # pass@k by k
    pass_at: dict[int, float]
    # share cut off by the token limit
    cut: float
    # share without an answer of the requested form
    unparseable: float
    empty: float
    # means per answer
    tokens: float | None
    prompt_tokens: float | None
    seconds: float | None
    # total; None if the cost of any answer is unknown
    dollars: float | None
    dollars_per_answer: float | None
    dollars_per_solved: float | None
    # mean share of words in the suite's language
    language: float | None
    # mean tries per answer
    tries: float | None
    # answers by the server's finish reason; "null" if it sends none
    endings: dict[str, int] = field(default_factory=dict)
    # share with a chain of thought but no answer
    reasoning_only: float = 0.0
    # answers that contain a stop token, by the first such token
    stop_tokens: dict[str, int] = field(default_factory=dict)
    # answers by the model that the server names
    answered_by: dict[str, int] = field(default_factory=dict)
    flags: list[str] = field(default_factory=list)
    by_question: dict[int, float] = field(default_factory=dict, repr=False)

    def as_json(self) -> dict[str, Any]:
        """Plain values, without the scores of single questions."""
        return {name: value for name, value in vars(self).items() if name != "by_question"}


def score(
    contestant: str, suite: Suite, judged: Sequence[JudgedAnswer], failed: Sequence[str] = (), model: str = ""
) -> Score:
    """Summarizes one contestant's judged answers to one suite.

    `failed` are the problems of failed requests, `model` is the requested model.
    """
    groups: dict[int, list[JudgedAnswer]] = defaultdict(list)
    for each in judged:
        groups[each.place].append(each)
    by_question = {place: _mean([j.verdict.correct for j in group]) or 0.0 for place, group in sorted(groups.items())}
    solved = sum(j.verdict.correct for j in judged)
    total = _total([j.dollars for j in judged])
    accuracy = _mean(list(by_question.values()))
    interval = statistics.interval(list(by_question.values())) if by_question else None
    return Score(
        contestant,
        suite.name,
        len(groups),
        len(judged),
        len(failed),
        accuracy,
        interval,
        _majority(suite, groups),
        _pass_at(groups),
        cut=_mean([j.is_cut for j in judged]) or 0.0,
        unparseable=_mean([not j.verdict.well_formed for j in judged]) or 0.0,
        empty=_mean([j.is_empty for j in judged]) or 0.0,
        tokens=_mean([j.answer.tokens for j in judged if j.answer.tokens is not None]),
        prompt_tokens=_mean([j.answer.prompt_tokens for j in judged if j.answer.prompt_tokens is not None]),
        seconds=_mean([j.answer.seconds for j in judged]),
        dollars=total,
        dollars_per_answer=total / len(judged) if total is not None and judged else None,
        dollars_per_solved=total / solved if total is not None and solved else None,
        language=_mean([j.language for j in judged if j.language is not None]),
        tries=_mean([j.answer.tries for j in judged]),
        endings=dict(Counter(j.answer.finish or "null" for j in judged)),
        reasoning_only=_mean([j.is_reasoning_only for j in judged]) or 0.0,
        stop_tokens=dict(Counter(j.answer.stop_token for j in judged if j.answer.stop_token)),
        answered_by=dict(Counter(j.answer.model for j in judged if j.answer.model)),
        flags=remarks.of(suite, judged, failed, interval, model),
        by_question=by_question,
    )


def pairs(scores: Sequence[Score], seed: int, max_no_answer: float = MAX_NO_ANSWER) -> list[dict[str, Any]]:
    """Compares every pair of contestants on every suite, over the questions that both answered; p is Holm-corrected.

    If more than `max_no_answer` of either one's answers lack the requested form, neither is called better: the difference
    may be one of format.
    """
    found: list[tuple[Score, Score, Difference]] = []
    for i, one in enumerate(scores):
        for other in scores[i + 1 :]:
            both = sorted(one.by_question.keys() & other.by_question.keys())
            if one.suite == other.suite and both:
                gap = statistics.paired([one.by_question[q] for q in both], [other.by_question[q] for q in both], seed)
                found.append((one, other, gap))
    raised = statistics.holm([gap.p for *_, gap in found])
    return [_pair(one, other, gap, p, max_no_answer) for (one, other, gap), p in zip(found, raised, strict=True)]


def _pair(one: Score, other: Score, gap: Difference, raised: float, max_no_answer: float) -> dict[str, Any]:
    formless = {each.contestant: each.unparseable for each in (one, other) if each.unparseable > max_no_answer}
    is_clear = gap.is_significant and raised <= 1 - LEVEL and not formless
    better = (one if gap.mean > 0 else other).contestant if is_clear else None
    return {
        "suite": one.suite,
        "one": one.contestant,
        "other": other.contestant,
        "n": gap.n,
        "difference": gap.mean,
        "interval": (gap.low, gap.high),
        "p": gap.p,
        "p_holm": raised,
        "better": better,
        # contestants with too many answers that lack the requested form, and that share
        "no_answer": formless,
    }


def _majority(suite: Suite, groups: dict[int, list[JudgedAnswer]]) -> float | None:
    """Accuracy of the majority vote; None for one sample, and for programs, which cannot be tested for equality."""
    if getattr(suite.task, "waits", False) or max(map(len, groups.values()), default=0) < 2:
        return None
    return _mean([statistics.majority([j.vote for j in g], [j.verdict.correct for j in g]) for g in groups.values()])


def _pass_at(groups: dict[int, list[JudgedAnswer]]) -> dict[int, float]:
    """pass@k for k = 1, 2, 4 … and for the number of samples that every question has."""
    fewest = min(map(len, groups.values()), default=0)
    ks = sorted({k for k in (1, 2, 4, 8, 16, 32, 64) if k <= fewest} | ({fewest} if fewest else set()))
    counts = [(len(group), sum(j.verdict.correct for j in group)) for group in groups.values()]
    return {k: sum(statistics.pass_at_k(n, c, k) for n, c in counts) / len(counts) for k in ks}


def _mean(values: Sequence[float]) -> float | None:
    return sum(values) / len(values) if values else None


def _total(values: Sequence[float | None]) -> float | None:
    """The sum, or None if a value is unknown."""
    known = [value for value in values if value is not None]
    return sum(known) if known and len(known) == len(values) else None
