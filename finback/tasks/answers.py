r"""The final answer within a text, and what it says: a number, plain words, or mathematics. Nothing is evaluated.

A final answer stands in \boxed{}, after ####, or is the whole text. No torch here.
"""

import re
from fractions import Fraction
from typing import NamedTuple

from finback.tasks import math_process
from finback.tasks.task import NO_ANSWER, Problem, Verdict

_LONGEST = 100_000  # characters of an answer that are looked at
_LONGEST_BOX = 2000  # characters of a box that count as an answer
_BRACES = re.compile(r"\\f?boxed\s*\{|\\fbox\s*\{|[{}]")
_NUMBER = re.compile(
    r"(?:[a-zA-Z]\s*=\s*)?(?P<sign>[+-]?)\s*(?:\\?\$|[€£¥])?\s*"
    r"(?P<digits>[0-9]{1,3}(?:(?:,|\{,\}|\\,)[0-9]{3}){1,30}|[0-9]{1,100})?(?P<rest>\.[0-9]{1,100})?"
    r"(?P<unit>(?![0-9.,{]).{0,60})",
    re.DOTALL,
)
_UNIT = re.compile(r"\\?%|°|\^\{?\\circ\}?|cm|mm|km|kg|mg|ml|mph|\s*[\u3040-\u9fff]{1,6}|\s+[^\W\d_]{2,50}")
# Words that change a number, or are a second one: 12 thousand is not 12, and "12 thirteen" is a guess.
_NO_UNIT = re.compile(
    r"\b(?:and|or|to|not|dozen|hundred|thousand|[mbtr]+illion|squared|cubed|factorial|zero|one|two|three|four|five|six|"
    r"seven|eight|nine|ten|eleven|twelve|[a-z]+teen|(?:twen|thir|for|fif|six|seven|eigh|nine)ty)s?\b|[十百千万萬亿億]",
    re.IGNORECASE,
)
_WORDS = re.compile(r"[^\W\d_]+(?:[ '’.-]{1,2}[^\W\d_]+){0,9}\.?")
_TEXT = re.compile(r"\\(?:text|textbf|textit|mathrm|mbox)\s*\{([^{}]*)\}")


def final_answer(text: str) -> str | None:
    r"""What a model gives as its answer; None if it gives two different ones, nothing, or far too much."""
    if len(text) > _LONGEST:
        return None
    found = boxed(text) or re.findall(r"####(?!#)([^\n]*)", text) or [text]
    answers = [unwrap(answer) for answer in found]
    return answers[-1] if len({compact(answer) for answer in answers}) == 1 and answers[-1] else None


def check(problem: Problem, answer: str) -> Verdict:
    """Judge an answer by the gold answer alone."""
    given, gold = final_answer(answer), problem.answer
    if given is None:
        return NO_ANSWER
    as_number, as_words = number(gold), words(gold)
    if as_number is not None:
        value = number(given)
        if value is not None or as_number.value.denominator == 1:
            return Verdict(value is not None and as_number.equals(value), well_formed=value is not None)
    elif as_words is not None:
        return Verdict(words(given) == as_words, well_formed=words(given) is not None)
    if compact(given) == compact(gold):
        return Verdict(correct=True, well_formed=True)
    if not is_single(given) or _is_copied(given, problem.question):
        return NO_ANSWER
    comparison = math_process.compare(gold, given)
    return Verdict(comparison.same, comparison.read)


def unwrap(text: str) -> str:
    r"""Without white space and a pair of $, $$, \( \), \[ \] or ** around it."""
    text = text.strip()
    for left, right in (("**", "**"), ("$$", "$$"), ("$", "$"), ("\\(", "\\)"), ("\\[", "\\]")):
        if len(text) > len(left + right) and text.startswith(left) and text.endswith(right):
            text = text[len(left) : -len(right)].strip()
    return text


def gold(text: str) -> tuple[str, str]:
    """The answer of a worked solution, and the reasoning that leads to it ("" where the text is the answer)."""
    reasoning, mark, answer = text.rpartition("####")
    if mark:
        return unwrap(answer), reasoning.strip()
    found = boxed(text)
    if found:
        return unwrap(found[-1]), text.strip() if len(text.strip()) > len(found[-1]) + len("\\boxed{}") else ""
    return unwrap(text), ""


