"""Which chains are fit to learn from: R1 dropped those with mixed languages, long paragraphs and code blocks (2.3.3).

Rejection sampling keeps what is right and readable. Pure functions of the text. No torch here.
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
    """The share of lines that stood there before; lines under ten characters ("So:", "}") do not count."""
    lines = [line for line in (" ".join(part.split()) for part in chain.splitlines()) if len(line) >= 10]
    return 1 - len(set(lines)) / len(lines) if lines else 0.0


def repeated_ngrams(chain: str, n: int = 8) -> float:
    """The share of runs of n words (or signs, or Chinese characters) that stood there before: 0 to nearly 1 for a loop."""
    tokens = _TOKEN.findall(chain)
    runs = Counter(zip(*(tokens[i:] for i in range(n)), strict=False))
    return 1 - len(runs) / runs.total() if runs else 0.0


def longest_paragraph(chain: str) -> int:
    """Words between two blank lines, where there are most of them; code does not count."""
    paragraphs = re.split(r"\n\s*\n", _BLOCK.sub("\n\n", chain))
    return max(sum(word.size for word in words(paragraph)) for paragraph in paragraphs)


def code_share(chain: str) -> float:
    """The share of characters within ``` fences."""
    return sum(map(len, _BLOCK.findall(chain))) / len(chain) if chain else 0.0


@dataclass(frozen=True)
class Readable:
    """The limits of a readable chain. With the defaults a page of worked mathematics passes and a loop does not."""

    language: str = "en"
    others: tuple[str, ...] = EUROPEAN
    # one foreign word in twenty, where names of people and places still pass
    consistency: float = 0.95
    # repeated lines: a checked result may stand twice, a loop makes it 0.5 and more
    lines: float = 0.2
    # repeated runs of eight words; sums worked step by step reach 0.1
    ngrams: float = 0.2
    # words; a wall of text that nobody reads
    paragraph: int = 300
    # share of the characters; 0 allows no code block at all, as R1 did
    code: float = 0.5
    # more are scraps and second attempts rather than a program
    blocks: int = 3

    def __post_init__(self) -> None:
        check_fields(self, "readable")
        check_share(self, "readable", "consistency", "lines", "ngrams", "code")

    def __call__(self, chain: str) -> bool:
        return not self.faults(chain)

    def faults(self, chain: str) -> tuple[str, ...]:
        """What is wrong with a chain, cheap tests first; a chain without words has no language to be mixed."""
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
