"""Small talk with a check for what can be checked: is the reply a sentence of words that people use, not a sum.

The prompts are how the dialogues of the packaged Chit Chat corpus begin. No torch here.
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
_KEY = "talk: "  # part of the text whose hash says on which side of the split a problem lies
_COMMON = 3  # times that a word must occur in the corpus to count as one that people use


@dataclass(frozen=True)
class SmallTalk:
    """A reply is right if it has between `least` and `most` words, nearly all of them known, no digits, and few repeats.

    Nothing here says that a reply is apt: that is for people, or for a judge.
    """

    # words of a right reply
    least: int = 3
    # words of a right reply
    most: int = 40
    # share of the words that must occur in the corpus
    known: float = 0.9
    # share of the words that must differ from each other
    different: float = 0.6

    def __post_init__(self) -> None:
        check_fields(self, "small_talk")
        check_positive(self, "small_talk", "least", "most")

    @property
    def name(self) -> str:
        return "talk"  # part of an exam's seed: another name draws other problems

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
    """How dialogues begin, and the words that occur a few times."""
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
