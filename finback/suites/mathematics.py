r"""GSM8K, MATH-500, AIME: questions with a number or formula as answer, requested in \boxed{}. Does not import torch."""

from collections.abc import Sequence
from dataclasses import dataclass

from finback.suites.hub import KNOWN, HubDataset
from finback.suites.problems import ProblemList, agreed, fingerprint, pick, sound
from finback.suites.suite import Suite, SuiteSource
from finback.tasks import answers
from finback.tasks.records import Record
from finback.tasks.task import Problem, canonical

# The prompt that R1's model card recommends for mathematics (its README, "Usage Recommendations").
BOXED = "{question}\nPlease reason step by step, and put your final answer within \\boxed{}."
EXTRACTION = (
    r'\boxed{}, or ####, or <answer>, or after "The answer is", or all of it; two different answers count as none'
)


@dataclass(frozen=True)
class MathSet:
    """A published set of mathematical questions and the names of its fields."""

    origin: HubDataset
    question: str
    answer: str
    chance: float | None = None


SETS = {
    "gsm8k": MathSet(KNOWN["gsm8k"], "question", "answer"),
    "math500": MathSet(KNOWN["math500"], "problem", "answer"),
    "aime24": MathSet(KNOWN["aime24"], "Problem", "Answer", chance=0.001),  # one of 000 to 999
    "aime25": MathSet(KNOWN["aime25"], "problem", "answer", chance=0.001),
}


def load(name: str, at: str, problems: int | None, seed: int) -> Suite:
    """The set called `name`, from the hub or from `at`."""
    math_set = SETS[name]
    read = [problem(record, math_set) for record in math_set.origin.records(at)]
    return made(name, read, math_set, math_set.origin.name(at), problems, seed)


def made(name: str, every: Sequence[Problem], math_set: MathSet, source: str, problems: int | None, seed: int) -> Suite:
    """The suite of at most `problems` of these; a problem is left out if its gold answer fails the check."""
    agreeing, torn = agreed(every, lambda one, two: one.answer == two.answer or answers.check(one, two.answer).correct)
    chosen = pick(agreeing, problems, seed)
    good, notes = sound(name, chosen, answers.fault)
    return Suite(
        name=name,
        problems=tuple(good),
        task=ProblemList(name, tuple(good), answers.check, waits=True),
        source=SuiteSource(source, math_set.origin.licence, fingerprint(good)),
        prompt=BOXED,
        extraction=EXTRACTION,
        chance=math_set.chance,
        notes=torn | notes,
    )


def problem(record: Record, math_set: MathSet) -> Problem:
    """A record as a question and its gold answer."""
    question = record.text(math_set.question).strip()
    answer, solution = answers.gold(record.text(math_set.answer).strip())
    return Problem(
        question=question,
        answer=answer,
        key=canonical(question),
        solution=solution,
        tags=record.tags(level="level", subject="subject"),
    )
