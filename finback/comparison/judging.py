"""Answers judged by their suite's task, and what each was made of. No torch here."""

from collections.abc import Sequence
from dataclasses import dataclass

from finback.comparison.answer_store import Answer
from finback.comparison.contestant import Price
from finback.suites.suite import Suite
from finback.tasks.answers import compact, final_answer
from finback.tasks.language import consistency
from finback.tasks.task import NO_ANSWER, Verdict, judged

_LONGEST_VOTE = 200  # characters: what is longer is an essay, and no two of these agree


@dataclass(frozen=True)
class JudgedAnswer:
    """One answer, judged."""

    # of the question in the suite
    place: int
    sample: int
    correct: bool
    # an answer of the asked form was found in it
    well_formed: bool
    # the tokens were used up before it ended
    cut: bool
    # nothing was said, in the chain or behind it
    empty: bool
    # the final answer in a form that can be counted
    vote: str | None
    # the vote, or how a longer answer begins
    said: str
    tokens: int | None
    prompt_tokens: int | None
    seconds: float
    dollars: float | None
    # the share of its words that are in the suite's language
    language: float | None
    tries: int


def judge_answers(suite: Suite, answers: Sequence[tuple[int, Answer]], price: Price) -> list[JudgedAnswer]:
    """Judge answers, given with the places of their questions. One that is cut off, or lost in its chain, is wrong."""
    whole = [pair for pair in answers if pair[1].whole]
    asked = [(suite.problems[place], a.text) for place, a in whole]
    verdicts = dict(zip([id(a) for _, a in whole], judged(suite.task, asked), strict=True))
    wrong = NO_ANSWER
    return [_mark(suite, place, a, verdicts.get(id(a), wrong), price) for place, a in answers]


def _mark(suite: Suite, place: int, a: Answer, verdict: Verdict, price: Price) -> JudgedAnswer:
    language = consistency(a.thinking or a.text, suite.language) if suite.language else None
    counted = vote(a)
    return JudgedAnswer(
        place,
        a.sample,
        verdict.correct,
        verdict.well_formed,
        a.finish == "length",
        not (a.text or a.thinking),
        counted,
        counted or a.text[:_LONGEST_VOTE],
        a.tokens,
        a.prompt_tokens,
        a.seconds,
        price.of(a),
        language,
        a.tries,
    )


def vote(a: Answer) -> str | None:
    """What an answer counts for in a vote; nothing where it has no end or no short final answer."""
    said = final_answer(a.text) if a.whole else None
    return compact(said).lower().rstrip(".") if said is not None and len(said) <= _LONGEST_VOTE else None
