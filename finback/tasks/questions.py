r"""Questions with answers from a user's file or the Hugging Face hub, such as GSM8K and MATH. No torch here.

A gold answer is what stands after ####, or in the last \boxed{}, or the whole answer. A model's answer is read the same
way, but two different ones earn nothing. What is compared, and how, depends on the gold answer alone:

- a number with a number, exactly; a fraction with an integer never, since 6/2 would answer "What is 6/2?"
- words with words, without regard to case
- anything else as mathematics, by math-verify in a worker
- or by the user's own function, which then is all that counts
"""

import copy
import random
import re
import signal
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from functools import cached_property
from types import FrameType
from typing import Any

from finback.config import UserError, check_fields, check_positive
from finback.tasks import answers, math_process
from finback.tasks.records import Record, read
from finback.tasks.task import Problem, Verdict

_LONGEST_GOLD = 200  # characters; longer ones are prose, which nothing here can compare
_RIGHT = 0.99  # what a user's function must give: a reward here is 0 or 1, so that no partial credit can be farmed
_ANNOTATION = re.compile(r"<<[0-9+\-*/.=()% ]*>>")  # GSM8K's calculator: 48/2=<<48/2=24>>24
_FAILING = 0.01  # the share of records whose own gold answer may fail the check

# A user's function: the record, the text after the thinking -> right or wrong.
Check = Callable[[dict[str, Any], str], bool | float]
Known = dict[str, tuple[Record, Problem]]  # by key


class _Late(BaseException):
    """No Exception, so that the function it ends cannot catch it by mistake."""


@dataclass(frozen=True)
class Questions:
    """One problem per record; its canonical form is the question, so copies lie on one side of the split.

    Of copies of a question, the first counts. Up to 1 % of records may fail the check with their own gold answer:
    they are left out. A function should depend on nothing but its arguments; what it takes longer than `seconds` for,
    or raises at, is wrong. (The time is kept in the main thread only.)
    """

    # a .jsonl, .json or .parquet file, or hub:owner/name
    source: str
    # of a data set of the hub, such as main
    subset: str = ""
    # likewise
    split: str = "train"
    question_field: str = "question"
    answer_field: str = "answer"
    # stands after every question
    instruction: str = ""
    # the name in tables
    label: str = ""
    # a function of your own
    checker: Check | None = None
    seconds: float = 5.0

    def __post_init__(self) -> None:
        check_fields(self, "questions")
        check_positive(self, "questions", "seconds")

    @property
    def name(self) -> str:
        return self.label or self.source.rsplit("/", 1)[-1].rsplit(".", 1)[0]

    def draw(self, rng: random.Random) -> Problem:
        return rng.choice(self._problems)

    def check(self, problem: Problem, answer: str) -> Verdict:
        if self.checker is None:
            return compare(problem, answer)
        record, _ = self._known.get(problem.key, (None, None))
        if record is None:  # of another file
            return Verdict(correct=False, well_formed=False)
        correct = not self._objection(record, answer)
        return Verdict(correct=correct, well_formed=correct)

    @cached_property
    def _problems(self) -> tuple[Problem, ...]:
        return tuple(problem for _, problem in self._known.values())

    @cached_property
    def _known(self) -> Known:
        """Every record with its problem, by the key; records whose own gold answer fails are left out."""
        known: Known = {}
        faults: list[str] = []
        records = read(self.source, self.subset, self.split)
        for record in records:
            problem = self._problem(record)
            fault = self._fault(record, problem)
            if fault:
                faults.append(f"{record.where}: {fault}")
            else:
                known.setdefault(problem.key, (record, problem))
        if len(faults) > _FAILING * len(records):
            raise UserError(
                "questions.source",
                self.source,
                f"the gold answers of {len(faults)} of {len(records)} records fail the check, first {faults[0]}",
                r"Mark each final answer with #### or \boxed{}, correct it, or give a `checker` of your own.",
            )
        return known

    def _problem(self, record: Record) -> Problem:
        question = record.text(self.question_field).strip()
        has_gold = self.checker is None or isinstance(record.fields.get(self.answer_field), (str, int, float))
        gold, reasoning = answers.gold(record.text(self.answer_field)) if has_gold else ("", "")
        tags = {"difficulty": record.fields.get("level"), "subject": record.fields.get("subject")}
        return Problem(
            question=f"{question}\n{self.instruction}" if self.instruction else question,
            answer=gold,
            key=" ".join(question.split()).lower(),
            solution=_ANNOTATION.sub("", reasoning),
            tags={k: v for k, v in tags.items() if isinstance(v, (int, str)) and not isinstance(v, bool)},
        )

    def _fault(self, record: Record, problem: Problem) -> str:
        """Why the gold answer of a record is of no use, or ""."""
        if self.checker is not None:
            return self._objection(record, problem.answer) if problem.answer else ""
        if len(problem.answer) > _LONGEST_GOLD:
            return f"the gold answer has more than {_LONGEST_GOLD} characters, so it is no final answer"
        return "" if compare(problem, problem.answer).correct else f"{problem.answer!r} is not one final answer"

    def _objection(self, record: Record, answer: str) -> str:
        """Why the user's function does not count an answer as right, or ""."""
        assert self.checker is not None
        try:
            with _limited(self.seconds):
                value = self.checker(copy.deepcopy(record.fields), answer)
            return "" if float(value) >= _RIGHT else f"the checker gave {value!r}"
        except _Late:
            return f"the checker took more than {self.seconds} s"
        except Exception as error:  # the function is the user's, the text a model's
            return f"the checker raised {type(error).__name__}: {error}"


def compare(problem: Problem, answer: str) -> Verdict:
    """Judge an answer by the gold answer alone."""
    given, gold = answers.final_answer(answer), problem.answer
    if given is None:
        return Verdict(correct=False, well_formed=False)
    number, words = answers.number(gold), answers.words(gold)
    if number is not None:
        value = answers.number(given)
        if value is not None or number.value.denominator == 1:
            return Verdict(value is not None and number.equals(value), well_formed=value is not None)
    elif words is not None:
        return Verdict(answers.words(given) == words, well_formed=answers.words(given) is not None)
    if answers.compact(given) == answers.compact(gold):
        return Verdict(correct=True, well_formed=True)
    if not answers.is_single(given) or _is_copied(given, problem.question):
        return Verdict(correct=False, well_formed=False)
    comparison = math_process.compare(gold, given)
    return Verdict(comparison.same, comparison.read)


def _is_copied(answer: str, question: str) -> bool:
    """Whether an answer is an expression of the question: to factor x^2+2x, it is not enough to repeat it."""
    short = answers.compact(answer)
    return bool(re.search(r"[-+*/^\\]", short)) and short in answers.compact(question)


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
