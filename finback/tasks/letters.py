"""Finds the choice that a reply names: B, (B), "Answer: B. Finback", "The correct answer is B.", 答案：B。, or the text of a choice. Does not import torch."""

import re
from collections.abc import Sequence

from finback.tasks import replies
from finback.tasks.answers import spelling
from finback.tasks.notation import plain, unstyled, unwrapped
from finback.tasks.wording import words

LETTERS = "ABCDEFGHIJ"
_LONGEST, _LONGEST_NAME = 100_000, 2000  # characters of a reply, and of a statement in it
_MOST = 200  # statements, or lines
_STOPS = ".!,;:。！、"
_INTRODUCED = re.compile(
    r"(?:(?:i'm|i am)\s+(?:\w+\s+)?(?:confident|sure|certain)\s+(?:that\s+)?)?(?:(?:so|thus|hence|therefore|then|and|clearly|obviously|definitely|certainly|finally),?\s+)*(?:(?:it|this|that)(?:\s+is|'s|\s+must be)\s+|(?:i|we)(?:'d|\s+would)?\s+(?:choose|pick|select|say|answer|go with)\s+|"
    r"(?:因此|所以|故|本题)?(?:应该|应)?选(?:择|项)?[：:]?\s*)?(?:the\s+)?(?:(?:correct|right|best)\s+)?(?:option|choice|letter|answer|选项|答案|\s)*[:：]?\s*"
    r"(?:(?:(?:[ao]|la|el|le|die|der|das)\s+)?(?:letra|réponse|respuesta|risposta|resposta|Antwort|ответ|lettre|lettera|literę|litera|opción|opção|opzione|optie|вариант|буква|字母|选项|Buchstabe|Option)\s*|"
    r"(?:la|el|le|il|die|der|das|de|den)\s+(?=[A-J](?!\w)))?",
    re.IGNORECASE,
)
_LETTER = re.compile(r"[(\[{]?\s*([A-Ja-j])\s*[)\]}]?\s*(?:[.:,、)\-–—]|\s)*\s*(.*)", re.DOTALL)
_ALONE = re.compile(r"[(\[{]?\s*([A-Ja-j])\s*[)\]}]?\s*[.:)]?")
_PRAISED = re.compile(
    r"\s*,?\s*(?:is|was)\s+(?:the\s+)?(?:correct|right|true|best)?\s*(?:answer|option|choice|one)?\s*[.!]?|\s*是?(?:正确|對|对)(?:的|答案|选项)?[。.]?|"
    r"\s*が正解(?:です)?[。.]?|\s+(?:es|est|ist|è|é)\s+(?:la\s+|die\s+|a\s+)?(?:correct[ao]|correcte|richtig|corretta)[.]?",
    re.IGNORECASE,
)
_TAGGED = re.compile(r"(\S.*?)\s*[(\[](?:(?:option|choice|answer)\s+)?([A-J])[)\]]", re.DOTALL | re.IGNORECASE)
# It can't be A, C or D, so it must be B.
_CONCLUDED = re.compile(
    r"[^.\n]*(?:\b(?:not|cannot|neither|wrong|incorrect|ruled? out|eliminate\w*)|n't)\b[^.\n]*(?:,|;|—|\.)\s*(?:and\s+)?(?:so|hence|thus|therefore)\s+"
    r"(?:(?:it|that|the (?:correct |right )?answer)\s+(?:must be|has to be|can only be|is)\s+|it's\s+|(?=\(?[A-J]\)?\.?$))([^,;.\n]+)",
    re.IGNORECASE,
)
# The pressure falls.
_SUBJECT = re.compile(
    r"(?i:it|he|she|this|that|the(?: (?!(?:not?|never|hardly|rarely|or|and|n?either)\b)[a-z]+){1,5})"
    r"(?<! of)(?<! in)(?<! near)(?<! from)(?<! with)(?<! to)(?<! for)(?<! by)(?<! like)(?<! the)(?<! that)\s+(?P<verb>[a-z]+s\b.*)"
)
# words after a lone letter that take it back
_RETRACTED = re.compile(
    r"\b(?:wait|actually|but|however|instead|rather|correction|sorry|guess|wrong|incorrect|false|maybe|perhaps|could|might|also|either|or)\b|"
    r"\bno[,.:!]|\bnot\s+[A-J]\b|[?？]|不|错",
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
    r"""The one letter that a reply names: in \boxed{}, else after "Answer:", else in a line or the whole reply; None if it names two or none."""
    if len(answer) > _LONGEST or not choices:
        return None
    found = replies.marked(answer)
    if len(found) == 1 and len(found[0]) < len(answer):
        found = replies.stated(found[0]) or found
    found = found or [replies.untailed(each) for each in replies.stated(answer)]
    if len(found) > _MOST:
        return None
    if found:
        letters = [_choice(text, choices) for text in found]
        return letters[-1] if len({letter for letter in letters if letter}) == 1 else None
    if (letter := _choice(answer, choices)) is not None:
        return letter
    lines = [line for line in answer.split("\n") if line.strip()]
    letters = [_choice(line, choices) for line in lines] if 1 < len(lines) < _MOST else []
    if len({letter for letter in letters if letter}) != 1:
        return None
    is_first = (
        letters[0] and _ALONE.fullmatch(unwrapped(lines[0], _STOPS)) and not any(map(_RETRACTED.search, lines[1:]))
    )
    return letters[0] if is_first else letters[-1]  # a letter, then the reason


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
    if (tagged := _TAGGED.fullmatch(text)) and _repeated(tagged[1], choices) == tagged[2].upper():
        return tagged[2].upper()  # Paris (B)
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
    if (
        labelled
        and (labelled[1].isupper() or is_listed)
        and behind != "'"
        and not (behind.isascii() and behind.isalnum())
    ):
        letter = _within(labelled[1], choices)
        return letter if letter and _is_of(letter, labelled[2], behind != " ", choices) else None
    if not text.endswith("?") and (said := _SUBJECT.fullmatch(text)) and (repeated := _repeated(said["verb"], choices)):
        return repeated
    praised = re.fullmatch(rf"(.+?){_PRAISED.pattern}", bare, re.IGNORECASE | re.DOTALL)
    claims = [each for each in (praised and praised[1], *replies.predicates(text, anyone=True)) if each and again]
    return next((letter for each in claims if (letter := _choice(each, choices, again=False))), None)


def _is_of(letter: str, rest: str, is_marked: bool, choices: Sequence[str]) -> bool:
    """Whether the text after a letter supports it: the choice's own text, "is correct", or a reason that names no other choice."""
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
    """The letter of the choice that a text repeats: exactly, else as words, else as a number; None if ambiguous."""
    for form in (str, _lower, lambda each: words(each) or each, spelling):
        wanted = form(text)
        found = [i for i, choice in enumerate(choices) if form(choice) == wanted]
        if found:
            return LETTERS[found[0]] if len(found) == 1 else None
    return None


def _lower(text: str) -> str:
    return text.removesuffix(".").casefold()
