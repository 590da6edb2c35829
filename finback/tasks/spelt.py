"""Numbers in English words and in Chinese characters. Does not import torch."""

import re
from fractions import Fraction

_SMALL = (
    "zero one two three four five six seven eight nine ten eleven twelve thirteen fourteen fifteen sixteen seventeen "
    "eighteen nineteen"
)
_TENS = "twenty thirty forty fifty sixty seventy eighty ninety"
WORD_VALUES = {
    **{word: i for i, word in enumerate(_SMALL.split())},
    **{word: 10 * i for i, word in enumerate(_TENS.split(), start=2)},
    "nought": 0,
}
_ORDINAL = ("first", "second", "third", "fourth", "fifth", "sixth", "seventh", "eighth", "ninth")
ORDINALS = {
    **dict(enumerate(_ORDINAL, start=1)),
    **{
        i: f"{name.removesuffix('ve')}{'fth' if name == 'twelve' else 'th'}"
        for i, name in enumerate(_SMALL.split())
        if i > 9
    },
    **{i: f"{name[:-1]}ieth" for i, name in enumerate(_TENS.split(), start=2) for i in (10 * i,)},
    **{
        10 * i + j: f"{ten}-{name}"
        for i, ten in enumerate(_TENS.split(), start=2)
        for j, name in enumerate(_ORDINAL, start=1)
    },
}
_THOUSANDS = {"thousand": 1, "million": 2, "billion": 3, "trillion": 4}
_COUNTS = {"a": 1, "an": 1, **{word: value for word, value in WORD_VALUES.items() if value > 0}}
_PLACE_NAMES = (
    "third=3 fifth=5 sixth=6 seventh=7 eighth=8 ninth=9 tenth=10 eleventh=11 twelfth=12 thirteenth=13 fourteenth=14 fifteenth=15 "
    "sixteenth=16 eighteenth=18 twentieth=20 thirtieth=30 fortieth=40 fiftieth=50 sixtieth=60 hundredth=100 thousandth=1000"
)
_PART_NAMES = {
    **dict.fromkeys(("half", "halves"), 2),
    **dict.fromkeys(("quarter", "quarters", "fourth", "fourths"), 4),
    **{name + end: int(i) for name, i in (each.split("=") for each in _PLACE_NAMES.split()) for end in ("", "s")},
}
# half an hour, a third, three quarters of the cake; "third" alone is an ordinal
_PARTS = re.compile(
    rf"(?:({'|'.join(_COUNTS)})(?:-(one|two|three|four|five|six|seven|eight|nine))?[ -])?(?:(?<=[ -])|(?=half\b))"
    rf"({'|'.join(sorted(_PART_NAMES, key=len, reverse=True))})\b(?:\s+of)?(?:\s+an?\b)?",
    re.IGNORECASE,
)
_ONE = "|".join(sorted(WORD_VALUES, key=len, reverse=True))
_RUN = re.compile(rf"\b(?:{_ONE})(?:[ -](?:and )?(?:{_ONE}|hundred|thousand))*\b", re.IGNORECASE)
_DIGITS = {char: i for i, char in enumerate("〇一二三四五六七八九")} | {"零": 0, "两": 2, "兩": 2}
_POWERS = {"十": 1, "百": 2, "千": 3, "万": 4, "萬": 4, "亿": 8, "億": 8}
_CHARACTERS = "".join((*_DIGITS, *_POWERS))
_CHINESE = re.compile(rf"(百分之)?([{_CHARACTERS}]+)(?:点([{''.join(_DIGITS)}]+))?(.*)", re.DOTALL)
# characters after a number that only name what is counted
_MEASURES = "个個只本人天岁歲歳次块張张元円度年月日米名种"


def spelt(text: str) -> tuple[Fraction | None, str, str]:
    """The number in words at the start of a text, its form, and the text after it.

    For example twenty-five, one hundred and five, half an hour, three quarters of it, two and a half; or 二百五十六.
    """
    if (share := _PARTS.match(text)) and _is_share(share):
        return _part(share), "fraction", text[share.end() :]
    if text and text[0] in _CHARACTERS:
        return _chinese(text)
    match = re.match(r"[a-zA-Z]+(?:[ -][a-zA-Z]+){0,8}", text)
    tokens = re.split(r"([ -])", match[0].lower()) if match else []
    total, part, used = 0, -1, 0
    for i, token in enumerate(tokens):
        if token in WORD_VALUES:
            value = WORD_VALUES[token]
            if part > 0 and not (
                (part % 10 == 0 and part % 100 >= 20 and value < 10) or (part % 100 == 0 and part > 0)
            ):
                return None, "", ""
            part = max(part, 0) + value
        elif token == "hundred" and 0 < part < 100:
            part *= 100
        elif token in _THOUSANDS and part > 0:
            total, part = total + part * 1000 ** _THOUSANDS[token], 0
        elif token not in (" ", "-", "and") or (token == "and" and part % 100):
            break
        if token not in (" ", "-", "and"):
            used = i + 1
    if part < 0:
        return None, "", ""
    rest = text[len("".join(tokens[:used])) :]
    if (
        (joint := re.match(r"\s+and\s+", rest))
        and (share := _PARTS.match(rest, joint.end()))
        and _part(share) < 1
        and _is_share(share)
    ):
        return total + part + _part(share), "fraction", rest[share.end() :]
    return Fraction(total + part), "whole", rest


def figures(text: str) -> str:
    """Replaces English number words by digits: 1 hour and 40 minutes."""
    return _RUN.sub(lambda match: str(value) if (value := spelt(match[0])[0]) is not None else match[0], text)


def _is_share(share: re.Match[str]) -> bool:
    """Whether it is a fraction, not an ordinal such as in "the twenty-fifth" or "a third place"."""
    name, is_place = share[3].lower(), bool(re.match(r"\s+[a-z]", share.string[share.end() :], re.IGNORECASE))
    if name.endswith("s") or name in ("half", "quarter"):
        return True
    return (share[1] or "a").lower() not in _TENS.split() and not (is_place and not re.search(r"\bof\b", share[0]))


def _part(share: re.Match[str]) -> Fraction:
    top = _COUNTS[(share[1] or "a").lower()] + (WORD_VALUES[share[2].lower()] if share[2] else 0)
    return Fraction(top, _PART_NAMES[share[3].lower()])


def _chinese(text: str) -> tuple[Fraction | None, str, str]:
    """二百五十六, 百分之十五, 三点五. Not words such as 三国: only a measure word may follow."""
    match = _CHINESE.fullmatch(text)
    if match is None or (match[4].strip() and match[4].strip() not in _MEASURES):
        return None, "", ""
    total = section = digit = 0
    for char in match[2]:
        if char in _DIGITS:
            if digit:
                return None, "", ""  # 一九四九 is a year read by its digits
            digit = _DIGITS[char]
        elif _POWERS[char] < 4:
            section, digit = section + (digit or 1) * 10 ** _POWERS[char], 0
        else:
            total, section, digit = (total + section + digit) * 10 ** _POWERS[char], 0, 0
    value = Fraction(total + section + digit)
    if match[3]:
        value += Fraction(int("".join(str(_DIGITS[char]) for char in match[3])), 10 ** len(match[3]))
    if match[1]:
        return value, "whole", "%" + match[4]
    return value, "whole" if value.denominator == 1 else "decimal", match[4]
