"""Answers judged by their suite's task, and what each was made of. Does not import torch."""

from collections.abc import Sequence
from dataclasses import dataclass

from finback.comparison.contestant import Answer, Price
from finback.comparison.endings import ending
from finback.suites.suite import Suite
from finback.tasks.answers import final_answer, spelling
from finback.tasks.language import consistency
from finback.tasks.task import NO_ANSWER, Problem, Verdict, judged

_LONGEST_VOTE = 200  # characters: what is longer is an essay, and no two of these agree


@dataclass(frozen=True)
class JudgedAnswer:
    """An answer and what it was found to be."""

    # of the question in the suite
    place: int
    answer: Answer
    verdict: Verdict
    # the final answer in a form that can be counted
    vote: str | None
    dollars: float | None
    # the share of its words that are in the suite's language
    language: float | None

    @property
    def is_cut(self) -> bool:
        """Whether the tokens were used up before it ended."""
        return ending(self.answer.finish) == "length"

    @property
    def is_empty(self) -> bool:
        """Whether there is nothing, neither in the chain nor behind it."""
        return not (self.answer.content or self.answer.thinking)

    @property
    def is_reasoning_only(self) -> bool:
        """Whether a chain came to an end, or was given up, and no answer follows it."""
        return bool(self.answer.thinking) and not self.answer.content and not self.is_cut

    @property
    def shown(self) -> str:
        """The vote, or how a longer answer begins."""
        return self.vote or self.answer.content[:_LONGEST_VOTE]


def judge_answers(suite: Suite, answers: Sequence[tuple[int, Answer]], price: Price) -> list[JudgedAnswer]:
    """Judge answers, given with the places of their questions. One that is cut off, or lost in its chain, is wrong."""
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
    """What an answer counts for in a vote; nothing where it has no end or no short final answer."""
    read = getattr(suite.task, "read", None)
    if read is not None:
        return read(problem, a.content) if a.whole else None
    final = final_answer(a.content) if a.whole else None
    return spelling(final).lower() if final is not None and len(final) <= _LONGEST_VOTE else None
