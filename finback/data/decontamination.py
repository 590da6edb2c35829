"""Decontamination: finds exam questions in training text."""

import re
from collections.abc import Iterable, Iterator, Mapping, Sequence

from finback.data.blocks import runs, squeeze
from finback.data.sources import Document

START, LETTERS = 12, 6  # minimum characters and letters of a question that is searched for within a line
_WORD = re.compile(r"\w+")
_PART = {*"abcdefghijklmnopqrstuvwxyz0123456789+-*/=^%"}
_BEGINS = re.compile(r"(?<![a-z0-9+\-*/=^%])\S")


class Decontaminator:
    """Finds documents that give away a held-out question: by an n-gram of words, or by containing the whole question.

    n-grams (13 in GPT-3's appendix C, 10 for R1's data) find long questions in prose regardless of punctuation; those that
    also occur in training-side questions are a task's common wording and are ignored. Short questions have no n-gram: they are
    found if a message, a text or a line of either equals the question, punctuation included, since it distinguishes
    sums; questions made of words are also found within a line.
    """

    def __init__(self, held_out: Mapping[str, Sequence[str]], trained: Mapping[str, Sequence[str]], ngram: int) -> None:
        self.ngram = ngram
        self.whole = {_plain(q): task for task, asked in held_out.items() for q in asked}
        self.grams = {g: task for task, asked in held_out.items() for q in asked for g in grams(q, ngram)}
        for asked in trained.values():
            for question in asked:
                for gram in grams(question, ngram):
                    self.grams.pop(gram, None)
        self.embedded = _Embedded((q, task) for task, asked in held_out.items() for q in asked)

    def find(self, document: Document) -> str | None:
        """The task whose question the document contains, or None."""
        said = [m.content for m in document.messages if m.role != "system"] or [document.text]
        return next((task for task, _ in self.hits(document)), None) or next(
            filter(None, map(self.embedded.find, said)), None
        )

    def hits(self, document: Document) -> Iterator[tuple[str, bool]]:
        """Every trace of a question in the document: its task, and whether the whole question occurs."""
        for text in [t for m in document.messages for t in (m.content, m.reasoning)] or [document.text]:
            for part in {text, *text.split("\n")}:
                if task := self.whole.get(_plain(part)):
                    yield task, True
            for gram in runs(text.casefold(), _WORD, self.ngram) if self.grams else ():
                if task := self.grams.get(gram):
                    yield task, False


class _Embedded:
    """Finds short questions within a line, such as "Question: Who wrote Hamlet? Answer:"; not sums, which are too similar.

    The question must have at least 12 characters and 6 letters. It must not be part of a longer word or sum; one that ends
    without punctuation must be at the end of a line or sentence.
    """

    def __init__(self, questions: Iterable[tuple[str, str]]) -> None:
        self.tasks: dict[str, str] = {}
        # for each beginning, the lengths of questions that start with it
        self.lengths: dict[str, set[int]] = {}
        for text, task in questions:
            question = _laid_out(text)
            if len(question) >= START and sum(map(str.isalpha, question)) >= LETTERS:
                self.tasks.setdefault(question, task)
                self.lengths.setdefault(question[:START], set()).add(len(question))

    def find(self, text: str) -> str | None:
        """The task whose question occurs in the text, or None."""
        if not self.tasks:
            return None
        whole = _laid_out(text)
        for match in _BEGINS.finditer(whole):
            start = match.start()
            for length in self.lengths.get(whole[start : start + START], ()):
                question, behind = whole[start : start + length], whole[start + length : start + length + 1]
                ends = not question[-1].isalnum() or not (behind in _PART or (behind == " " and question[-1].isascii()))
                if question in self.tasks and (not behind or ends):
                    return self.tasks[question]
        return None


def _laid_out(text: str) -> str:
    """Lines with single spaces, in lower case."""
    return "\n".join(filter(None, map(squeeze, text.casefold().split("\n"))))


def _plain(text: str) -> str:
    return squeeze(text.casefold()).rstrip(" .?!")


def grams(text: str, n: int) -> list[str]:
    """All n-grams of words of a text, ignoring case and punctuation."""
    return list(runs(text.casefold(), _WORD, n))
