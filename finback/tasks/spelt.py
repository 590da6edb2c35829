"""Numbers in English words. No torch here."""

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
}
_THOUSANDS = {"thousand": 1, "million": 2, "billion": 3}
_COUNTS = {"a": 1, "an": 1, **{word: value for word, value in WORD_VALUES.items() if 0 < value < 20}}
_PLACES, _PLACE_NAMES = (3, 5, 6, 7, 8, 9, 10), "third fifth sixth seventh eighth ninth tenth"
_PART_NAMES = {
    **dict.fromkeys(("half", "halves"), 2),
    **dict.fromkeys(("quarter", "quarters", "fourth", "fourths"), 4),
    **{name + end: i for i, name in zip(_PLACES, _PLACE_NAMES.split(), strict=True) for end in ("", "s")},
}
# half an hour, a third, three quarters of the cake; a third alone is a place
_PARTS = re.compile(
    rf"(?:({'|'.join(_COUNTS)})[ -])?(?:(?<=[ -])|(?=half\b))({'|'.join(_PART_NAMES)})\b(?:\s+of)?(?:\s+an?\b)?",
    re.IGNORECASE,
)


def spelt(text: str) -> tuple[Fraction | None, str, str]:
    """The number that a text begins with, in English words, how it is written, and the text behind it.

    Such as twenty-five, one hundred and five, half an hour, three quarters of it.
    """
    if share := _PARTS.match(text):
        top = _COUNTS[(share[1] or "a").lower()]
        return Fraction(top, _PART_NAMES[share[2].lower()]), "fraction", text[share.end() :]
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
    return Fraction(total + part), "whole", text[len("".join(tokens[:used])) :]
