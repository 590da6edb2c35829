r"""Multiple choice from a user's file. Does not import torch.

A record is {"question": …, "choices": […], "answer": …} with two to ten choices; the answer is the right choice's letter,
its index (from 0), or its text.
"""

import hashlib
import re
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any

from finback.config import UserError, check_fields
from finback.tasks.letters import LETTERS, named
from finback.tasks.records import Record, RecordTask, read
from finback.tasks.task import Problem, Verdict, canonical

# Choices that refer to others by position keep their order.
_BOUND = re.compile(r"\b(?:above|below|preceding|following)\b|\b[A-J](?:,| and| or| &) [A-J]\b")


@dataclass(frozen=True)
class Choice(RecordTask):
    """Multiple choice. A reply must name exactly one letter, the right one: B, (B), B., Answer: B, \\boxed{B}, or its text.

    `shuffle` orders the choices by a hash of the question, so that a model cannot learn "mostly C" from a file; the order
    is the same in every run. Questions with choices such as "All of the above" are not shuffled.
    """

    instruction: str = "Answer with the letter alone."
    # field that holds the list of choices
    choices_field: str = "choices"
    # order the choices by a hash of the question
    shuffle: bool = True

    def __post_init__(self) -> None:
        check_fields(self, "choice")

    def check(self, problem: Problem, answer: str) -> Verdict:
        _, choices = self.by_key.get(problem.key, (problem, []))
        letter = named(answer, choices)
        return Verdict(correct=letter == problem.answer, well_formed=letter is not None)

    def problems(self) -> Iterator[tuple[Problem, list[str]]]:
        """Each problem, with its choices in the order shown."""
        return map(self._problem, read(self.source, self.subset, self.split))

    def _problem(self, record: Record) -> tuple[Problem, list[str]]:
        question = record.text(self.question_field).strip()
        choices = self._listed(record)
        right = choices[_place(record, self.answer_field, choices)]
        # "Which of these is true?" is a different problem with other choices, but not with the same ones in another order.
        key = canonical("\n".join([question, *sorted(choices)]))
        choices = ordered(key, choices) if self.shuffle else choices
        shown = "\n".join([lettered(question, choices), *([self.instruction] if self.instruction else [])])
        return Problem(question=shown, answer=LETTERS[choices.index(right)], key=key), choices

    def _listed(self, record: Record) -> list[str]:
        """The choices, each as one line."""
        listed = record.value(self.choices_field)
        is_list = isinstance(listed, list) and all(isinstance(c, (str, int, float)) for c in listed)
        choices = [" ".join(str(choice).split()) for choice in listed] if is_list else []
        if not 2 <= len(choices) <= len(LETTERS) or not all(choices) or len(set(choices)) < len(choices):
            where = f"{record.where} {self.choices_field}"
            raise UserError(where, listed, "not 2 to 10 different texts", "Correct the record.")
        return choices


def ordered(key: str, choices: list[str]) -> list[str]:
    """The choices of a question, ordered by a hash; in their own order if one refers to others by position."""
    if any(map(_BOUND.search, choices)):
        return choices
    return sorted(choices, key=lambda choice: hashlib.blake2b(f"{key}\n{choice}".encode()).digest())


def lettered(question: str, choices: Sequence[str]) -> str:
    """A question followed by its choices, A. to J."""
    return "\n".join([question, *(f"{letter}. {choice}" for letter, choice in zip(LETTERS, choices, strict=False))])


def _place(record: Record, name: str, choices: list[str]) -> int:
    """Index of the right choice, from a letter, an index or a text; UserError if it is ambiguous or matches none."""
    value: Any = record.fields.get(name)
    text = " ".join(record.text(name).split())
    places = set[int]()
    if isinstance(value, str):
        places |= {i for i, choice in enumerate(choices) if choice == text}
        places |= {LETTERS.index(text.upper())} if len(text) == 1 and text.upper() in LETTERS else set()
    if not places and text.isdecimal() and text.isascii():
        places = {int(text)}
    if len(places) == 1 and max(places) < len(choices):
        return max(places)
    problem = "could be a letter or a text" if len(places) > 1 else "is none of the choices"
    raise UserError(f"{record.where} {name}", value, problem, "Give the letter, the text, or the index from 0.")
