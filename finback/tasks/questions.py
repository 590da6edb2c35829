r"""Questions with answers from a user's file or the Hugging Face hub, such as GSM8K and MATH. No torch here.

A gold answer is what stands after ####, or in the last \boxed{}, or the whole answer. A model's answer is read the same
way, but two different ones earn nothing. What is compared, and how, depends on the gold answer alone:

- a date, a time of day, a phone number as such
- a number with a number, exactly; a fraction with an integer never, since 6/2 would answer "What is 6/2?". Units and
  currencies count where the gold answer has one, and are converted: 12 hours are 720 minutes; a bare 12 will do
- words with words, without regard to case, quotation marks and articles
- anything else as mathematics, by math-verify in a worker
- or by the user's own function, which then is all that counts, and may grade
"""

import copy
import inspect
import re
import signal
import sys
import threading
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from decimal import Decimal
from fractions import Fraction
from functools import cached_property
from types import FrameType
from typing import Any

from finback.config import UserError, check_fields, check_positive
from finback.tasks import answers
from finback.tasks.records import Record, RecordTask, read
from finback.tasks.task import NO_ANSWER, Problem, Verdict, canonical

_LONGEST_GOLD = 200  # characters; longer ones are prose, which nothing here can compare
_RIGHT = 0.99  # the score from which an answer that a user's function grades counts as right
_ANNOTATION = re.compile(r"<<[0-9+\-*/.=()% ]*>>")  # GSM8K's calculator: 48/2=<<48/2=24>>24
_FAILING = 0.01  # the share of records whose own gold answer may fail the check, and of calls that may fail
_LISTED = 20  # of them that an error names
_PROBED = 3  # records whose empty answer a function is asked about
_FEW = 3  # so many calls may fail however few there were

# A user's function: the record, the text after the thinking -> right or wrong, a score from 0 to 1, or its named parts.
Check = Callable[[dict[str, Any], str], bool | float | Mapping[str, float]]


class _Late(BaseException):
    """No Exception, so that the function it ends cannot catch it by mistake."""


@dataclass(frozen=True)
class Questions(RecordTask):
    """One problem per record; its canonical form is the question, so copies lie on one side of the split.

    Of copies of a question, the first counts. Up to 1 % of records may fail the check with their own gold answer:
    they are left out. A function should depend on nothing but its arguments. A call of it fails where it raises, takes longer
    than `timeout` seconds (in the main thread) or returns something else than a bool, a number from 0 to 1, or a dict of
    such numbers that add up to at most 1: the answer is then wrong, the first such call is shown, and more than 1 % of
    them end the run with UserError.
    """

    # a function of your own
    checker: Check | None = None
    # seconds that it may take
    timeout: float = 5.0

    def __post_init__(self) -> None:
        check_fields(self, "questions")
        check_positive(self, "questions", "timeout")

    def check(self, problem: Problem, answer: str) -> Verdict:
        if self.checker is None:
            return answers.check(problem, answer)
        _, record = self.by_key.get(problem.key, (None, None))
        if record is None:  # of another file
            return NO_ANSWER
        verdict, fault = self._called(record, answer)
        self._calls.note(fault, self.name, record.where, answer)
        return verdict

    @cached_property
    def _calls(self) -> "_Calls":
        return _Calls()

    def problems(self) -> Iterator[tuple[Problem, Record]]:
        """Each problem with its record; those whose own gold answer fails are left out."""
        faults, paid = list[str](), list[bool]()
        records = read(self.source, self.subset, self.split)
        for record in records:
            problem = self._problem(record)
            if self.checker is not None and len(paid) < _PROBED:
                paid.append(self._called(record, "")[0].score >= _RIGHT)
            if fault := self._fault(record, problem):
                faults.append(f"{record.where}: {fault}")
            else:
                yield problem, record
        if paid and all(paid):
            print(f"warning: the checker of {self.name!r} pays for an empty answer", file=sys.stderr)
        if len(faults) > _FAILING * len(records):
            listed = "; ".join(faults[:_LISTED]) + ("; …" if len(faults) > _LISTED else "")
            failure = f"the gold answers of {len(faults)} of {len(records)} records fail the check: {listed}"
            remedy = r"Mark each final answer with #### or \boxed{}, correct it, or give a `checker` of your own."
            raise UserError("questions.source", self.source, failure, remedy)

    def _problem(self, record: Record) -> Problem:
        question = record.text(self.question_field).strip()
        has_gold = self.checker is None or isinstance(record.fields.get(self.answer_field), (str, int, float))
        gold, reasoning = answers.gold(record.text(self.answer_field)) if has_gold else ("", "")
        return Problem(
            question=f"{question}\n{self.instruction}" if self.instruction else question,
            answer=gold,
            key=canonical(question),
            solution=_ANNOTATION.sub("", reasoning),
            tags=record.tags(difficulty="level", subject="subject"),
        )

    def _fault(self, record: Record, problem: Problem) -> str:
        """Why the gold answer of a record is of no use, or ""."""
        if self.checker is not None:
            verdict, fault = self._called(record, problem.answer) if problem.answer else (Verdict(True, True), "")
            fault = fault or ("" if verdict.score else "gives nothing for it")
            return fault and f"the checker {fault}"
        if len(problem.answer) > _LONGEST_GOLD:
            return f"the gold answer has more than {_LONGEST_GOLD} characters, so it is no final answer"
        return answers.fault(problem.answer)

    def _called(self, record: Record, answer: str) -> tuple[Verdict, str]:
        """What the user's function says of an answer, and why the call failed, or ""."""
        assert self.checker is not None
        try:
            with _limited(self.timeout):
                value = self.checker(copy.deepcopy(record.fields), answer)
            return _graded(value), ""
        except _Late:
            return NO_ANSWER, f"took more than {self.timeout} s"
        except _NoScoreError:
            wanted = "True, False, a number from 0 to 1, or a dict of such numbers that add up to at most 1"
            return NO_ANSWER, f"returned {_shown(value)}; return {wanted}"
        except (Exception, SystemExit) as error:  # the function is the user's, the text a model's
            return NO_ANSWER, f"raised {type(error).__name__}: {error}"


