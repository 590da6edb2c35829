"""Long texts a block at a time, so that none takes many times its own length in memory. No torch here."""

import re
from collections.abc import Iterator

BLOCK = 1 << 18  # characters
_SPACE = re.compile(r"\s")
# no split rule joins what stands on both sides: a word before a space and a word, the first letter of a line
_BOUNDARY = re.compile(r"[A-Za-z](?= [A-Za-z])|\n(?=[A-Za-z])")


def blocks(text: str, size: int = BLOCK) -> Iterator[str]:
    """The parts of a text, each of `size` characters and up to the next white space; no word is cut."""
    start = 0
    while len(text) - start > size:
        space = _SPACE.search(text, start + size)
        end = space.start() if space else len(text)
        yield text[start:end]
        start = end
    yield text[start:] if start else text


def pieces(text: str, size: int = BLOCK) -> Iterator[str]:
    """The parts of a text that a tokenizer makes the same tokens of as of the whole, of 2 x `size` characters at most.

    Where nothing parts words for so long, one is cut: only its own tokens differ.
    """
    start = 0
    while len(text) - start > size:
        boundary = _BOUNDARY.search(text, start + size // 2, start + size)
        end = boundary.end() if boundary else start + size
        yield text[start:end]
        start = end
    yield text[start:] if start else text


def squeeze(text: str) -> str:
    """The words of a text with a space between them."""
    return " ".join(filter(None, (" ".join(block.split()) for block in blocks(text))))


def runs(text: str, pattern: re.Pattern[str], n: int) -> Iterator[str]:
    """All runs of n words of a text, a space between them; a word is what the pattern matches, white space is none."""
    before: list[str] = []
    for block in blocks(text):
        words = before + pattern.findall(block)
        yield from (" ".join(words[i : i + n]) for i in range(len(words) - n + 1))
        before = words[max(0, len(words) - n + 1) :]
