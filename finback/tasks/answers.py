r"""Marking: compares a model's final answer with the reference ("gold") answer, for RL, exams, suites and compare.

The gold answer alone decides how answers are compared: dates, times and phone numbers as such, numbers exactly and with
their unit, words as words, and everything else as mathematics, by math-verify in a worker process. Nothing is evaluated
in this process.
"""

import re
from fractions import Fraction
from functools import lru_cache
from typing import NamedTuple

from finback.tasks import math_process, replies
from finback.tasks.formulas import alike, compact, formula, is_notation, measured
from finback.tasks.labels import Label, label
from finback.tasks.notation import EXCEPT, NO_SOLUTION, REALS, unwrapped
from finback.tasks.quantity import Number, number
from finback.tasks.replies import boxed
from finback.tasks.task import NO_ANSWER, Problem, Verdict
from finback.tasks.wording import glossed, is_name, is_wording, words

__all__ = ["boxed", "check", "compact", "fault", "final_answer", "gold", "number", "spelling", "words"]

_LONGEST = 100_000  # characters of a reply that are read
_LONGEST_ANSWER = 2000  # characters of an answer
_LONGEST_SENTENCE = 80  # characters; a longer text with a stated answer is a worked solution
_MOST = 20  # different spellings of the answer in one reply
_LONGEST_CHAIN = 4  # parts before the last one in a chain of equations


_RADIANS = re.compile(r"(.*(?:\\pi|π).*?)\s*(?:\\(?:text|mathrm)\{\s*rad(?:ian)?s?\s*\}|rad(?:ian)?s?)?", re.DOTALL)


class _Gold(NamedTuple):
    """A parsed gold answer: one of these fields is set, or none for mathematics."""

    label: Label | None
    number: Number | None
    words: str | None


def final_answer(text: str) -> str | None:
    r"""The final answer in a reply; None if there is none, if two different ones occur, or if the reply is too long."""
    if len(text) > _LONGEST:
        return None
    found = replies.marked(text)
    if len(found) == 1 and len(found[0]) < len(text):
        found = replies.boxed(found[0]) or replies.stated(found[0]) or found
    if not found:
        found = [replies.sentence(each) for each in replies.stated(text)] or replies.emphasized(text) or [text]
    answers = list(dict.fromkeys(answer.strip() for answer in found))
    if not all(answers) or replies.NOTHING in answers or len(answers) > _MOST:
        return None
    return answers[-1] if len(answers) == 1 or len({spelling(answer) for answer in answers}) == 1 else None


def check(problem: Problem, answer: str) -> Verdict:
    """Judges a reply by comparing it with the gold answer."""
    given = final_answer(answer)
    if given is None or len(given) > _LONGEST_ANSWER:
        return NO_ANSWER
    wanted = _read(problem.answer)
    claims = replies.predicates(unwrapped(given), anyone=wanted.number is not None or wanted.label is not None)
    verdicts = [_compared(problem, each) for each in (given, *claims)]
    is_sum = wanted.label is None and wanted.words is None and (wanted.number or "=" not in problem.answer)
    if is_sum and not any(v.correct for v in verdicts):
        verdicts += [_chained(problem, each) for each in (given, *claims) if "=" in each]
    return next((v for v in verdicts if v.correct), max(verdicts, key=lambda v: v.well_formed))


def _chained(problem: Problem, given: str) -> Verdict:
    r"""The verdict on the last part of a chain such as 24 + 8 = 32 or n = \frac{9}{3} = 3, if all parts are equal."""
    *parts, last = re.split(r"(?<![<>!=\\])=(?!=)", unwrapped(given))
    verdict = _compared(problem, last)
    if not verdict.correct or len(parts) > _LONGEST_CHAIN:
        return NO_ANSWER
    parts = parts[1:] if len(parts) > 1 and re.fullmatch(r"\s*[a-zA-Z](?:_\{?\w\}?)?\s*", parts[0]) else parts
    end, *sides = (formula(re.sub(r"[€£]|\\?\$", "", part)) for part in (last, *parts))
    return verdict if end and all(side and _same(end, side).same for side in sides) else NO_ANSWER


def gold(text: str) -> tuple[str, str]:
    """The answer of a worked solution, and the reasoning before it ("" if the text is only an answer)."""
    reasoning, mark, answer = text.rpartition("####")
    if mark:
        return unwrapped(answer), reasoning.strip()
    found = boxed(text)
    if found:
        return unwrapped(found[-1]), text.strip() if len(text.strip()) > len(found[-1]) + len("\\boxed{}") else ""
    is_long = len(text) > _LONGEST_SENTENCE or "\n" in text.strip()
    stated = final_answer(text) if replies.stated(text) else None
    if stated is None:
        claims = replies.predicates(unwrapped(text), anyone=True)
        stated = next((each for each in claims if label(each) or number(each)), None)
    if stated is not None:
        return unwrapped(stated), text.strip() if is_long else ""
    return unwrapped(text), ""


