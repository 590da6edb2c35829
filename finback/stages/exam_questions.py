"""The questions of a recipe's exams, so that a stage which trains on a user's file does not train on their answers."""

import re
from collections import Counter
from collections.abc import Iterable, Iterator, Sequence
from functools import cached_property
from typing import Any

from finback.config import UserError
from finback.data.decontamination import Decontaminator, grams
from finback.data.sources import Document
from finback.data.turn import Message
from finback.rollouts.drawing import Window, exam_remark
from finback.runs.folder import StageRun
from finback.stages.evaluate import Evaluate, Exam, OfSuite, questions
from finback.tasks.task import (
    Mixture,
    Problem,
    Task,
    canonical,
    drawn_questions,
    is_held_out,
    is_listed,
    listed,
    part_of,
)

NGRAM = 13  # consecutive words, as in GPT-3's appendix C
PROBLEMS = 1000  # training problems of a generated task; their n-grams belong to the task, not to an exam question


class ExamQuestions:
    """Finds exam questions in dialogues, as `decontaminate` of a prepare stage does: whole, or by 13 consecutive words."""

    def __init__(self, run: StageRun) -> None:
        self.run = run
        self.exams: list[Exam] = []
        for exam in (exam for stage in run.stages if isinstance(stage, Evaluate) for exam in stage.exams):
            if exam not in self.exams:  # stages may share an exam, or have different exams of the same name
                self.exams.append(exam)
        self._asked: dict[int, list[Problem]] = {}
        # number of problems removed by `without` and `outside`, by exam
        self.left_out: Counter[str] = Counter()

    def find(self, messages: Sequence[Message], is_made: bool = False) -> str | None:
        """The exam whose question occurs in the dialogue, or None.

        `is_made`: the dialogue answers a training question (traces, tasks written out). Then only whole questions of exams
        that read a file are searched for.
        """
        if not self.exams:
            return None
        if is_made:
            asked = (canonical(m.content) for m in messages if m.role == "user")
            return next((self.keys[key] for key in asked if key in self.keys), None)
        return self.decontaminator.find(Document(tuple(messages)))

    def asks(self, problem: Problem) -> str | None:
        """The exam that asks this problem, which comes from a list, or None."""
        return self.find((Message("user", problem.question),))

    def without(self, task: Task, problems: Sequence[Problem]) -> list[Problem]:
        """A task's problems, without those from lists that an exam asks. Generated problems are held out by hash."""
        kept = []
        for problem in problems:
            part = part_of(task, problem)
            if is_listed(part) and (exam := self.asks(problem)):
                self.left_out[exam] += 1
            else:
                kept.append(problem)
        if problems and not kept:
            asked = f"exams ask all of its training questions: {', '.join(self.left_out)}"
            raise UserError("task", task.name, asked, "Take other questions, or another exam.")
        return kept

    def outside(self, tasks: Sequence[Task], documents: Iterable[Document]) -> Iterator[Document]:
        """Documents written from tasks' problems, without those whose problem comes from a list that an exam asks."""
        for document in documents:
            exam = self.find(document.messages, is_made=True) if any(map(is_listed, tasks)) else None
            if exam is None:
                yield document
            else:
                self.left_out[exam] += 1

    def remark(self, what: str = "questions") -> str:
        """A sentence on what was left out; "" if nothing was."""
        return exam_remark(self.left_out, what)

    @cached_property
    def keys(self) -> dict[str, str]:
        """Maps whole questions in canonical form to their exam, for exams that are not generated."""
        given = [exam for exam in self.exams if isinstance(exam.task, OfSuite) or (exam.task and _has_list(exam.task))]
        return {canonical(q): exam.name for exam in given for p in self._problems(exam) for q in _texts(p)}

    @cached_property
    def decontaminator(self) -> Decontaminator:
        """A decontaminator for the questions of all exams."""
        held_out, trained = dict[str, list[str]](), dict[str, list[str]]()
        for exam in self.exams:
            problems = self._problems(exam)
            held_out.setdefault(exam.name, []).extend(text for problem in problems for text in _texts(problem))
            trained.setdefault(exam.name, []).extend(self._wording(exam, problems))
        return Decontaminator(held_out, trained, NGRAM)

    def _problems(self, exam: Exam) -> list[Problem]:
        """The problems that the exam asks; for a file, all held-out ones."""
        place = self.exams.index(exam)
        if place not in self._asked:
            assert exam.task is not None, "an exam has a task or a suite"
            if not isinstance(exam.task, OfSuite) and is_listed(exam.task):
                self._asked[place] = [p for p in listed(exam.task) if is_held_out(p.key)]
            else:
                self._asked[place] = questions(exam, self.run.seed("exam", exam.task.name))[1]
        return self._asked[place]

    def _wording(self, exam: Exam, problems: Sequence[Problem]) -> Iterator[str]:
        """Texts whose n-grams do not identify a question: training questions, or wording shared by many questions."""
        if isinstance(exam.task, OfSuite):
            shared = Counter(run for problem in problems for run in {*grams(problem.question, NGRAM)})
            yield from (run for run, n in shared.items() if n > 1)
        elif exam.task is not None:
            yield from drawn_questions(exam.task, "train", PROBLEMS, self.run.seed("exam", exam.task.name))


def _has_list(task: Task) -> bool:
    """Whether a task, or a part of a mixture, takes its problems from a list."""
    return any(map(is_listed, task.tasks)) if isinstance(task, Mixture) else is_listed(task)


def askable(
    task: Task, drawn: Sequence[Problem], window: Window, run: StageRun, what: str = ""
) -> tuple[list[Problem], dict[str, Any]]:
    """The drawn problems that no exam asks and that fit the window, and how many were too long. `what` labels the log lines.

    This also matters for problems that only stop training or select a model: with exam questions, they would select for
    the exam.
    """
    exams = ExamQuestions(run)
    own = exams.without(task, drawn)
    kept = window.fitting(own)
    if exams.left_out:
        run.say(f"{run.name:10} {what}{exams.remark()}")
    too_long = len(own) - len(kept)
    if too_long:
        run.say(f"{run.name:10} {what}{window.remark(too_long)}")
    return kept, {"too_long": too_long, "contaminated": dict(exams.left_out)}


def _texts(problem: Problem) -> tuple[str, ...]:
    """A question as asked, in canonical form, and without its choices."""
    return problem.question, problem.key, re.split(r"\nA\. ", problem.question)[0]