def boxed(text: str) -> list[str]:
    r"""The contents of every \boxed{} and \fbox{} whose braces close, the innermost where they are nested."""
    found, opened = (list[str](), list[int]())  # opened: where the content of each open brace starts, -1 if no box's
    for match in _BRACES.finditer(text):
        if match[0] != "}":
            opened.append(match.end() if len(match[0]) > 1 else -1)
        elif opened and (start := opened.pop()) >= 0:
            content = text[start : match.start()] if match.start() - start < _LONGEST_BOX else "boxed"
            if "boxed" not in content and "\\fbox" not in content:
                found.append(content.strip())
    return found


def compact(text: str) -> str:
    r"""A form in which spaces, \left, \right and \dfrac do not count, to see whether two answers are written alike."""
    text = re.sub(r"\\left|\\right|\\[,;:! ]|\s|\$", "", text)
    text = re.sub(r"\\[dt]frac", r"\\frac", text)
    return re.sub(r"\\frac\{(\w+)\}\{(\w+)\}|\\frac(\d)(\d)", lambda m: "/".join(g for g in m.groups() if g), text)


class Number(NamedTuple):
    """An exact value and the word that follows it, if one does."""

    value: Fraction
    unit: str

    def equals(self, other: "Number") -> bool:
        """12 is 12 hours, but 12 minutes is not."""
        return self.value == other.value and (self.unit == other.unit or not (self.unit and other.unit))


def number(text: str) -> Number | None:
    r"""An integer or a decimal, exactly: 1,234 is 1234. A currency sign, a unit and "x =" may stand beside it.

    $12, 12 dollars, 12 \text{ cm} and 12 % are all read as 12. A unit is a sign or words, in \text{} or not; words for
    numbers are none, nor are letters close to the number: 12x is not 12.
    """
    text = unwrap(text.strip().removesuffix("."))
    match = _NUMBER.fullmatch(text) if len(text) <= 300 else None
    if match is None or not (match["digits"] or match["rest"]):
        return None
    unit = re.sub(r"(?<=[^\W\d_])\^\{?[23]\}?$", "", _TEXT.sub(r" \1", match["unit"]).rstrip())
    joined = re.sub(r"(?<=\w)[\s.]+(?=\w)", "", unit)
    if unit and (_NO_UNIT.search(unit) or not _UNIT.fullmatch(joined)):
        return None
    digits = re.sub(r"[^0-9]", "", match["digits"] or "0")
    return Number(Fraction(f"{match['sign']}{digits}{match['rest'] or ''}"), _name(unit))


def _name(unit: str) -> str:
    """One name for a unit that can be written in several ways."""
    name = unit.strip().lower().removesuffix("s")
    if "%" in name:
        return "percent"
    return "degree" if "circ" in name or name == "°" else name


def words(text: str) -> str | None:
    """A short text of words alone, such as a name. Case does not count in ASCII (beyond it, the Kelvin sign is a k)."""
    text = " ".join(_TEXT.sub(r"\1", unwrap(text)).split())
    if len(text) == 3 and text[0] == "(" and text[2] == ")":
        text = text[1]
    if len(text) > 100 or not _WORDS.fullmatch(text):
        return None
    text = text.removesuffix(".")
    return text.lower() if text.isascii() else text


def is_single(text: str) -> bool:
    r"""Whether no second answer hides where math-verify does not look: in \text{}, or behind another $."""
    has_second = any(re.search(r"\d|\b(?:or|maybe|not)\b\s*\S", part) for part in _TEXT.findall(text))
    return not has_second and "$" not in text.replace("\\$", "")


def _is_copied(answer: str, question: str) -> bool:
    """Whether an answer is an expression of the question: to factor x^2+2x, it is not enough to repeat it."""
    short = compact(answer)
    return bool(re.search(r"[-+*/^\\]", short)) and short in compact(question)
