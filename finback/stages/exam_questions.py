"""The questions of a recipe's exams, so that a stage which learns from a user's file does not learn their answers."""

import re
from collections import Counter
from collections.abc import Iterator, Sequence

from finback.data.decontamination import Decontaminator, grams
from finback.data.messages import Message
from finback.data.sources import Document
from finback.runs.folder import StageRun
from finback.stages.evaluate import Evaluate, Exam, OfSuite, questions
from finback.stages.prepare import drawn_questions
from finback.tasks.records import RecordTask
from finback.tasks.task import Problem, canonical, is_held_out

NGRAM = 13  # words in a row, as GPT-3's appendix C
PROBLEMS = 1000  # of a generated task's training side, whose words are the task's and no exam's


class ExamQuestions:
    """Finds the exams' questions in dialogues, as a prepare stage with `decontaminate` does: whole, or by 13 words in a row."""

    def __init__(self, run: StageRun) -> None:
        self.run = run
        self.exams = [exam for stage in run.stages if isinstance(stage, Evaluate) for exam in stage.exams]
        self._decontaminator: Decontaminator | None = None
        self._keys: dict[str, str] | None = None

    def find(self, messages: Sequence[Message], is_trace: bool) -> str | None:
        """The exam that has a question of the dialogue, if there is one.

        Traces answer training questions: only those that an exam takes from a file are looked for, and only as a whole.
        """
        if not self.exams:
            return None
        if is_trace:
            asked = (canonical(m.content) for m in messages if m.role == "user")
            return next((self.keys[key] for key in asked if key in self.keys), None)
        return self.decontaminator.find(Document(tuple(messages)))

    @property
    def keys(self) -> dict[str, str]:
        """Whole questions, in canonical form, of exams that are not generated; to their exams."""
        if self._keys is None:
            given = [exam for exam in self.exams if isinstance(exam.task, OfSuite | RecordTask)]
            self._keys = {canonical(q): exam.name for exam in given for p in self._problems(exam) for q in _texts(p)}
        return self._keys

    @property
    def decontaminator(self) -> Decontaminator:
        """Of the questions of all exams."""
        if self._decontaminator is None:
            held_out, trained = dict[str, list[str]](), dict[str, list[str]]()
            for exam in self.exams:
                problems = list(self._problems(exam))
                held_out[exam.name] = [text for problem in problems for text in _texts(problem)]
                trained[exam.name] = list(self._wording(exam, problems))
            self._decontaminator = Decontaminator(held_out, trained, NGRAM)
        return self._decontaminator

    def _problems(self, exam: Exam) -> Iterator[Problem]:
        """Those that the exam asks; of a file all that are held out."""
        if isinstance(exam.task, RecordTask):
            yield from (problem for problem in exam.task.all_problems if is_held_out(problem.key))
        else:
            assert exam.task is not None, "an exam has a task or a suite"
            yield from questions(exam, self.run.seed("exam", exam.task.name))[1]

    def _wording(self, exam: Exam, problems: Sequence[Problem]) -> Iterator[str]:
        """Texts whose runs of words say nothing of a question: training questions', or what many questions share."""
        if isinstance(exam.task, OfSuite):
            shared = Counter(run for problem in problems for run in {*grams(problem.question, NGRAM)})
            yield from (run for run, n in shared.items() if n > 1)
        elif exam.task is not None:
            yield from drawn_questions(exam.task, "train", PROBLEMS, self.run.seed("exam", exam.task.name))


def _texts(problem: Problem) -> tuple[str, ...]:
    """A question as it is put, in its canonical form, and without the choices below it."""
    return problem.question, problem.key, re.split(r"\nA\. ", problem.question)[0]
