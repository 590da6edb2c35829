"""A task combines questions with a check of answers, for evaluation and RL alike. Does not import torch.

Training and evaluation never share a problem: a hash of the problem's canonical form decides its side of the split before
anything is drawn.
"""

import hashlib
import random
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field, replace
from typing import Literal, Protocol, runtime_checkable

from finback.config import UserError, check_fields

HELD_OUT = 10  # one problem in ten is held out for evaluation, by hash

Split = Literal["train", "held_out"]


@dataclass(frozen=True)
class Problem:
    """A question with its gold answer; `key` is its canonical form, `solution` a worked chain if there is one."""

    question: str
    answer: str
    key: str
    solution: str = ""
    tags: dict[str, int | str] = field(default_factory=dict)


@dataclass(frozen=True)
class Verdict:
    """The result of a check: whether the answer is right, and whether it is well-formed at all.

    A check with partial credit also gives `parts`: named scores, each in [0, 1], with a sum of at most 1.
    """

    correct: bool
    well_formed: bool
    parts: dict[str, float] = field(default_factory=dict, hash=False)

    @property
    def score(self) -> float:
        """The score of the answer, from 0 to 1."""
        return sum(self.parts.values()) if self.parts else float(self.correct)


NO_ANSWER = Verdict(correct=False, well_formed=False)


@runtime_checkable
class Task(Protocol):
    """The interface of tasks. A task must accept its own gold answers (a test draws some and checks)."""

    @property
    def name(self) -> str:
        """The name in metrics and tables."""
        ...

    def draw(self, rng: random.Random) -> Problem:
        """One problem, from either side of the split."""
        ...

    def check(self, problem: Problem, answer: str) -> Verdict:
        """Judges the text after the thinking. Must not execute it, and must not raise for any text (except UserError, to end the run)."""
        ...


@dataclass(frozen=True)
class Mixture:
    """Several tasks as one: each problem comes from one of them, chosen by `weights` (default: equal)."""

    # tasks to draw from
    tasks: tuple[Task, ...]
    # relative frequencies; (): equal
    weights: tuple[float, ...] = ()
    # name in tables
    label: str = "mixture"

    def __post_init__(self) -> None:
        check_fields(self, "mixture")
        if not self.tasks:
            raise UserError("mixture.tasks", self.tasks, "nothing to mix", "Give at least one task.")
        if any(isinstance(task, Mixture) for task in self.tasks):
            remedy = "Give its tasks here, with their weights."
            raise UserError("mixture.tasks", self.name, "contains another mixture", remedy)
        if self.weights and (len(self.weights) != len(self.tasks) or min(self.weights) <= 0):
            problem = f"not one positive weight for each of {len(self.tasks)} tasks"
            raise UserError("mixture.weights", self.weights, problem, "Correct it.")

    @property
    def name(self) -> str:
        return self.label

    @property
    def waits(self) -> bool:
        """Whether a check may wait for another process."""
        return any(getattr(task, "waits", False) for task in self.tasks)

    def draw(self, rng: random.Random) -> Problem:
        place = self.place(rng)
        return self.tagged(self.tasks[place].draw(rng), place)

    def place(self, rng: random.Random) -> int:
        """Index of the task that the next problem comes from."""
        (place,) = rng.choices(range(len(self.tasks)), self.weights or None)
        return place

    def tagged(self, problem: Problem, place: int) -> Problem:
        """Marks a problem with its task, so that `check` knows which task it belongs to."""
        return replace(problem, tags={**problem.tags, "part": place})

    def check(self, problem: Problem, answer: str) -> Verdict:
        return self.tasks[int(problem.tags["part"])].check(problem, answer)


def part_of(task: Task, problem: Problem) -> Task:
    """The task that a problem was drawn from; for a mixture, one of its tasks."""
    return task.tasks[int(problem.tags["part"])] if isinstance(task, Mixture) else task


def canonical(question: str) -> str:
    """The form in which questions are compared: lower case, single spaces."""
    return " ".join(question.split()).lower()


def is_held_out(key: str) -> bool:
    """Whether a canonical form is reserved for evaluation; depends on the text only, not on a seed."""
    digest = hashlib.blake2b(key.encode(), digest_size=8).digest()
    return int.from_bytes(digest, "big") % HELD_OUT == 0


def is_listed(task: Task) -> bool:
    """Whether a task's problems come from a list, such as a file, rather than a generator."""
    return hasattr(type(task), "all_problems")


def listed(task: Task) -> Sequence[Problem]:
    """All problems of a task that has a list, from both sides of the split; () for other tasks."""
    return getattr(task, "all_problems", ()) if is_listed(task) else ()


def draw(task: Task, split: Split, rng: random.Random) -> Problem:
    """The next problem of one side of the split."""
    for _ in range(100_000):
        problem = task.draw(rng)
        if is_held_out(problem.key) == (split == "held_out"):
            return problem
    raise UserError("task", task.name, f"no {split} problem in 100,000 draws", "Widen the task's ranges.")


def judged(task: Task, pairs: Sequence[tuple[Problem, str]]) -> list[Verdict]:
    """Verdicts in order; checks that wait for another process run concurrently."""
    if not getattr(task, "waits", False):
        return [task.check(problem, answer) for problem, answer in pairs]
    with ThreadPoolExecutor(max_workers=4) as pool:
        return list(pool.map(lambda pair: task.check(*pair), pairs))


def distinct(task: Task, split: Split, n: int, seed: int) -> list[Problem]:
    """n problems of one side of the split with distinct canonical forms, the same for the same seed."""
    found = draw_distinct(task, split, n, random.Random(seed), misses=10_000)
    if len(found) < n:
        problem = f"task {task.name!r} has only about {len(found)} distinct {split} problems"
        raise UserError("problems", n, problem, "Ask for fewer or widen the task's ranges.")
    return found


def draw_distinct(task: Task, split: Split, n: int, rng: random.Random, misses: int) -> list[Problem]:
    """Up to n problems with distinct canonical forms; fewer if `misses` draws in a row bring nothing new."""
    found: dict[str, Problem] = {}
    missed = 0
    while len(found) < n and missed < misses:
        problem = draw(task, split, rng)
        missed = missed + 1 if problem.key in found else 0
        found.setdefault(problem.key, problem)
    return list(found.values())


def drawn_questions(task: Task, side: Split, most: int, seed: int) -> list[str]:
    """Questions drawn until `most` distinct problems are found, with and without the wording that the task adds."""
    rng, keys, found, misses = random.Random(seed), set[str](), list[str](), 0
    while len(keys) < most and misses < 1000:
        problem = draw(task, side, rng)
        misses = misses + 1 if problem.key in keys else 0
        keys.add(problem.key)
        found += problem.key, problem.question
    return found
