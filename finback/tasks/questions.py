r"""Questions with answers from a user's file or the Hugging Face hub, such as GSM8K and MATH. Does not import torch.

The gold answer is the text after ####, or the last \boxed{}, or the whole answer. A model's answer is extracted the same
way, but two different answers earn nothing. The gold answer alone decides how answers are compared:

- dates, times of day and phone numbers as such
- numbers exactly; a fraction never equals an integer, since 6/2 would pass for "What is 6/2?". If the gold answer has a
  unit or currency it must match, after conversion: 12 hours are 720 minutes; a bare 12 will do
- words as words, ignoring case, quotation marks and articles
- everything else as mathematics, by math-verify in a worker process
- or only by the user's own function, which may give partial credit
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

_LONGEST_GOLD = 200  # characters; longer answers are prose, which cannot be compared
_RIGHT = 0.99  # score of a user's function from which an answer counts as right
_ANNOTATION = re.compile(r"<<[0-9+\-*/.=()% ]*>>")  # GSM8K's calculator: 48/2=<<48/2=24>>24
_FAILING = 0.01  # tolerated share of records that fail the check with their own gold answer, and of failed calls
_LISTED = 20  # failures listed in an error
_PROBED = 3  # records for which the function is tested with an empty answer
_FEW = 3  # failed calls tolerated in any case

# A user's function: (record, text after the thinking) -> right or wrong, a score from 0 to 1, or named parts of it.
Check = Callable[[dict[str, Any], str], bool | float | Mapping[str, float]]


class _Late(BaseException):
    """A timeout. Not an Exception, so that the user's function does not catch it by mistake."""


@dataclass(frozen=True)
class Questions(RecordTask):
    """One problem per record. Its canonical form is the question, so copies are on one side of the split.

    Of several copies of a question, the first counts. Up to 1 % of records may fail the check with their own gold answer:
    they are left out. A user's function should depend on its arguments only. A call fails if it raises, takes longer than
    `timeout` seconds (in the main thread), or returns anything but a bool, a number from 0 to 1, or a dict of such numbers
    whose sum is at most 1. A failed call makes the answer wrong. The first is printed; more than 1 % (and more than three)
    end the run with a UserError.
    """

    # your own function for checking answers
    checker: Check | None = None
    # seconds that one call of the checker may take
    timeout: float = 5.0

    def __post_init__(self) -> None:
        check_fields(self, "questions")
        check_positive(self, "questions", "timeout")

    def check(self, problem: Problem, answer: str) -> Verdict:
        if self.checker is None:
            return answers.check(problem, answer)
        _, record = self.by_key.get(problem.key, (None, None))
        if record is None:  # a problem of another file
            return NO_ANSWER
        verdict, fault = self._called(record, answer)
        self._calls.note(fault, self.name, record.where, answer)
        return verdict

    @cached_property
    def _calls(self) -> "_Calls":
        return _Calls()

    def problems(self) -> Iterator[tuple[Problem, Record]]:
        """Each problem with its record, without those that fail the check with their own gold answer."""
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
            print(f"warning: the checker of {self.name!r} rewards an empty answer", file=sys.stderr)
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
        """Why the gold answer of a record cannot be used, or ""."""
        if self.checker is not None:
            verdict, fault = self._called(record, problem.answer) if problem.answer else (Verdict(True, True), "")
            fault = fault or ("" if verdict.score else "gives it a score of 0")
            return fault and f"the checker {fault}"
        if len(problem.answer) > _LONGEST_GOLD:
            return f"the gold answer has more than {_LONGEST_GOLD} characters, too long for a final answer"
        return answers.fault(problem.answer)

    def _called(self, record: Record, answer: str) -> tuple[Verdict, str]:
        """The user's function's verdict on an answer, and why the call failed, or ""."""
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
    """A function returned neither a verdict nor a score."""


def _graded(value: Any) -> Verdict:
    """The verdict for what a user's function returned."""
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
    """Converts numbers of numpy, torch, fractions or decimal to Python's; anything else is returned unchanged."""
    value = value.item() if hasattr(value, "item") else value
    return float(value) if isinstance(value, (Fraction, Decimal)) else value


def _shown(value: Any) -> str:
    """repr of what a function returned; a coroutine is closed, because nothing will await it."""
    if inspect.iscoroutine(value):
        value.close()
        return "a coroutine (it is async)"
    try:
        return f"{value!r:.60}"
    except Exception:  # the user's __repr__ may fail
        return f"an object of {type(value).__name__}"


@dataclass
class _Calls:
    """Counts calls of a user's function, and failures."""

    made: int = 0
    failed: int = 0
    first: str = ""

    def note(self, fault: str, task: str, where: str, answer: str) -> None:
        """Counts a call; prints the first failure, raises UserError after too many."""
        self.made += 1
        if not fault:
            return
        self.failed += 1
        if not self.first:
            self.first = f"it {fault}, for {where} and the answer {answer[:200]!r}"
            print(f"warning: the checker of {task!r} failed: {self.first}", file=sys.stderr)
        if self.failed > max(_FEW, _FAILING * self.made):
            problem = f"{self.failed} of {self.made} calls failed; first: {self.first}"
            remedy = "Make it return False or 0 for any text that is not an answer."
            raise UserError("questions.checker", task, problem, remedy)


@contextmanager
def _limited(seconds: float) -> Iterator[None]:
    """Raises _Late in the body after `seconds`, repeatedly if the body catches it; no limit outside the main thread."""
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
