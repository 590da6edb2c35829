"""Decontamination: finding the questions of an exam in training text."""

import re
from collections.abc import Iterator, Mapping, Sequence

from finback.data.blocks import runs, squeeze
from finback.data.sources import Document

_WORD = re.compile(r"\w+")


class Decontaminator:
    """Whether a document gives a question away: by n words in a row, or by holding a whole question.

    n-grams (GPT-3 appendix C took 13, R1's data 10) find long questions in prose whatever their punctuation; those that
    questions of the training side share are a task's wording and betray nothing. Short questions have no n-gram; they
    are found where a message, a text or a line of either is the question and nothing else, signs included, for sums are
    made of signs.
    """

    def __init__(self, held_out: Mapping[str, Sequence[str]], trained: Mapping[str, Sequence[str]], ngram: int) -> None:
        self.ngram = ngram
        self.whole = {_plain(q): task for task, asked in held_out.items() for q in asked}
        self.grams = {g: task for task, asked in held_out.items() for q in asked for g in grams(q, ngram)}
        for asked in trained.values():
            for question in asked:
                for gram in grams(question, ngram):
                    self.grams.pop(gram, None)

    def find(self, document: Document) -> str | None:
        """The task whose question the document holds, if it does."""
        return next((task for task, _ in self.hits(document)), None)

    def hits(self, document: Document) -> Iterator[tuple[str, bool]]:
        """Every trace of a question in the document: its task, and whether the question stands there whole."""
        for text in [t for m in document.messages for t in (m.content, m.reasoning)] or [document.text]:
            for part in {text, *text.split("\n")}:
                if task := self.whole.get(_plain(part)):
                    yield task, True
            for gram in runs(text.casefold(), _WORD, self.ngram) if self.grams else ():
                if task := self.grams.get(gram):
                    yield task, False


def _plain(text: str) -> str:
    return squeeze(text.casefold()).rstrip(" .?!")


def grams(text: str, n: int) -> list[str]:
    """All runs of n words of a text; case and punctuation do not count."""
    return list(runs(text.casefold(), _WORD, n))
