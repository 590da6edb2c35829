"""Judges a function by tests written in Python, without showing them to it and without running it here. Does not import torch.

HumanEval's and MBPP's tests are assertions about a function, so they have to run somewhere as Python. Beside the
program they would not be safe: it could read what is expected, or end the process with success. So there are three
runs, each in a sandbox of its own:

1. The tests run on the reference solution, and every call's arguments and result are written down (once per problem).
2. The program is called with these arguments. What it returns leaves the sandbox as text.
3. The tests run again, on a function that gives back those results, read as Python literals. If the results are the
   reference's own, this run is spared: it would say the same.

What the program can do is give back values, which is all that it is asked for.
"""

import re
from dataclasses import dataclass
from functools import lru_cache

from finback.config import UserError
from finback.tasks.fences import program
from finback.tasks.sandbox import Limits, shared
from finback.tasks.task import NO_ANSWER, Verdict

LIMITS = Limits(wall=10.0, cpu=10.0)
_LONGEST = 100_000  # characters of an answer; no honest program comes near
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
    """A function to be written: its name, what stands before its body, a reference solution and its tests."""

    # of the record, for errors
    where: str
    entry: str
    # source that an answer continues; "" where the answer is all of it
    given: str
    # source that defines the function and all that the tests need
    reference: str
    # statements that raise if `entry` is wrong
    tests: str


def judge(function: FunctionTests, answer: str, limits: Limits = LIMITS) -> Verdict:
    """Whether the program in an answer passes the tests; well-formed if it is Python."""
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
    """The whole program: the answer alone, with what was given before it, or as the rest of what was given."""
    if re.search(rf"^def[ \t]+{entry}\b", text, re.MULTILINE):
        # Imports and helpers were given too; the function itself was left without a body.
        given = f"{given.rstrip()}\n    pass\n\n" if given.strip() else ""
    whole = given + text
    future = "\n".join(_FUTURE.findall(whole))  # must come first
    return f"{future}\n{_FUTURE.sub('', whole)}\n" if future else f"{whole}\n"


@lru_cache(maxsize=4096)
def _recorded(function: FunctionTests) -> tuple[tuple[str, str], ...]:
    """The tests' calls of the reference solution: (arguments, result), as text."""
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
