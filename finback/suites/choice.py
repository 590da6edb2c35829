"""MMLU, MMLU-Pro, GPQA Diamond, C-Eval: zero-shot multiple choice with a chain of thought before the letter. Does not import torch.

The letter that the answer names is scored. Choices of published sets keep the data set's order unless `shuffle` is set.
Those of GPQA, where the right one always comes first, and of a user's file are ordered by a hash: the order is the same for
everyone, and for a user's file it is the order used in training.
"""

import hashlib
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import partial
from typing import Any

from finback.config import UserError
from finback.suites.hub import KNOWN, HubDataset, digest
from finback.suites.problems import ProblemList, agreed, pick
from finback.suites.suite import Suite, SuiteSource
from finback.tasks.choice import lettered, ordered
from finback.tasks.letters import LETTERS, named
from finback.tasks.records import Record
from finback.tasks.task import Problem, Verdict, canonical

PROMPT = (
    "Answer the multiple-choice question below. Think step by step first. "
    'End with a line of the form "Answer: X", where X is the letter of the right choice.\n\n{question}'
)
CHINESE = "请回答下面的单项选择题。请先逐步思考，最后一行写“答案：X”，其中 X 是正确选项的字母。\n\n{question}"
EXTRACTION = (
    r'the letter in \boxed{} or in the last line "Answer: X", else "The answer is X", or all of the answer; '
    "two different letters count as none"
)

Asked = tuple[str, list[str], int]  # the question, its choices, the index of the right one


def mmlu(record: Record) -> Asked:
    """cais/mmlu: question, choices, answer (an index)."""
    return record.text("question").strip(), record.texts("choices"), _place(record, "answer")


def mmlu_pro(record: Record) -> Asked:
    """TIGER-Lab/MMLU-Pro: question, options (three to ten), answer (a letter)."""
    return record.text("question").strip(), record.texts("options"), _place(record, "answer")


def gpqa(record: Record) -> Asked:
    """Idavidrein/gpqa: the right answer and three wrong ones, each in a column."""
    names = ["Correct Answer", *(f"Incorrect Answer {i}" for i in (1, 2, 3))]
    question, choices = record.text("Question").strip(), [record.text(name).strip() for name in names]
    order = sorted(range(4), key=lambda i: hashlib.sha256(f"{question}\n{choices[i]}".encode()).digest())
    return question, [choices[i] for i in order], order.index(0)


def columns(record: Record) -> Asked:
    """ceval/ceval-exam: question, A, B, C, D, answer (a letter); CMMLU has the same columns, capitalized."""
    question = record.text("question", "Question").strip()
    place = _place(record, "answer" if "answer" in record.fields else "Answer")
    return question, [record.text(letter).strip() for letter in "ABCD"], place


@dataclass(frozen=True)
class ChoiceSet:
    """A published set of questions with choices, and the function that reads its records."""

    origin: HubDataset
    read: Callable[[Record], Asked]
    prompt: str = PROMPT
    language: str = ""


SETS = {
    "mmlu": ChoiceSet(KNOWN["mmlu"], mmlu),
    "mmlu-pro": ChoiceSet(KNOWN["mmlu-pro"], mmlu_pro),
    "gpqa": ChoiceSet(KNOWN["gpqa"], gpqa),
    # The answers of its test split are not published, so others report the validation split too.
    "ceval": ChoiceSet(KNOWN["ceval"], columns, CHINESE, "zh"),
}


def load(name: str, at: str, problems: int | None, seed: int, subset: str = "", shuffle: bool = False) -> Suite:
    """The set called `name`; `subset` is one of the hub's configurations, such as C-Eval's "computer_network"."""
    choice_set = SETS[name]
    if subset:
        choice_set = replace(choice_set, origin=replace(choice_set.origin, subset=subset))
    if not at and name == "ceval" and not subset:
        remedy = "Name one, such as ceval?subset=computer_network, or a file of your own with ceval@FILE."
        raise UserError("suite", name, "C-Eval has one data set for each of its 52 subjects", remedy)
    asked = [problem(record, choice_set.read, shuffle) for record in choice_set.origin.records(at)]
    return made(name, choice_set, asked, problems, seed, choice_set.origin.name(at))


def made(
    name: str,
    choice_set: ChoiceSet,
    asked: Sequence[tuple[Problem, list[str]]],
    problems: int | None,
    seed: int,
    source: str,
) -> Suite:
    """The suite of these problems, each given with its choices."""
    choices = {problem.key: shown for problem, shown in reversed(asked)}  # the first of several copies wins
    golds = {id(problem): shown[LETTERS.index(problem.answer)] for problem, shown in asked}
    every, notes = agreed([p for p, _ in asked], lambda one, other: golds[id(one)] == golds[id(other)])
    chosen = pick(every, problems, seed)
    return Suite(
        name=name,
        problems=chosen,
        task=ProblemList(name, chosen, partial(judge, choices), read=partial(letter, choices)),
        source=SuiteSource(source, choice_set.origin.licence, digest([p.question, p.answer] for p in chosen)),
        prompt=choice_set.prompt,
        extraction=EXTRACTION,
        chance=sum(1 / len(choices[p.key]) for p in chosen) / len(chosen),
        language=choice_set.language,
        notes=notes,
    )


def judge(choices: Mapping[str, list[str]], problem: Problem, answer: str) -> Verdict:
    """Correct if the answer names exactly one letter, the gold one."""
    found = letter(choices, problem, answer)
    return Verdict(correct=found == problem.answer, well_formed=found is not None)


def letter(choices: Mapping[str, list[str]], problem: Problem, answer: str) -> str | None:
    """The letter that the answer names; None if it names none or several."""
    return named(answer, choices.get(problem.key, []))


def problem(record: Record, read: Callable[[Record], Asked], shuffle: bool = False) -> tuple[Problem, list[str]]:
    """A record as a problem, and its choices; UserError if the record is malformed."""
    question, raw, place = read(record)
    choices = [" ".join(choice.split()) for choice in raw]
    if not 2 <= len(choices) <= len(LETTERS):
        raise UserError(record.where, choices, "not 2 to 10 choices", "Correct the record.")
    if place >= len(choices):
        raise UserError(record.where, place, f"there are {len(choices)} choices", "Correct the answer.")
    if shuffle:
        right = choices[place]
        choices = ordered(canonical("\n".join([question, *sorted(choices)])), choices)
        place = choices.index(right)
    shown = lettered(question, choices)
    subject = record.fields.get("subject", record.fields.get("category"))
    tags: dict[str, int | str] = {"subject": subject} if isinstance(subject, str) else {}
    return Problem(shown, LETTERS[place], canonical(shown), tags=tags), choices


def _place(record: Record, name: str) -> int:
    """An index from 0, which the record holds as a number or as a letter."""
    value: Any = record.fields.get(name)
    if isinstance(value, str) and value.strip().upper() in tuple(LETTERS):
        return LETTERS.index(value.strip().upper())
    if isinstance(value, int) and not isinstance(value, bool) and 0 <= value < len(LETTERS):
        return value
    record.text(name)  # raises an error that lists the record's fields, if the field is missing
    problem = "neither a letter from A to J nor an index from 0"
    raise UserError(f"{record.where} {name}", value, problem, "Correct the record.")
