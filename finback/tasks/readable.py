"""Decides which chains are readable: R1 dropped those with mixed languages, long paragraphs and code blocks (2.3.3).

Rejection sampling keeps right and readable answers. Pure functions of the text. Does not import torch.
"""

import re
from collections import Counter
from dataclasses import dataclass

from finback.config import check_fields, check_share
from finback.tasks.language import EUROPEAN, words
from finback.tasks.language import consistency as measured

_FENCE = re.compile(r"^\s*```", re.MULTILINE)
_BLOCK = re.compile(r"^\s*```.*?(?:^\s*```|\Z)", re.MULTILINE | re.DOTALL)
_TOKEN = re.compile(r"[\u3040-\u30ff\u3400-\u9fff]|\w+|[^\w\s]")


def repeated_lines(chain: str) -> float:
    """The share of lines that repeat an earlier line; lines under ten characters ("So:", "}") do not count."""
    lines = [line for line in (" ".join(part.split()) for part in chain.splitlines()) if len(line) >= 10]
    return 1 - len(set(lines)) / len(lines) if lines else 0.0


def repeated_ngrams(chain: str, n: int = 8) -> float:
    """The share of n-grams of words (or signs, or Chinese characters) that occurred before: 0, or nearly 1 for a loop."""
    tokens = _TOKEN.findall(chain)
    runs = Counter(zip(*(tokens[i:] for i in range(n)), strict=False))
    return 1 - len(runs) / runs.total() if runs else 0.0


def longest_paragraph(chain: str) -> int:
    """Number of words in the longest paragraph, without code."""
    paragraphs = re.split(r"\n\s*\n", _BLOCK.sub("\n\n", chain))
    return max(sum(word.size for word in words(paragraph)) for paragraph in paragraphs)


def code_share(chain: str) -> float:
    """The share of characters inside ``` fences."""
    return sum(map(len, _BLOCK.findall(chain))) / len(chain) if chain else 0.0


@dataclass(frozen=True)
class Readable:
    """Limits for a readable chain. With the defaults a page of worked mathematics passes and a loop fails."""

    language: str = "en"
    others: tuple[str, ...] = EUROPEAN
    # minimum share of words in one language: tolerates names of people and places
    consistency: float = 0.95
    # largest share of repeated lines: a result may be stated twice; a loop reaches 0.5 or more
    lines: float = 0.2
    # largest share of repeated 8-grams; step-by-step arithmetic reaches 0.1
    ngrams: float = 0.2
    # most words in a paragraph; longer ones are unreadable
    paragraph: int = 300
    # largest share of characters in code blocks; 0: none allowed, as in R1
    code: float = 0.5
    # most code blocks; more suggest fragments and restarts rather than a program
    blocks: int = 3

    def __post_init__(self) -> None:
        check_fields(self, "readable")
        check_share(self, "readable", "consistency", "lines", "ngrams", "code")

    def __call__(self, chain: str) -> bool:
        return not self.faults(chain)

    def faults(self, chain: str) -> tuple[str, ...]:
        """Names of what is wrong with a chain, cheap tests first; a chain without words has no mixed languages."""
        fences = len(_FENCE.findall(chain))
        tests = {
            "empty": not chain.strip(),
            "repeated lines": repeated_lines(chain) > self.lines,
            "repeated words": repeated_ngrams(chain) > self.ngrams,
            "long paragraph": longest_paragraph(chain) > self.paragraph,
            "much code": code_share(chain) > self.code,
            "scattered code": fences % 2 == 1 or fences > 2 * self.blocks,
        }
        faults = tuple(name for name, is_faulty in tests.items() if is_faulty)
        share = measured(chain, self.language, self.others)
        is_mixed = share is not None and share < self.consistency
        return (*faults, "mixed languages") if is_mixed else faults
