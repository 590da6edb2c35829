"""The questions of a recipe's exams, so that a stage which learns from a user's file does not learn their answers."""

import re
from collections import Counter
from collections.abc import Iterable, Iterator, Sequence
from functools import cached_property

from finback.data.decontamination import Decontaminator, grams
from finback.data.messages import Message
from finback.data.sources import Document
from finback.runs.folder import StageRun
from finback.stages.evaluate import Evaluate, Exam, OfSuite, questions
from finback.stages.prepare import drawn_questions
from finback.tasks.records import RecordTask
from finback.tasks.task import Problem, canonical, is_held_out

NGRAM = 13  # words in a row, as GPT-3's appendix C
START, LETTERS = 12, 6  # characters
_PART = {*"abcdefghijklmnopqrstuvwxyz0123456789+-*/=^%"}
_BEGINS = re.compile(r"(?<![a-z0-9+\-*/=^%])\S")
PROBLEMS = 1000  # of a generated task's training side, whose words are the task's and no exam's


class ExamQuestions:
    """Finds the exams' questions in dialogues, as a prepare stage with `decontaminate` does: whole, or by 13 words in a row."""

    def __init__(self, run: StageRun) -> None:
        self.run = run
        self.exams: list[Exam] = []
        for exam in (exam for stage in run.stages if isinstance(stage, Evaluate) for exam in stage.exams):
            if exam not in self.exams:  # other stages may have the same exam, or another one of this name
                self.exams.append(exam)
        self._asked: dict[int, list[Problem]] = {}

    def find(self, messages: Sequence[Message], is_trace: bool) -> str | None:
        """The exam that has a question of the dialogue, if there is one.

        Traces answer training questions: only those that an exam takes from a file are looked for, and only as a whole.
        """
        if not self.exams:
            return None
        if is_trace:
            asked = (canonical(m.content) for m in messages if m.role == "user")
            return next((self.keys[key] for key in asked if key in self.keys), None)
        found = self.decontaminator.find(Document(tuple(messages)))
        return found or next(
            filter(None, (self.embedded.find(m.content) for m in messages if m.role != "system")), None
        )

    @cached_property
    def keys(self) -> dict[str, str]:
        """Whole questions, in canonical form, of exams that are not generated; to their exams."""
        given = [exam for exam in self.exams if isinstance(exam.task, OfSuite | RecordTask)]
        return {canonical(q): exam.name for exam in given for p in self._problems(exam) for q in _texts(p)}

    @cached_property
    def decontaminator(self) -> Decontaminator:
        """Of the questions of all exams."""
        held_out, trained = dict[str, list[str]](), dict[str, list[str]]()
        for exam in self.exams:
            problems = self._problems(exam)
            held_out.setdefault(exam.name, []).extend(text for problem in problems for text in _texts(problem))
            trained.setdefault(exam.name, []).extend(self._wording(exam, problems))
        return Decontaminator(held_out, trained, NGRAM)

    @cached_property
    def embedded(self) -> "_Embedded":
        """Of the same questions, with words before and behind them in one line."""
        return _Embedded((t, e.name) for e in self.exams for p in self._problems(e) for t in _texts(p))

    def _problems(self, exam: Exam) -> list[Problem]:
        """Those that the exam asks; of a file all that are held out."""
        place = self.exams.index(exam)
        if place not in self._asked:
            assert exam.task is not None, "an exam has a task or a suite"
            if isinstance(exam.task, RecordTask):
                self._asked[place] = [p for p in exam.task.all_problems if is_held_out(p.key)]
            else:
                self._asked[place] = questions(exam, self.run.seed("exam", exam.task.name))[1]
        return self._asked[place]

    def _wording(self, exam: Exam, problems: Sequence[Problem]) -> Iterator[str]:
        """Texts whose runs of words say nothing of a question: training questions', or what many questions share."""
        if isinstance(exam.task, OfSuite):
            shared = Counter(run for problem in problems for run in {*grams(problem.question, NGRAM)})
            yield from (run for run, n in shared.items() if n > 1)
        elif exam.task is not None:
            yield from drawn_questions(exam.task, "train", PROBLEMS, self.run.seed("exam", exam.task.name))


class _Embedded:
    """Finds questions of few words within a line, such as "Question: Who wrote Hamlet? Answer:"; sums are too much like each other.

    A question is meant that has 12 characters and 6 letters at least. Before it and behind it stands no part of a word or of a
    sum; one that ends without a mark ends a line or a sentence.
    """

    def __init__(self, questions: Iterable[tuple[str, str]]) -> None:
        self.by_start: dict[str, list[tuple[str, str]]] = {}
        for text, exam in questions:
            question = _laid_out(text)
            if len(question) >= START and sum(map(str.isalpha, question)) >= LETTERS:
                self.by_start.setdefault(question[:START], []).append((question, exam))

    def find(self, text: str) -> str | None:
        """The exam whose question stands in the text."""
        whole = _laid_out(text)
        for match in _BEGINS.finditer(whole):
            for question, exam in self.by_start.get(whole[match.start() : match.start() + START], ()):
                behind = whole[match.start() + len(question) :][:1]
                ends = not question[-1].isalnum() or not (behind in _PART or (behind == " " and question[-1].isascii()))
                if whole.startswith(question, match.start()) and (not behind or ends):
                    return exam
        return None


def _laid_out(text: str) -> str:
    """Lines with single spaces, whatever case."""
    lines = (" ".join(line.split()) for line in text.casefold().split("\n"))
    return "\n".join(line for line in lines if line)


def _texts(problem: Problem) -> tuple[str, ...]:
    """A question as it is put, in its canonical form, and without the choices below it."""
    return problem.question, problem.key, re.split(r"\nA\. ", problem.question)[0]
