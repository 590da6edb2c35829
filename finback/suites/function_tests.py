"""Judges a function by tests written in Python that it cannot see, outside this process. Does not import torch.

HumanEval's and MBPP's tests are assertions about a function, so they must run as Python. In one process with the program
they would not be safe: it could read the expected values, or exit with success. So there are three runs, each in a separate
sandbox:

1. The tests run on the reference solution and record every call's arguments and result (once per problem).
2. The program is called with these arguments. Its results leave the sandbox as text.
3. The tests run again on a function that returns those results, parsed as Python literals. This run is skipped if the
   results equal the reference's, since the tests would pass.

So the program influences the verdict only by the values that it returns.
"""

import re
from dataclasses import dataclass
from functools import lru_cache

from finback.config import UserError
from finback.tasks.fences import program
from finback.tasks.sandbox import Limits, shared
from finback.tasks.task import NO_ANSWER, Verdict

LIMITS = Limits(wall=10.0, cpu=10.0)
_LONGEST = 100_000  # most characters of an answer; no honest program is nearly as long
_FUTURE = re.compile(r"^from __future__ import .*$", re.MULTILINE)

_RECORD = """
def finback_run(tests, entry):
    import random
    calls = []
    def recorded(*values, **names):
        before = repr((list(values), names))  # it may change its arguments
        result = globals()[entry](*values, **names)
        calls.append([before, repr(result)])
        return result
    random.seed(0)
    exec(tests, {**globals(), entry: recorded})
    return calls
"""
_CALL = """
def finback_run(arguments, entry):
    import ast
    values, names = ast.literal_eval(arguments)
    return repr(globals()[entry](*values, **names))
"""
_REPLAY = """
def finback_run(tests, entry, calls, results):
    import ast, random
    recorded_calls = iter(zip(calls, results, strict=True))
    def replayed(*values, **names):
        expected, result = next(recorded_calls)
        assert repr((list(values), names)) == expected, "the tests' calls depend on results"
        return ast.literal_eval(result)
    random.seed(0)
    exec(tests, {**globals(), entry: replayed})
    return next(recorded_calls, None) is None
"""


@dataclass(frozen=True)
class FunctionTests:
    """A function to write: its name, the source that the question gives, a reference solution and tests."""

    # location of the record, for error messages
    where: str
    # the function's name
    entry: str
    # source that the answer continues; "" if the answer is the whole program
    given: str
    # source that defines the function and everything that the tests need
    reference: str
    # statements that raise if `entry` is wrong
    tests: str


def judge(function: FunctionTests, answer: str, limits: Limits = LIMITS) -> Verdict:
    """The verdict on the program in an answer: correct if it passes the tests, well-formed if it compiles as Python."""
    text = program(answer, function.entry) if len(answer) <= _LONGEST else ""
    if not text.strip():
        return NO_ANSWER
    calls = _recorded(function)
    source = assembled(function.given, function.entry, text) + _CALL
    arguments = [[before, function.entry] for before, _ in calls]
    seen = shared().call(source, "finback_run", arguments, limits)
    results = [value for value in seen.values if isinstance(value, str)]
    if seen.reason != "ok" or len(results) != len(calls):
        return Verdict(correct=False, well_formed=seen.compiled)
    correct = results == [result for _, result in calls] or _replayed(function, calls, results, limits)
    return Verdict(correct, well_formed=True)


def assembled(given: str, entry: str, text: str) -> str:
    """The whole program: `given` followed by the answer, which either defines the function or continues it."""
    if re.search(rf"^def[ \t]+{entry}\b", text, re.MULTILINE):
        # `given` may also have imports and helpers, so it stays; `pass` completes its function, which the answer redefines.
        given = f"{given.rstrip()}\n    pass\n\n" if given.strip() else ""
    whole = given + text
    future = "\n".join(_FUTURE.findall(whole))  # these must be the first statements
    return f"{future}\n{_FUTURE.sub('', whole)}\n" if future else f"{whole}\n"


@lru_cache(maxsize=4096)
def _recorded(function: FunctionTests) -> tuple[tuple[str, str], ...]:
    """The tests' calls of the reference solution as (arguments, result) texts; UserError if it does not pass them."""
    seen = shared().call(function.reference + _RECORD, "finback_run", [[function.tests, function.entry]], LIMITS)
    if seen.reason != "ok" or not seen.values or not seen.values[0]:
        errors = seen.stderr.strip().splitlines()[-1:] or [f"no call of {function.entry}"]
        problem = f"the reference solution does not pass the tests ({seen.reason}: {errors[0][:200]})"
        raise UserError(function.where, function.entry, problem, "Correct the record, or remove it.")
    return tuple((before, result) for before, result in seen.values[0])


def _replayed(function: FunctionTests, calls: tuple[tuple[str, str], ...], results: list[str], limits: Limits) -> bool:
    arguments = [[function.tests, function.entry, [before for before, _ in calls], results]]
    seen = shared().call(function.reference + _REPLAY, "finback_run", arguments, limits)
    return seen.reason == "ok" and seen.values == (True,)
