"""LiveCodeBench: dated competition problems, judged by a program's output or a method's results. Does not import torch."""

import base64
import io
import json
import pickle
import re
import zlib
from collections.abc import Mapping
from dataclasses import dataclass
from datetime import date
from functools import partial
from typing import Any

from finback.config import UserError
from finback.suites.hub import KNOWN, digest
from finback.suites.problems import ProblemList, distinct, pick
from finback.suites.suite import Suite, SuiteSource
from finback.tasks.code import same, verdict
from finback.tasks.fences import program
from finback.tasks.records import Record
from finback.tasks.sandbox import Limits, shared
from finback.tasks.task import NO_ANSWER, Problem, Verdict, canonical

# The repository has a script and six files, one per release; the sixth ends in April 2025.
ORIGIN = KNOWN["livecodebench"]
LIMITS = Limits(wall=10.0, cpu=6.0, memory=1 << 30)  # LiveCodeBench gives each test 6 seconds
PROMPT = "{question}\n\nThink first. Then write the whole program in Python, in one ```python block."
EXTRACTION = "the last Python block, or all of the answer"
_PRINTS = "It reads from standard input and prints to standard output."
_METHOD = "Complete this class:\n\n```python\n{starter}\n```"
_LONGEST = 100_000  # most characters of an answer
_LARGEST = 256 << 20  # most bytes of a problem's tests
# Competition sites import these for the contestant's class, so solutions use them without an import.
_BROUGHT = """from typing import *
from collections import *
import bisect, collections, functools, heapq, itertools, math, operator, random, re, string, sys
from bisect import bisect_left, bisect_right
from functools import cache, lru_cache, reduce
from heapq import heapify, heappop, heappush
from itertools import accumulate, combinations, permutations, product
from math import ceil, comb, floor, gcd, inf, log2, sqrt
"""
_CALL = """
def finback_run(*values):
    return Solution().{method}(*values)
"""


@dataclass(frozen=True)
class CodeTests:
    """A problem's tests: (input, expected output), or for a method (arguments, expected value)."""

    # "" for a program that reads standard input and prints
    method: str
    tests: tuple[tuple[Any, Any], ...]


def load(at: str, problems: int | None, seed: int, since: str = "", until: str = "") -> Suite:
    """The problems of release 6, or of `at`; `since` and `until` are dates such as 2024-08-01, both included."""
    first, last = _day("since", since or "0001-01-01"), _day("until", until or "9999-12-31")
    records = [r for r in ORIGIN.records(at) if first <= _contest_date(r) <= last]
    if not records:
        raise UserError("livecodebench", f"{since}..{until}", "no problem in this period", "Widen it.")
    pairs = [_problem(record) for record in records]
    known = {problem.key: judged for problem, judged in reversed(pairs)}
    chosen = pick(distinct(problem for problem, _ in pairs), problems, seed)
    rows = ([p.question, known[p.key].method, known[p.key].tests] for p in chosen)
    days = sorted(str(problem.tags["date"]) for problem in chosen)
    return Suite(
        name="livecodebench",
        problems=chosen,
        task=ProblemList("livecodebench", chosen, partial(judge, known), waits=True),
        source=SuiteSource(ORIGIN.name(at), ORIGIN.licence, digest(rows)),
        prompt=PROMPT,
        extraction=EXTRACTION,
        metric="pass@1",
        chance=0.0,
        notes={"window": f"{days[0]} to {days[-1]}"},
    )


def judge(known: Mapping[str, CodeTests], problem: Problem, answer: str) -> Verdict:
    """Runs all tests in the sandbox; expected values stay outside."""
    judged = known.get(problem.key)
    source = program(answer, "Solution" if judged and judged.method else "") if len(answer) <= _LONGEST else ""
    if judged is None or not source.strip():
        return NO_ANSWER
    if not judged.method:
        runs = ((shared().run(source, given, LIMITS), expected) for given, expected in judged.tests)
        return verdict((seen, _lines(seen.stdout) == _lines(expected)) for seen, expected in runs)
    source = "\n".join((_BROUGHT, source, _CALL.format(method=judged.method)))
    # one process per test, because the limits apply per test
    runs = ((shared().call(source, "finback_run", [given], LIMITS), expected) for given, expected in judged.tests)
    return verdict((seen, len(seen.values) == 1 and same(seen.values[0], expected)) for seen, expected in runs)


