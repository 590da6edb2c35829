"""Which choice a reply names: B, (B), "Answer: B. Finback", "The correct answer is B.", 答案：B。, or the text of a choice. No torch here."""

import re
from collections.abc import Sequence

from finback.tasks import replies
from finback.tasks.answers import spelling
from finback.tasks.notation import plain, unstyled, unwrapped
from finback.tasks.wording import words

LETTERS = "ABCDEFGHIJ"
_LONGEST, _LONGEST_NAME = 100_000, 2000  # characters of a reply, and of what names a choice in it
_MOST = 200  # statements, or lines
_STOPS = ".!,;:。！、"
_INTRODUCED = re.compile(
    r"(?:(?:so|thus|hence|therefore|then|and|clearly|obviously|definitely|certainly|finally),?\s+)*(?:(?:it|this|that)(?:\s+is|'s|\s+must be)\s+|(?:i|we)(?:'d|\s+would)?\s+(?:choose|pick|select|say|answer|go with)\s+|"
    r"(?:因此|所以|故|本题)?(?:应该|应)?选(?:择|项)?[：:]?\s*)?(?:the\s+)?(?:(?:correct|right|best)\s+)?(?:option|choice|letter|answer|选项|答案|\s)*[:：]?\s*",
    re.IGNORECASE,
)
_LETTER = re.compile(r"[(\[{]?\s*([A-Ja-j])\s*[)\]}]?\s*(?:[.:,、)\-–—]|\s)*\s*(.*)", re.DOTALL)
_ALONE = re.compile(r"[(\[{]?\s*([A-Ja-j])\s*[)\]}]?\s*[.:)]?")
_PRAISED = re.compile(
    r"\s*,?\s*(?:is|was)\s+(?:the\s+)?(?:correct|right|true|best)?\s*(?:answer|option|choice|one)?\s*[.!]?",
    re.IGNORECASE,
)
_TAGGED = re.compile(r"(\S.*?)\s*[(\[]([A-J])[)\]]", re.DOTALL)
# It can't be A, C or D, so it must be B.
_CONCLUDED = re.compile(
    r"[^.\n]*(?:\b(?:not|cannot|neither|wrong|incorrect|ruled? out|eliminate\w*)|n't)\b[^.\n]*(?:,|;|—)\s*(?:and\s+)?(?:so|hence|thus|therefore)\s+"
    r"(?:it|that|the (?:correct |right )?answer)\s+(?:must be|has to be|can only be|is)\s+([^,;.\n]+)",
    re.IGNORECASE,
)
_REASON = re.compile(r"(?:because|since|as|due to|given|which|for)\b|因为|由于", re.IGNORECASE)
# B, because A and C are too cold
_OTHERS_FAIL = re.compile(
    r"(?:because|since|as)\s+(?:[A-J](?:,?\s+and\s+|,\s+|\s+))+(?:is|are)\s+too\s[^.,;\n]*", re.IGNORECASE
)
_DOUBT = re.compile(
    r"\b(?:or|not|no|none|wrong|incorrect|false|but|however|maybe|perhaps|wait|actually|either|neither|both|unless|except|could|might|also|instead)\b"
    r"|n't|[?或不]",
    re.IGNORECASE,
)


def named(answer: str, choices: Sequence[str]) -> str | None:
    r"""The one letter that a reply names: in \boxed{}, else behind "Answer:", else in a line or all of it; None if two or none."""
    if len(answer) > _LONGEST or not choices:
        return None
    found = replies.marked(answer)
    if len(found) == 1 and len(found[0]) < len(answer):
        found = replies.stated(found[0]) or found
    found = found or replies.stated(answer)
    if len(found) > _MOST:
        return None
    if found:
        letters = [_choice(text, choices) for text in found]
        return letters[-1] if len({letter for letter in letters if letter}) == 1 else None
    if (letter := _choice(answer, choices)) is not None:
        return letter
    lines = [line for line in answer.split("\n") if line.strip()]
    letters = [_choice(line, choices) for line in lines] if 1 < len(lines) < _MOST else []
    return letters[-1] if letters and len({letter for letter in letters if letter}) == 1 else None


def _choice(text: str, choices: Sequence[str], again: bool = True) -> str | None:
    """The choice that one statement names."""
    if len(text) > _LONGEST_NAME or text == replies.NOTHING:
        return None
    text = unwrapped(unstyled(unwrapped(plain(text), _STOPS)), _STOPS)
    alone = _ALONE.fullmatch(text)
    if alone:
        return _within(alone[1], choices)
    if (repeated := _repeated(text, choices)) is not None:
        return repeated
    if (tagged := _TAGGED.fullmatch(text)) and _repeated(tagged[1], choices) == tagged[2]:
        return tagged[2]  # Paris (B)
    if again and (concluded := _CONCLUDED.fullmatch(text)):
        return _choice(concluded[1], choices, again=False)
    introduced = _INTRODUCED.match(text)
    bare = unwrapped(text[introduced.end() :] if introduced else text, _STOPS)
    alone, labelled = _ALONE.fullmatch(bare), _LETTER.fullmatch(bare)
    if alone:
        return _within(alone[1], choices)
    if (repeated := _repeated(bare, choices)) is not None:
        return repeated
    behind = bare[labelled.end(1) :][:1] if labelled else ""
    is_listed = (
        behind in (")", ".") and labelled is not None and _repeated(labelled[2], choices) is not None
    )  # b) green
    if labelled and (labelled[1].isupper() or is_listed) and not behind.isalnum():
        letter = _within(labelled[1], choices)
        return letter if letter and _is_of(letter, labelled[2], behind != " ", choices) else None
    praised = re.fullmatch(rf"(.+?){_PRAISED.pattern}", bare, re.IGNORECASE | re.DOTALL)
    claims = [each for each in (praised and praised[1], *replies.predicates(text)) if each and again]
    return next((letter for each in claims if (letter := _choice(each, choices, again=False))), None)


def _is_of(letter: str, rest: str, is_marked: bool, choices: Sequence[str]) -> bool:
    """Whether what follows a letter speaks for it: its own text, "is correct", or a reason that names no other choice."""
    rest = rest.strip()
    inner = re.fullmatch(r"\((.*?)\)|\[(.*?)\]", rest, re.DOTALL)
    rest = unwrapped((inner[1] or inner[2] or "") if inner else rest, _STOPS)
    if _repeated(rest, choices) == letter or _PRAISED.fullmatch(rest):
        return True
    if _OTHERS_FAIL.fullmatch(rest):
        return True
    is_reason = bool(_REASON.match(rest)) or (is_marked and len(rest.split()) > 3)
    others = [choice for i, choice in enumerate(choices) if LETTERS[i] != letter]
    lower = rest.casefold()
    return (
        is_reason
        and not _DOUBT.search(rest)
        and not any(choice.casefold() in lower for choice in others)
        and not re.search(r"(?<![\w'])[B-HJ](?![\w'])|\(?\b[AI]\)|\bA\b(?! [a-z])", rest)
    )


def _within(letter: str, choices: Sequence[str]) -> str | None:
    return letter.upper() if letter.upper() in LETTERS[: len(choices)] else None


def _repeated(text: str, choices: Sequence[str]) -> str | None:
    """The letter of the choice that a text repeats: exactly, else as words, else as a number; None if it could be two."""
    for form in (str, _lower, lambda each: words(each) or each, spelling):
        wanted = form(text)
        found = [i for i, choice in enumerate(choices) if form(choice) == wanted]
        if found:
            return LETTERS[found[0]] if len(found) == 1 else None
    return None


def _lower(text: str) -> str:
    return text.removesuffix(".").casefold()
