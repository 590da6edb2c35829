"""How many of a suite's questions stand in a prepared training corpus: whole, or by n words in a row. Does not import torch.

What was really trained on is looked at: the shards of a prepare stage, read back into text. Neither test finds a
question that was translated or put in other words, and a clean result for one's own data is none for the data
of a model that somebody else trained.
"""

import re
from collections import Counter
from collections.abc import Iterator
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from finback.config import UserError, did_you_mean
from finback.data import pack
from finback.data.decontamination import Decontaminator, grams
from finback.data.sources import Document
from finback.data.tokenizer import Tokenizer
from finback.data.turn import Message
from finback.runs.files import read_json
from finback.suites.suite import Suite

CHUNK = 1 << 16  # tokens of a document that are read at a time; its pieces overlap
SEAM = 1024  # tokens
_MARK = r"<[|｜][^<>]{1,40}[|｜]>|</?think>"  # of any model's turns


@dataclass(frozen=True)
class Contamination:
    """Questions of a suite that a corpus holds. `exact` of them stand there as a line, a message or a text of its own."""

    suite: str
    data: str
    ngram: int
    questions: int
    exact: int
    # share n words in a row with the corpus, or are exact
    overlapping: int
    # that were read
    documents: int
    # questions found in each source; one may be in several
    sources: dict[str, int]
    # the first of the questions that were found
    examples: tuple[str, ...]
    # questions of fewer than n words: only the exact test can find them
    without_ngram: int

    @property
    def share(self) -> float:
        """Of the questions that are not new to whoever trained on this."""
        return self.overlapping / self.questions

    def as_json(self) -> dict[str, Any]:
        return {**asdict(self), "share": self.share}


def check(suite: Suite, data: str | Path, ngram: int = 13, sources: tuple[str, ...] = ()) -> Contamination:
    """Look for a suite's questions in a prepare stage's folder (or in those of its `sources` that are named).

    Words that several questions of the suite share are its wording and betray none of them.
    """
    if ngram < 2:
        raise UserError("contamination.ngram", ngram, "single words are in every text", "Use 8 to 13.")
    folder = Path(data)
    names = _sources(folder, sources)
    tokenizer = Tokenizer(folder)
    questions = {str(i): [problem.question] for i, problem in enumerate(suite.problems)}
    decontaminator = Decontaminator(questions, _shared(questions, ngram), ngram)
    found: dict[str, set[str]] = {}
    exact, documents = set[str](), 0
    for name in names:
        found[name] = set()
        for ids, starts in _pieces(folder, name):
            documents += starts
            for number, whole in decontaminator.hits(_split(tokenizer, ids)):
                found[name].add(number)
                exact |= {number} if whole else set()
    every = sorted(set().union(*found.values()), key=int)
    short = sum(not grams(problem.question, ngram) for problem in suite.problems)
    return Contamination(
        suite=suite.name,
        data=str(data),
        ngram=ngram,
        questions=len(suite.problems),
        exact=len(exact),
        overlapping=len(every),
        documents=documents,
        sources={name: len(numbers) for name, numbers in found.items()},
        examples=tuple(suite.problems[int(number)].question[:200] for number in every[:5]),
        without_ngram=short,
    )


def _sources(folder: Path, wanted: tuple[str, ...]) -> list[str]:
    if not (folder / "sources.json").is_file():
        problem = "no folder of a finished prepare stage (no sources.json)"
        raise UserError("contamination.data", str(folder), problem, "Name one, such as runs/tiny/prepare.")
    known = list(read_json(folder / "sources.json"))
    for name in wanted:
        if name not in known:
            raise UserError("contamination.sources", name, "not a prepared source", did_you_mean(name, known))
    return list(wanted) or known


def _pieces(folder: Path, name: str) -> Iterator[tuple[list[int], bool]]:
    """The documents that are trained on, and whether one starts; pieces of a long one overlap, so no seam hides a thing."""
    shard = pack.read(folder / f"{name}.train.bin")
    start = 0
    for end in [len(shard)] if shard.ends is None else shard.ends.tolist():
        for begin in range(start, max(start + 1, end - SEAM), CHUNK - SEAM):
            yield shard[begin : min(end, begin + CHUNK)].tolist(), begin == start
        start = end


def _split(tokenizer: Tokenizer, ids: list[int]) -> Document:
    """A document as its turns and thoughts, without the marks around them: each can be a question and nothing else."""
    marks = {*tokenizer.ids, *tokenizer.specials.values()}
    pattern = "|".join([*map(re.escape, sorted(marks, key=len, reverse=True)), _MARK])
    parts = re.split(pattern, tokenizer.decode(ids, skip_special=False))
    return Document(tuple(Message("user", part) for part in parts if part.strip()))


def _shared(questions: dict[str, list[str]], ngram: int) -> dict[str, list[str]]:
    """The runs of n words that more than one question has, as texts."""
    runs = Counter(run for (question,) in questions.values() for run in {*grams(question, ngram)})
    return {"shared": [run for run, n in runs.items() if n > 1]}
