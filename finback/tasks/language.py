"""Language consistency: the share of a chain's words in the target language (R1 2.3.2). Does not import torch.

A short word may belong to many languages ("die", "no", "on"), so words are first separated by script, and within the
target's script judged five at a time. Formulas, code, numbers and single letters are not words. Chinese, Japanese and
Thai have no spaces, so every two characters count as one word.
"""

import re
import unicodedata
from functools import lru_cache
from itertools import groupby
from typing import Any, NamedTuple

from finback.config import UserError, did_you_mean

EUROPEAN = ("de", "fr", "es", "it", "pt")

_WINDOW = 5  # words; fewer are often misjudged, more blur the border between languages
_CLEAR = 2.0  # how much likelier another language must be, so that names and rare words are not counted as foreign
_SCRIPTS = {
    "CJK": "zh ja",
    "HIRAGANA": "ja",
    "KATAKANA": "ja",
    "HANGUL": "ko",
    "CYRILLIC": "ru uk bg be mk sr kk mn",
    "GREEK": "el",
    "ARABIC": "ar fa ur",
    "HEBREW": "he",
    "DEVANAGARI": "hi mr",
    "THAI": "th",
    "GEORGIAN": "ka",
    "ARMENIAN": "hy",
    "BENGALI": "bn",
    "GUJARATI": "gu",
    "GURMUKHI": "pa",
    "TAMIL": "ta",
    "TELUGU": "te",
}
_UNSPACED = frozenset({"CJK", "HIRAGANA", "KATAKANA", "THAI", "LAO", "KHMER", "MYANMAR"})
_NO_PROSE = re.compile(
    r"```.*?(?:```|\Z)|`[^`\n]*`|\$\$.{0,2000}?\$\$|\$[^$\n]{1,300}\$|\\\(.{0,2000}?\\\)|\\\[.{0,2000}?\\\]|"
    r"\\[a-zA-Z]+|https?://\S+",
    re.DOTALL,
)
_TEXT = re.compile(r"\\(?:text|mbox|textbf)\s*\{([^{}]*)\}")
_SENTENCE = re.compile(r"[.!?;:。！？；：\n]")


class Word(NamedTuple):
    """A run of letters of one script; `size` is the number of words it counts as."""

    script: str
    size: int
    start: int
    end: int


def consistency(chain: str, target: str = "en", others: tuple[str, ...] = EUROPEAN) -> float | None:
    """The share of words in the target language; None if there are no words, which should earn nothing.

    `others` are the languages to distinguish from the target within its script (ISO 639-1); all other scripts are foreign
    anyway. In code blocks only foreign scripts are detected, so a filter should also limit code (readable.py).
    """
    scripts = _scripts(target)
    text = unicodedata.normalize("NFKC", chain)
    prose = _NO_PROSE.sub(lambda match: f" {' '.join(_TEXT.findall(match[0]))} ", text)
    all_words = words(prose)
    own = [word for word in all_words if word.script in scripts]
    # Programs and formulas use Latin letters in every language; other letters in them count.
    foreign = sum(w.size for w in words(text) if w.script not in {"LATIN", *scripts})
    foreign += sum(w.size for w in all_words if w.script == "LATIN" and "LATIN" not in scripts)
    verdicts = _in_target(prose, own, target, others)
    right = sum(word.size for word, is_right in zip(own, verdicts, strict=True) if is_right)
    total = foreign + sum(word.size for word in own)
    return right / total if total else None


def words(text: str) -> list[Word]:
    """The words of a text in order; a single letter of a script with spaces is a symbol, not a word."""
    found = []
    for script, places in groupby(range(len(text)), key=lambda place: _script(text[place])):
        run = list(places)
        size = -(-len(run) // 2) if script in _UNSPACED else int(len(run) > 1)
        if script and size:
            found.append(Word(script, size, run[0], run[-1] + 1))
    return found


def _in_target(text: str, own: list[Word], target: str, others: tuple[str, ...]) -> list[bool]:
    """Whether each word of the target's scripts is in the target language, judged with the words around it."""
    rivals = tuple(sorted({o for o in others if o != target and _scripts(o) & _scripts(target)}))
    if not rivals:
        return [True] * len(own)
    detector, (wanted, *unwanted) = _detector((target, *rivals))
    verdicts = []
    for start, end in _sentences(text, own):
        # A sentence of few words is judged together with the whole text.
        low, high = (start, end) if end - start >= _WINDOW - 1 else (0, len(own))
        for place in range(start, end):
            first = max(low, min(place - _WINDOW // 2, high - _WINDOW))
            last = min(high, first + _WINDOW) - 1
            window = text[own[first].start : own[last].end]
            values = {v.language: v.value for v in detector.compute_language_confidence_values(window)}
            verdicts.append(max(values[other] for other in unwanted) <= _CLEAR * values[wanted])
    return verdicts


def _sentences(text: str, own: list[Word]) -> list[tuple[int, int]]:
    """Ranges of words between sentence ends."""
    breaks = [0]
    breaks += [i for i in range(1, len(own)) if _SENTENCE.search(text, own[i - 1].end, own[i].start)]
    return list(zip(breaks, [*breaks[1:], len(own)], strict=True)) if own else []


@lru_cache(maxsize=8)
def _detector(names: tuple[str, ...]) -> tuple[Any, list[Any]]:
    """lingua's detector for these languages; loading a language's model takes a second or two at the first text."""
    from lingua import LanguageDetectorBuilder

    languages = [known(name) for name in names]
    return LanguageDetectorBuilder.from_languages(*languages).build(), languages


def known(name: str, field: str = "language") -> Any:
    """lingua's language for an ISO 639-1 code; UserError for an unknown code."""
    from lingua import Language

    codes = {language.iso_code_639_1.name.lower(): language for language in Language.all()}
    if name not in codes:
        raise UserError(field, name, "no such language", did_you_mean(name, codes))
    return codes[name]


@lru_cache(maxsize=128)
def _scripts(name: str) -> frozenset[str]:
    known(name)
    return frozenset(script for script, names in _SCRIPTS.items() if name in names.split()) or frozenset({"LATIN"})


@lru_cache(maxsize=50_000)
def _script(char: str) -> str:
    """The script of a letter or combining mark, "" for anything else."""
    if unicodedata.category(char)[0] not in "LM":
        return ""
    return re.split("[ -]", unicodedata.name(char, "UNKNOWN"))[0]
