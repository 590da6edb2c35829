r"""Multiple choice from a user's file. No torch here.

A record is {"question": …, "choices": […], "answer": …}: two to ten choices, and the right one as its letter, its
place (counted from 0) or its text.
"""

import hashlib
import random
import re
from dataclasses import dataclass
from functools import cached_property
from typing import Any

from finback.config import UserError, check_fields
from finback.tasks import answers
from finback.tasks.records import Record, read
from finback.tasks.task import Problem, Verdict

_LETTERS = "ABCDEFGHIJ"
_NAMED = re.compile(r"(?:(?:the )?(?:final )?answer(?: is)?\s*:?\s*)?\(?\b([A-J])\b\)?[.:)]?", re.IGNORECASE)
_LABELLED = re.compile(r"\(?([A-J])[.:)]\)?\s+(\S.*)", re.IGNORECASE | re.DOTALL)
# Choices that speak of others by their place must keep it.
_BOUND = re.compile(r"\b(?:above|below|preceding|following)\b|\b[A-J](?:,| and| or| &) [A-J]\b")


@dataclass(frozen=True)
class Choice:
    """An answer is right if it names exactly one letter, the right one: B, (B), B., Answer: B, \\boxed{B}, or its text.

    `shuffle` orders the choices by a hash of the question, so that "mostly C" cannot be learnt from a file; the order
    is the same in every run. Choices such as "All of the above" keep a question as it is.
    """

    # a .jsonl, .json or .parquet file, or hub:owner/name
    source: str
    subset: str = ""
    split: str = "train"
    question_field: str = "question"
    choices_field: str = "choices"
    answer_field: str = "answer"
    # stands after the choices
    instruction: str = "Answer with the letter alone."
    shuffle: bool = True
    # the name in tables
    label: str = ""

    def __post_init__(self) -> None:
        check_fields(self, "choice")

    @property
    def name(self) -> str:
        return self.label or self.source.rsplit("/", 1)[-1].rsplit(".", 1)[0]

    def draw(self, rng: random.Random) -> Problem:
        return rng.choice(self._problems)

    def check(self, problem: Problem, answer: str) -> Verdict:
        letter = named(answer, self._choices.get(problem.key, []))
        return Verdict(correct=letter == problem.answer, well_formed=letter is not None)

    @cached_property
    def _problems(self) -> tuple[Problem, ...]:
        return tuple(problem for problem, _ in self._known.values())

    @cached_property
    def _choices(self) -> dict[str, list[str]]:
        return {key: choices for key, (_, choices) in self._known.items()}

    @cached_property
    def _known(self) -> dict[str, tuple[Problem, list[str]]]:
        """Problems with their choices in the order shown, by the key; of copies the first."""
        known: dict[str, tuple[Problem, list[str]]] = {}
        for record in read(self.source, self.subset, self.split):
            problem, choices = self._problem(record)
            known.setdefault(problem.key, (problem, choices))
        return known

    def _problem(self, record: Record) -> tuple[Problem, list[str]]:
        question = record.text(self.question_field).strip()
        choices = self._listed(record)
        right = choices[_place(record, self.answer_field, choices)]
        # "Which of these is true?" is another problem with other choices, but not with another order of them.
        key = " ".join("\n".join([question, *sorted(choices)]).split()).lower()
        if self.shuffle and not any(map(_BOUND.search, choices)):
            choices.sort(key=lambda choice: hashlib.blake2b(f"{key}\n{choice}".encode()).digest())
        lines = [f"{letter}. {choice}" for letter, choice in zip(_LETTERS, choices, strict=False)]
        text = "\n".join([question, *lines, *([self.instruction] if self.instruction else [])])
        return Problem(question=text, answer=_LETTERS[choices.index(right)], key=key), choices

    def _listed(self, record: Record) -> list[str]:
        """The choices, each on one line."""
        if self.choices_field not in record.fields:
            record.text(self.choices_field)  # says which fields there are
        listed = record.fields[self.choices_field]
        is_list = isinstance(listed, list) and all(isinstance(c, (str, int, float)) for c in listed)
        choices = [" ".join(str(choice).split()) for choice in listed] if is_list else []
        if not 2 <= len(choices) <= len(_LETTERS) or not all(choices) or len(set(choices)) < len(choices):
            raise UserError(
                f"{record.where} {self.choices_field}", listed, "not 2 to 10 different texts", "Correct the record."
            )
        return choices


def named(answer: str, choices: list[str]) -> str | None:
    """The one letter that an answer names, or whose choice it repeats."""
    text = answers.final_answer(answer)
    if text is None or len(text) > 2000:
        return None
    text = " ".join(re.sub(r"\\(?:text|textbf|mathrm)\s*\{([^{}]*)\}", r"\1", text).split())
    letters = _LETTERS[: len(choices)]
    match, labelled = _NAMED.fullmatch(text), _LABELLED.fullmatch(text)
    if match and match[1].upper() in letters:
        return match[1].upper()
    letter = labelled[1].upper() if labelled else ""
    said = _letter(labelled[2] if labelled else text, choices)
    return said if said is not None and letter in ("", said) else None


def _letter(text: str, choices: list[str]) -> str | None:
    """The letter of the choice that a text repeats; case and a full stop do not count where that is no ambiguity."""
    exact = [i for i, choice in enumerate(choices) if choice == text]
    alike = [i for i, choice in enumerate(choices) if _plain(choice) == _plain(text)]
    found = exact or alike
    return _LETTERS[found[0]] if len(found) == 1 else None


def _plain(text: str) -> str:
    text = text.removesuffix(".")
    return text.lower() if text.isascii() else text


def _place(record: Record, name: str, choices: list[str]) -> int:
    """Where the right choice stands, from a letter, a place or a text; UserError if they could mean two."""
    value: Any = record.fields.get(name)
    text = " ".join(record.text(name).split())
    places = set[int]()
    if isinstance(value, str):
        places |= {i for i, choice in enumerate(choices) if choice == text}
        places |= {_LETTERS.index(text.upper())} if len(text) == 1 and text.upper() in _LETTERS else set()
    if not places and text.isdecimal() and text.isascii():
        places = {int(text)}
    if len(places) == 1 and max(places) < len(choices):
        return max(places)
    problem = "could be a letter or a text" if len(places) > 1 else "names none of the choices"
    raise UserError(f"{record.where} {name}", value, problem, "Give the letter, the text, or the place from 0.")
