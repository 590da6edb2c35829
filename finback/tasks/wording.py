"""Compares answers in words, in any script, ignoring case, quotation marks, articles and the full stop. Does not import torch."""

import re
import unicodedata

from finback.tasks.notation import plain, unstyled, unwrapped
from finback.tasks.spelt import ORDINALS

_LONGEST = 120  # characters; longer answers are prose, which cannot be compared
_MATHEMATICS = re.compile(r"[=<>^+|\\{}]|\d\s*[*/]|[*/]\s*\d|^[\d.,\s()/*-]+$")
_NAMES = "sin cos tan cot sec csc log ln exp sqrt pi inf infty infinity lim max min mod gcd lcm arcsin arccos arctan"
_FUNCTIONS = frozenset(_NAMES.split())
_FORMULA = re.compile(r"(?:[A-Z][a-z]?(?:_?\{?\d{1,2}\}?)?){1,8}(?:\^?\{?\d?[+-]\}?)?")  # chemical: H_2O
_ON_THE_LINE = str.maketrans("₀₁₂₃₄₅₆₇₈₉⁺⁻²³", "0123456789+-23")
_NUMERAL = re.compile(
    r"\b(?:zero|one|two|three|four|five|six|seven|eight|nine|ten|eleven|twelve|\w+teen|\w+ty)\b", re.IGNORECASE
)
_ARTICLE = re.compile(r"^(?:(?:(?:at|in)\s+)?(?:the|an?)|at|in)\s+(?=\S{2})")
# years of birth and death after a person's name: (1867-1934)
_LIFE = re.compile(r"(?<=[^\W\d_]{2})([*_]{0,2}) \((?:born |b\. |c\. )?[0-9]{3,4}(?:\s*-\s*[0-9]{3,4})?\)$")
_YES = re.compile(
    r"(?:(?P<yes>yes)|no),\s+(?:it|they|he|she|there|that|this|you|we|i)\s+(?:is|are|was|were|does|do|did|can|could|has|have|will|would|am)(?P<not>n't| not)?"
)
_DRAWN = re.compile(
    r"(\\triangle|△|\\angle|∠)\s*\{?\s*([A-Z](?:\s*[A-Z]){2})\s*\}?"
)  # a triangle or angle, with the letters of its corners
_GLOSS = re.compile(r"(.{2,}?) \(([^()]{1,60})\)")
_OTHERWISE = re.compile(r"\b(?:not?|never|or|and|wrong|neither|nor)\b|n't|[不非没]|\bне\b|ليس", re.IGNORECASE)
_SHORT_NAME = re.compile(r"[A-Z][A-Za-z0-9_₀-₉{}^+-]{0,8}")  # an abbreviation or a chemical formula
_PLACES = {
    name: f"{i}{'th' if i % 100 in (11, 12, 13) else {1: 'st', 2: 'nd', 3: 'rd'}.get(i % 10, 'th')}"
    for i, name in ORDINALS.items()
}
_PLACE = re.compile(rf"\b(?:{'|'.join(sorted(_PLACES, key=len, reverse=True))})\b")
_ENDS = ".!?。！？।؟،,;:"


def words(text: str) -> str | None:
    """A short text in its normal form for comparison; None if it cannot be compared as words."""
    if len(text) > 4 * _LONGEST:
        return None
    text = _bare(text)
    if formula := _formula(text):
        return formula
    if len(text) > _LONGEST or not any(map(str.isalpha, text)) or _MATHEMATICS.search(text):
        return None
    text = _ARTICLE.sub("", text.casefold(), count=1)
    if (short := _YES.fullmatch(text)) and bool(short["yes"]) != bool(short["not"]):
        return "yes" if short["yes"] else "no"
    text = re.sub(r",?\s+and\s+|[,、]\s*", ", ", text)
    text = _PLACE.sub(lambda match: _PLACES[match[0]], text)  # the twenty-first century
    return unicodedata.normalize("NFC", " ".join(text.split()))


def glossed(text: str, gold: str) -> str:
    """A name without its abbreviation or formula in parentheses, or the latter without the name: carbon dioxide (CO2)."""
    match = _GLOSS.fullmatch(_bare(text))
    if match is None or _OTHERWISE.search(match[0]):
        return text
    name, behind = match[1], match[2]
    if _SHORT_NAME.fullmatch(behind) and (len(behind) < 3 or not behind.istitle()):
        return name if not _SHORT_NAME.fullmatch(_bare(gold)) or name == _bare(gold) else behind
    if _SHORT_NAME.fullmatch(name) and not name.istitle():
        return name if _SHORT_NAME.fullmatch(_bare(gold)) else behind
    return text


def is_wording(gold: str) -> bool:
    """Whether an answer should be compared as words: it is not a formula, and contains a word."""
    text = _bare(gold)
    if _formula(text) or re.fullmatch(r"\d{1,4}(?:st|nd|rd|th)", text):
        return True
    if words(gold) is None or not (text[0].isalpha() or text[0] in "(\"'" or re.search(r"[^\W\d_]{4}", text)):
        return False
    letters = re.findall(r"[^\W\d_]+(?:[\u0300-\u036f\u0900-\u0dff\u064b-\u065f]+[^\W\d_]*)*", text)
    if all(word.lower() in _FUNCTIONS or len(word) == 1 for word in letters) and len(text) > 1:
        return False
    if re.search(r"(?i)\b(?:or)\b", text) and (_NUMERAL.search(text) or re.search(r"\d", text)):
        return False  # two answers
    return not re.search(r"[(),]", text) or any(len(word) > 2 for word in letters)  # f(a, b) is mathematics


def is_name(gold: str) -> bool:
    """Whether words are certainly not a product of variables, such as xy."""
    text = _bare(gold)
    return (
        not text.isascii()
        or bool(_formula(text))
        or " " in text
        or len(text) > 3
        or any(v in text.lower() for v in "aeiou")
    )


def _bare(text: str) -> str:
    text = unwrapped(_LIFE.sub(r"\1", unstyled(unwrapped(plain(text), _ENDS))), _ENDS)
    if drawn := _DRAWN.fullmatch(text):
        shape = "angle" if drawn[1] in ("∠", r"\angle") else "triangle"
        return f"{shape} {''.join(drawn[2].split())}"
    inner = re.fullmatch(r"\(([^()]*)\)", text)
    return unwrapped(inner[1] if inner else text, _ENDS)


def _formula(text: str) -> str | None:
    """A chemical formula on one line, case-sensitive: CO is not cobalt. It has two elements and a number, or a charge."""
    text = text.replace(" ", "").translate(_ON_THE_LINE)
    is_ion = bool(re.search(r"[+-]\}?$", text))
    is_compound = re.search(r"[A-Z][a-z]?_?\{?\d", text) and re.search(r"[A-Z].*[A-Z]|_", text)
    if not _FORMULA.fullmatch(text) or not (is_ion or is_compound):
        return None
    return re.sub(r"[_{}^]", "", text)
