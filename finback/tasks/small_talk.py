"""Small talk, with a simple check: the reply is a sentence of common words, not a sum.

The prompts are first turns of the packaged Chit Chat corpus. Does not import torch.
"""

import importlib.util
import json
import random
import re
from collections import Counter
from dataclasses import dataclass
from functools import lru_cache
from pathlib import Path

from finback.config import UserError, check_fields, check_positive
from finback.extras import how_to_install
from finback.tasks.task import NO_ANSWER, Problem, Verdict, canonical

_WORD = re.compile(r"[^\W\d_]+(?:['’][^\W\d_]+)*")
_KEY = "talk: "  # part of the hashed text that decides a problem's side of the split
_COMMON = 3  # occurrences in the corpus that make a word common


@dataclass(frozen=True)
class SmallTalk:
    """A reply is right if it has between `least` and `most` words, nearly all common, no digits, and little repetition.

    This does not check that a reply makes sense, which needs people or a judge.
    """

    # fewest words of a right reply
    least: int = 3
    # most words of a right reply
    most: int = 40
    # minimum share of words that occur in the corpus
    known: float = 0.9
    # minimum share of distinct words
    different: float = 0.6

    def __post_init__(self) -> None:
        check_fields(self, "small_talk")
        check_positive(self, "small_talk", "least", "most")

    @property
    def name(self) -> str:
        return "talk"  # part of an exam's seed: renaming it would change the problems

    def draw(self, rng: random.Random) -> Problem:
        text = rng.choice(_corpus()[0])
        return Problem(question=text, answer="", key=f"{_KEY}{canonical(text)}")

    def check(self, problem: Problem, answer: str) -> Verdict:
        words = [w.lower().replace("’", "'") for w in _WORD.findall(answer[:2000])]
        count = len(words)
        fits = self.least <= count <= self.most and not re.search(r"\d", answer)
        if not fits or canonical(answer) == problem.key.removeprefix(_KEY):
            return NO_ANSWER
        known = sum(w in _corpus()[1] for w in words) / count
        good = known >= self.known and len(set(words)) / count >= self.different
        return Verdict(correct=good, well_formed=good)


@lru_cache(maxsize=1)
def _corpus() -> tuple[list[str], frozenset[str]]:
    """First turns of dialogues, and the words that occur often enough."""
    spec = importlib.util.find_spec("chitchat_dataset")
    if spec is None or spec.origin is None:
        problem, remedy = "the package is not installed", how_to_install("chitchat-dataset")
        raise UserError("small_talk", "chitchat_dataset", problem, remedy)
    text = (Path(spec.origin).parent / "dataset.json").read_text(encoding="utf-8")
    begins: set[str] = set()
    counts: Counter[str] = Counter()
    for dialogue in json.loads(text).values():
        turns = [" ".join(line["text"] for line in turn) for turn in dialogue["messages"]]
        counts.update(w.lower().replace("’", "'") for turn in turns for w in _WORD.findall(turn))
        if turns and not re.search(r"\d", turns[0]) and 0 < len(turns[0]) <= 120:
            begins.add(" ".join(turns[0].split()))
    return sorted(begins), frozenset(w for w, n in counts.items() if n >= _COMMON)
