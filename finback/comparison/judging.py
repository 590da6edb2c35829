"""Judges answers by their suite's task. Does not import torch."""

from collections.abc import Sequence
from dataclasses import dataclass

from finback.comparison.contestant import Answer, Price
from finback.comparison.endings import ending
from finback.suites.suite import Suite
from finback.tasks.answers import final_answer, spelling
from finback.tasks.language import consistency
from finback.tasks.task import NO_ANSWER, Problem, Verdict, judged

_LONGEST_VOTE = 200  # characters; longer answers are free text, and no two are equal


@dataclass(frozen=True)
class JudgedAnswer:
    """An answer with its verdict, vote and cost."""

    # index of the question in the suite
    place: int
    answer: Answer
    verdict: Verdict
    # the normalized final answer, which majority voting counts
    vote: str | None
    dollars: float | None
    # the share of its words that are in the suite's language
    language: float | None

    @property
    def is_cut(self) -> bool:
        """Whether the token limit cut the answer off."""
        return ending(self.answer.finish) == "length"

    @property
    def is_empty(self) -> bool:
        """Whether both the chain of thought and the answer are empty."""
        return not (self.answer.content or self.answer.thinking)

    @property
    def is_reasoning_only(self) -> bool:
        """Whether there is a chain of thought, not cut off, without an answer after it."""
        return bool(self.answer.thinking) and not self.answer.content and not self.is_cut

    @property
    def shown(self) -> str:
        """The vote, or the beginning of an answer without one."""
        return self.vote or self.answer.content[:_LONGEST_VOTE]


def judge_answers(suite: Suite, answers: Sequence[tuple[int, Answer]], price: Price) -> list[JudgedAnswer]:
    """Judges answers, each paired with the index of its question. Incomplete answers (see `Answer.whole`) are wrong."""
    whole = [pair for pair in answers if pair[1].whole]
    asked = [(suite.problems[place], a.content) for place, a in whole]
    verdicts = dict(zip([id(a) for _, a in whole], judged(suite.task, asked), strict=True))
    return [
        JudgedAnswer(
            place,
            a,
            verdicts.get(id(a), NO_ANSWER),
            vote(suite, suite.problems[place], a),
            price.of(a),
            consistency(a.thinking or a.content, suite.language) if suite.language else None,
        )
        for place, a in answers
    ]


def vote(suite: Suite, problem: Problem, a: Answer) -> str | None:
    """The normalized final answer for majority voting; None if the answer is incomplete or has no short final answer."""
    read = getattr(suite.task, "read", None)
    if read is not None:
        return read(problem, a.content) if a.whole else None
    final = final_answer(a.content) if a.whole else None
    return spelling(final).lower() if final is not None and len(final) <= _LONGEST_VOTE else None
