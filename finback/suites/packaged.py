"""Questions from the package `evals`, for use without the hub: `pip install --no-deps evals`, 46 MB. Does not import torch.

evals-mmlu        991 questions of MMLU
evals-logiqa      677 questions on logical reading (each is in the file twice)
evals-quartz      3,828 questions on qualitative cause and effect, two choices each; 16 more have two gold answers
evals-born-first  112 yes-or-no questions on who was born first; one more has two gold answers
evals-aime        15 questions in the style of AIME
"""

import importlib.metadata
import importlib.util
import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

from finback.config import UserError
from finback.extras import how_to_install
from finback.suites import choice, mathematics
from finback.suites.choice import ChoiceSet
from finback.suites.hub import HubDataset
from finback.suites.mathematics import MathSet
from finback.suites.suite import Suite
from finback.tasks.letters import LETTERS
from finback.tasks.records import Record, read
from finback.tasks.task import Problem, canonical

_CHOICE = re.compile(r"^[ \t]*([A-J])[.:)][ \t]*(\S.*)$", re.MULTILINE)
_MIT = "MIT"


def load(name: str, at: str, problems: int | None, seed: int) -> Suite:
    """The questions called `name`, or others of the same form from `at`."""
    (file, as_problem), source = SETS[name], at
    if not at:
        at, source = _path(name), f"evals {importlib.metadata.version('evals')} {file}"
    pairs = [as_problem(record) for record in read(at, "", "")]
    if name == "evals-aime":
        math_set = MathSet(HubDataset("", licence=_MIT), "question", "answer", chance=0.001)
        return mathematics.made(name, [p for p, _ in pairs], math_set, source, problems, seed)
    choice_set = ChoiceSet(HubDataset("", licence=_MIT), choice.mmlu)
    return choice.made(name, choice_set, pairs, problems, seed, source)


def _path(name: str) -> str:
    spec = importlib.util.find_spec("evals")
    path = Path(spec.origin).parent / "registry" / "data" / SETS[name][0] if spec and spec.origin else None
    if path is None or not path.is_file():
        raise UserError("suite", name, "the package evals is not installed", how_to_install("--no-deps", "evals"))
    return str(path)


def _asked(record: Record) -> tuple[str, str]:
    """The user turn and the ideal answer; the system turn is dropped, because the suite's prompt asks for the same."""
    turns: Any = record.fields.get("input")
    listed = turns if isinstance(turns, list) else []
    prompts = [t.get("content") for t in listed if isinstance(t, dict) and t.get("role") == "user"]
    if len(prompts) != 1 or not isinstance(prompts[0], str):
        raise UserError(f"{record.where} input", turns, "not exactly one user turn", "Correct the record.")
    return prompts[0].strip(), record.text("ideal").strip()


def _chat(record: Record) -> tuple[Problem, list[str]]:
    return _lettered(record, *_asked(record))


def _plain(record: Record) -> tuple[Problem, list[str]]:
    return _lettered(record, record.text("question").strip(), record.text("answer").strip())


def _lettered(record: Record, question: str, ideal: str) -> tuple[Problem, list[str]]:
    """A problem whose choices are lines of the question."""
    question = re.sub(r"\s*Answer:\s*$", "", question)
    found = _CHOICE.findall(question)
    while found and [letter for letter, _ in found] != list(LETTERS[: len(found)]):
        found = found[1:]  # a line of the question itself may look like a choice
    choices = [" ".join(text.split()) for _, text in found]
    if not 2 <= len(choices) <= len(LETTERS) or ideal not in LETTERS[: len(choices)]:
        raise UserError(record.where, ideal, "not the letter of one of the question's choices", "Correct the record.")
    return Problem(question, ideal, canonical(question)), choices


def _yes_or_no(record: Record) -> tuple[Problem, list[str]]:
    question, ideal = _asked(record)
    question = f"{question.removesuffix('Answer Y or N.').strip()}\nA. Yes\nB. No"
    if ideal not in ("Y", "N"):
        raise UserError(f"{record.where} ideal", ideal, "neither Y nor N", "Correct the record.")
    return Problem(question, "A" if ideal == "Y" else "B", canonical(question)), ["Yes", "No"]


def _number(record: Record) -> tuple[Problem, list[str]]:
    question, ideal = _asked(record)
    return Problem(question, ideal, canonical(question)), []


# By suite: a file of the package, and the function that reads its records as a problem and choices (none for numbers).
SETS: dict[str, tuple[str, Callable[[Record], tuple[Problem, list[str]]]]] = {
    "evals-mmlu": ("sandbagging/samples-non-ast.jsonl", _plain),
    "evals-logiqa": ("logiqa/logiqa.jsonl", _chat),
    "evals-quartz": ("quartz/samples.jsonl", _chat),
    "evals-born-first": ("born_first/born_first.jsonl", _yes_or_no),
    "evals-aime": ("aime_evaluation/samples.jsonl", _number),
}