@lru_cache(maxsize=100_000)
def fault(gold: str) -> str:
    """Why a gold answer cannot be used, or "". It must be one that the parsers can read: otherwise only its exact wording would pass."""
    read = _read(gold)
    if read.label or read.number or read.words is not None:
        return ""
    wanted = formula(gold, like=gold)
    is_sum = wanted is not None and "=" in wanted and not re.search(r"[a-zA-Z]", re.sub(r"\\[a-zA-Z]+", "", wanted))
    if wanted is not None and is_notation(wanted):
        return ""
    if wanted is None or is_sum or not formula(gold) or not math_process.compare(wanted, wanted).same:
        return f"{gold!r} is not one final answer"
    return ""


def spelling(text: str) -> str:
    """A normal form in which many spellings of the same answer coincide, for counting votes."""
    if len(text) > _LONGEST_ANSWER:
        return text
    if (value := number(text)) is not None:
        return str(value)
    if (wording := words(text)) is not None:
        return wording
    return compact(formula(text) or text)


@lru_cache(maxsize=100_000)
def _read(gold: str) -> _Gold:
    if found := label(gold):
        return _Gold(found, None, None)
    value = number(gold, strict=True)
    is_set = any(form.fullmatch(unwrapped(gold)) for form in (REALS, EXCEPT, NO_SOLUTION))
    return _Gold(None, value, words(gold) if value is None and not is_set and is_wording(gold) else None)


def _compared(problem: Problem, given: str) -> Verdict:
    wanted = _read(problem.answer)
    if wanted.label is not None:
        found = label(given, like=wanted.label)
        return Verdict(found is not None and wanted.label.equals(found), well_formed=found is not None)
    if wanted.number is not None:
        verdict = _counted(problem, wanted.number, given)
        if verdict is not None:
            return verdict
    if wanted.words is not None:
        wording = words(given)
        wording = wording if wording == wanted.words else words(glossed(given, problem.answer))
        if wording == wanted.words or is_name(problem.answer):
            is_one = wording is not None and (", " not in wording or ", " in wanted.words)
            return Verdict(wording == wanted.words, well_formed=is_one)
    return _derived(problem, given)


def _counted(problem: Problem, wanted: Number, given: str) -> Verdict | None:
    """The verdict on a number; None if the answer must be compared as mathematics."""
    value = number(given)
    is_whole = wanted.value.denominator == 1 and wanted.form != "fraction"
    if value is not None and is_whole and value.form == "fraction" and value.value.denominator == 1:
        return NO_ANSWER  # else 6/2 would pass for "What is 6/2?"
    if value is not None and value.form in ("power", "fraction") and _is_copied(given, problem.question):
        value = value if value.form == "fraction" else None
    if value is not None:
        return Verdict(wanted.equals(value), well_formed=True)
    if wanted.unit.dimension == (("angle", 1),) and (turned := _RADIANS.fullmatch(unwrapped(given))):
        found = formula(turned[1])  # 60° is \frac{\pi}{3}
        whole = wanted.value * wanted.unit.factor / 180
        return Verdict(bool(found) and _same(f"{_exact(whole)} \\pi", found or "").same, well_formed=bool(found))
    return NO_ANSWER if is_whole and wanted.form != "power" else None


def _derived(problem: Problem, given: str) -> Verdict:
    """math-verify's verdict, if both answers are single expressions."""
    if label(given) is not None:
        return NO_ANSWER  # 7:3:1 is not a fraction
    (wanted_text, wanted_unit), (given_text, given_unit) = measured(problem.answer), measured(given)
    if wanted_unit and given_unit and not set(wanted_unit) & set(given_unit):
        sizes = [two.factor / one.factor for one in wanted_unit for two in given_unit if one.dimension == two.dimension]
        if not sizes:
            return Verdict(correct=False, well_formed=True)
        given_text = rf"{_exact(sizes[0])} \cdot ({given_text})"  # 500\sqrt{2} cm
    wanted = formula(wanted_text, like=wanted_text)
    found = formula(given_text, like=wanted_text)
    if wanted is None or found is None:
        return NO_ANSWER
    if compact(found) == compact(wanted):
        return Verdict(correct=True, well_formed=True)
    if _is_copied(found, problem.question):
        return NO_ANSWER
    if (value := number(given_text)) is not None and value.variable == "" and value.form != "sum":
        found = _exact(value.value) if value.form != "decimal" else found
    comparison = _same(*alike(wanted, found))
    return Verdict(comparison.same, comparison.read)


@lru_cache(maxsize=10_000)
def _same(wanted: str, found: str) -> math_process.Comparison:
    """math-verify's comparison, cached: answers to the same question repeat a lot."""
    return math_process.compare(wanted, found)


def _exact(value: Fraction) -> str:
    return str(value.numerator) if value.denominator == 1 else f"\\frac{{{value.numerator}}}{{{value.denominator}}}"


def _is_copied(answer: str, question: str) -> bool:
    """Whether an answer is an expression of the question: repeating x^2+2x does not factor it."""
    short = compact(answer)
    return bool(re.search(r"[-+*/^\\]", short)) and short in compact(question)
