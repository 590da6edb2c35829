"""Counts a suite's questions that a prepared training corpus contains, in full or by n consecutive words. Does not import torch.

It searches the tokens that are trained on: the shards of a prepare stage, decoded to text. Neither test finds translated or
rephrased questions, and a clean result for one corpus says nothing about models trained on others.
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

CHUNK = 1 << 16  # tokens of a document that are read at a time; pieces overlap by SEAM
SEAM = 1024  # tokens
_MARK = r"<[|｜][^<>]{1,40}[|｜]>|</?think>"  # turn markers of any model


@dataclass(frozen=True)
class Contamination:
    """The questions of a suite that a corpus contains."""

    suite: str
    data: str
    ngram: int
    questions: int
    # questions that are a whole line, message or text of the corpus
    exact: int
    # questions that share n consecutive words with the corpus or are exact
    overlapping: int
    # documents read
    documents: int
    # questions found in each source; one may be in several
    sources: dict[str, int]
    # the first questions that were found
    examples: tuple[str, ...]
    # questions of fewer than n words, which only the exact test can find
    without_ngram: int

    @property
    def share(self) -> float:
        """The share of questions that the corpus contains."""
        return self.overlapping / self.questions

    def as_json(self) -> dict[str, Any]:
        """The report as JSON values, with the share of contaminated questions."""
        return {**asdict(self), "share": self.share}


def check(suite: Suite, data: str | Path, ngram: int = 13, sources: tuple[str, ...] = ()) -> Contamination:
    """Searches a prepare stage's folder, or only its named `sources`, for a suite's questions.

    Runs of words that several questions share are boilerplate of the suite and do not count as overlap. UserError: the
    folder or a source does not exist.
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
        problem = "not the folder of a finished prepare stage (it has no sources.json)"
        raise UserError("contamination.data", str(folder), problem, "Name one, such as runs/tiny/prepare.")
    known = list(read_json(folder / "sources.json"))
    for name in wanted:
        if name not in known:
            raise UserError("contamination.sources", name, "not a prepared source", did_you_mean(name, known))
    return list(wanted) or known


def _pieces(folder: Path, name: str) -> Iterator[tuple[list[int], bool]]:
    """Pieces of the training documents, and whether a document starts; pieces overlap, so that none splits a question."""
    shard = pack.read(folder / f"{name}.train.bin")
    start = 0
    for end in [len(shard)] if shard.ends is None else shard.ends.tolist():
        for begin in range(start, max(start + 1, end - SEAM), CHUNK - SEAM):
            yield shard[begin : min(end, begin + CHUNK)].tolist(), begin == start
        start = end


def _split(tokenizer: Tokenizer, ids: list[int]) -> Document:
    """A document split at turn and thought markers, so that a turn that is exactly a question is found."""
    marks = {*tokenizer.ids, *tokenizer.specials.values()}
    pattern = "|".join([*map(re.escape, sorted(marks, key=len, reverse=True)), _MARK])
    parts = re.split(pattern, tokenizer.decode(ids, skip_special=False))
    return Document(tuple(Message("user", part) for part in parts if part.strip()))


def _shared(questions: dict[str, list[str]], ngram: int) -> dict[str, list[str]]:
    """The runs of n words that more than one question contains."""
    runs = Counter(run for (question,) in questions.values() for run in {*grams(question, ngram)})
    return {"shared": [run for run, n in runs.items() if n > 1]}
