"""A task whose problems are a fixed list, and functions that select a suite's problems. Does not import torch."""

import random
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass

from finback.config import UserError
from finback.suites.hub import digest
from finback.tasks.task import Problem, Verdict

_UNSOUND = 0.01  # share of gold answers that may fail their own check; such questions are left out and counted
_LISTED = 20  # most of them that an error lists

Judge = Callable[[Problem, str], Verdict]
Read = Callable[[Problem, str], str | None]


@dataclass(frozen=True)
class ProblemList:
    """A fixed list of problems; `judge` depends on the problem and the text only."""

    name: str
    problems: tuple[Problem, ...]
    judge: Judge
    # whether the judge waits for another process
    waits: bool = False
    # reads the normalized final answer of a text, for majority voting; None: `tasks.answers` reads it
    read: Read | None = None

    def draw(self, rng: random.Random) -> Problem:
        return rng.choice(self.problems)

    def check(self, problem: Problem, answer: str) -> Verdict:
        return self.judge(problem, answer)


def distinct(problems: Iterable[Problem]) -> list[Problem]:
    """The first of all questions with the same canonical form."""
    known: dict[str, Problem] = {}
    for problem in problems:
        known.setdefault(problem.key, problem)
    return list(known.values())


def agreed(
    problems: Iterable[Problem], same: Callable[[Problem, Problem], bool]
) -> tuple[list[Problem], dict[str, str]]:
    """Distinct problems without those that occur with different gold answers, and a note about the latter."""
    known: dict[str, Problem] = {}
    torn: dict[str, Problem] = {}
    for problem in problems:
        first = known.setdefault(problem.key, problem)
        if problem is not first and problem.key not in torn and not same(first, problem):
            torn[problem.key] = problem
    if not torn:
        return list(known.values()), {}
    key, other = next(iter(torn.items()))
    first = known[key]
    note = f"{len(torn)} left out, first {first.question[:60]!r} with {first.answer!r} and {other.answer!r}"
    if len(torn) == len(known):
        raise UserError("suite", first.question[:60], "every question has several gold answers", "Correct the file.")
    return [p for p in known.values() if p.key not in torn], {"questions with different gold answers": note}


def pick(problems: Sequence[Problem], n: int | None, seed: int) -> tuple[Problem, ...]:
    """n problems drawn by the seed, in their original order; all if there are no more than n."""
    if n is not None and n < 1:
        raise UserError("problems", n, "not above 0", "Use 1 or more.")
    if n is None or n >= len(problems):
        return tuple(problems)
    return tuple(problems[i] for i in sorted(random.Random(seed).sample(range(len(problems)), n)))


def sound(name: str, problems: Sequence[Problem], fault: Callable[[str], str]) -> tuple[list[Problem], dict[str, str]]:
    """The problems whose gold answers pass the check, and a note about the others; `fault` returns the problem, or "".

    UserError if more than 1 % (and more than one) or all of them fail.
    """
    good = [problem for problem in problems if not fault(problem.answer)]
    bad = len(problems) - len(good)
    if bad > max(1, _UNSOUND * len(problems)) or not good:
        bad_golds = [problem.answer for problem in problems if fault(problem.answer)]
        problem = (
            f"{bad} of {len(problems)} gold answers fail their own check: {', '.join(map(repr, bad_golds[:_LISTED]))}"
        )
        raise UserError(f"suite {name}", bad_golds[0], problem, "Correct the file, or name one of the right form.")
    return good, {"left out": f"{bad}, whose gold answer fails its own check"} if bad else {}


def fingerprint(problems: Iterable[Problem]) -> str:
    """The SHA-256 of questions and gold answers."""
    return digest([problem.question, problem.answer] for problem in problems)