def _lines(text: str) -> list[list[str]]:
    """The words of each line, without trailing blank lines."""
    return [line.split() for line in text.rstrip().split("\n")]


def _problem(record: Record) -> tuple[Problem, CodeTests]:
    content, starter = record.text("question_content").strip(), str(record.fields.get("starter_code") or "").strip()
    method = _method(record) if starter else ""
    question = f"{content}\n\n{_METHOD.replace('{starter}', starter) if starter else _PRINTS}"
    raw = [*_tests(record, "public_test_cases"), *_tests(record, "private_test_cases")]
    tests = tuple(_values(record, test) if method else (test["input"], test["output"]) for test in raw)
    if not tests:
        raise UserError(record.where, "private_test_cases", "no tests", "Correct the record.")
    tags: dict[str, int | str] = {"date": _contest_date(record).isoformat()}
    if isinstance(record.fields.get("difficulty"), str):
        tags["difficulty"] = record.fields["difficulty"]
    return Problem(question, "", canonical(question), tags=tags), CodeTests(method, tests)


def _method(record: Record) -> str:
    """The method's name, from the metadata or, failing that, from the starter code."""
    starter = record.text("starter_code").strip()
    metadata = _parsed(record.fields.get("metadata") or {})
    if not isinstance(metadata, dict):
        where = f"{record.where} metadata"
        raise UserError(where, record.fields["metadata"], "not a JSON object", "Correct the record.")
    if not (found := metadata.get("func_name")):
        match = re.search(r"class Solution[^\n]*:\s*def\s+(\w+)", starter)
        found = match[1] if match else ""
    if not isinstance(found, str) or not found.isidentifier():
        raise UserError(f"{record.where} starter_code", starter, "names no method", "Correct the record.")
    return found


def _values(record: Record, test: dict[str, str]) -> tuple[list[Any], Any]:
    """A method's arguments, one JSON value per line, and its expected result."""
    try:
        return [json.loads(line) for line in test["input"].split("\n") if line.strip()], json.loads(test["output"])
    except (ValueError, RecursionError) as error:
        where, problem = f"{record.where} test_cases", f"not JSON ({error})"
        raise UserError(where, test["input"][:60], problem, "Correct the record.") from None


def _tests(record: Record, name: str) -> list[dict[str, str]]:
    """A list of tests, from JSON text or, for private tests, from that text pickled, compressed and encoded in base64."""
    value = record.value(name)
    if isinstance(value, str) and not value.lstrip().startswith("["):
        value = _unpacked(record, name, value)
    tests = _parsed(value)
    right = isinstance(tests, list) and all(
        isinstance(t, dict) and isinstance(t.get("input"), str) and isinstance(t.get("output"), str) for t in tests
    )
    if not right:
        problem = "not a list of tests with input and output"
        raise UserError(f"{record.where} {name}", str(value)[:60], problem, "Correct the record.")
    return list(tests)


class _Plain(pickle.Unpickler):
    """Unpickles only plain values: a pickle that names a class or function is refused, so that it cannot run code."""

    def find_class(self, module: str, name: str) -> Any:
        raise pickle.UnpicklingError(f"the pickle names {module}.{name}")


def _unpacked(record: Record, name: str, value: str) -> Any:
    try:
        unpacker = zlib.decompressobj()
        raw = unpacker.decompress(base64.b64decode(value, validate=True), _LARGEST)
        if unpacker.unconsumed_tail:
            raise ValueError(f"more than {_LARGEST >> 20} MiB")
        return _Plain(io.BytesIO(raw)).load()
    except (ValueError, LookupError, EOFError, AttributeError, TypeError, zlib.error, pickle.UnpicklingError) as error:
        problem = f"not base64 of a compressed pickled text ({error})"
        raise UserError(f"{record.where} {name}", value[:60], problem, "Use the unchanged file from the hub.") from None


def _parsed(value: Any) -> Any:
    """The value of a JSON text; anything else is returned unchanged."""
    try:
        return json.loads(value) if isinstance(value, str) else value
    except (ValueError, RecursionError):
        return value


def _contest_date(record: Record) -> date:
    """The date of the contest; the hub's files have the form 2024-08-17T00:00:00."""
    return _day(f"{record.where} contest_date", str(record.fields.get("contest_date", ""))[:10])


def _day(name: str, value: str) -> date:
    try:
        return date.fromisoformat(value)
    except ValueError:
        raise UserError(name, value, "not a date", "Write it like 2024-08-01.") from None
