"""Processes long texts block by block, so that memory stays proportional to a text's length. Does not import torch."""

import re
from collections.abc import Iterator

BLOCK = 1 << 18  # characters
_SPACE = re.compile(r"\s")
# points that no split rule joins across: between words at a space, and before a letter that starts a line
_BOUNDARY = re.compile(r"[A-Za-z](?= [A-Za-z])|\n(?=[A-Za-z])")


def blocks(text: str, size: int = BLOCK) -> Iterator[str]:
    """The parts of a text, each of `size` characters plus the rest of a word; no word is cut."""
    start = 0
    while len(text) - start > size:
        space = _SPACE.search(text, start + size)
        end = space.start() if space else len(text)
        yield text[start:end]
        start = end
    yield text[start:] if start else text


def pieces(text: str, size: int = BLOCK) -> Iterator[str]:
    """The parts of a text, at most 2 x `size` characters each, that tokenize exactly as the whole.

    If no word boundary occurs for so long, a word is cut, and only its tokens differ.
    """
    start = 0
    while len(text) - start > size:
        boundary = _BOUNDARY.search(text, start + size // 2, start + size)
        end = boundary.end() if boundary else start + size
        yield text[start:end]
        start = end
    yield text[start:] if start else text


def squeeze(text: str) -> str:
    """The words of a text, separated by single spaces."""
    return " ".join(filter(None, (" ".join(block.split()) for block in blocks(text))))


def runs(text: str, pattern: re.Pattern[str], n: int) -> Iterator[str]:
    """All n-grams of words of a text, separated by spaces; a word is a match of the pattern, without white space."""
    before: list[str] = []
    for block in blocks(text):
        words = before + pattern.findall(block)
        yield from (" ".join(words[i : i + n]) for i in range(len(words) - n + 1))
        before = words[max(0, len(words) - n + 1) :]