class _NoScoreError(Exception):
    """A function returned what is neither a verdict nor a score."""


def _graded(value: Any) -> Verdict:
    """The verdict of what a user's function returned."""
    value = _plain(value)
    if isinstance(value, bool):
        return Verdict(correct=value, well_formed=value)
    parts = {"score": value} if not isinstance(value, Mapping) else {k: _plain(v) for k, v in value.items()}
    if not all(isinstance(k, str) and isinstance(v, int | float) and 0 <= v <= 1 for k, v in parts.items()):
        raise _NoScoreError
    score = sum(parts.values())
    if not parts or score > 1 + 1e-6:
        raise _NoScoreError
    return Verdict(score >= _RIGHT, score > 0, {name: float(part) for name, part in parts.items()})


def _plain(value: Any) -> Any:
    """A number of numpy, torch, fractions or decimal as one of Python's own; what is none stays."""
    value = value.item() if hasattr(value, "item") else value
    return float(value) if isinstance(value, (Fraction, Decimal)) else value


def _shown(value: Any) -> str:
    """What a function returned, for a message; a coroutine is ended, for nothing awaits it."""
    if inspect.iscoroutine(value):
        value.close()
        return "a coroutine (it is async)"
    try:
        return f"{value!r:.60}"
    except Exception:  # a class of the user's that cannot be shown
        return f"an object of {type(value).__name__}"


@dataclass
class _Calls:
    """How often a user's function was called, and how often that failed."""

    made: int = 0
    failed: int = 0
    first: str = ""

    def note(self, fault: str, task: str, where: str, answer: str) -> None:
        """Count a call; show the first that fails, UserError when too many have."""
        self.made += 1
        if not fault:
            return
        self.failed += 1
        if not self.first:
            self.first = f"it {fault}, for {where} and the answer {answer[:200]!r}"
            print(f"warning: the checker of {task!r} failed: {self.first}", file=sys.stderr)
        if self.failed > max(_FEW, _FAILING * self.made):
            problem = f"{self.failed} of {self.made} calls failed; first: {self.first}"
            remedy = "Make it return False or 0 for text that is no answer, whatever the text."
            raise UserError("questions.checker", task, problem, remedy)


@contextmanager
def _limited(seconds: float) -> Iterator[None]:
    """Ends what runs inside after so many seconds, again and again if that is caught. Signals reach the main thread only."""
    if threading.current_thread() is not threading.main_thread():
        yield
        return
    before = signal.signal(signal.SIGALRM, _stop)
    try:
        signal.setitimer(signal.ITIMER_REAL, seconds, seconds)
        try:
            yield
        finally:
            signal.setitimer(signal.ITIMER_REAL, 0)
    finally:
        signal.signal(signal.SIGALRM, signal.SIG_DFL if before is None else before)


def _stop(signum: int, frame: FrameType | None) -> None:
    raise _Late
