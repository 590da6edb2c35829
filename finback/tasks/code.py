"""Programming problems, judged by running the program: stdin to stdout, or a function's values. Does not import torch.

The program runs in the sandbox, and the verdict is made outside. The expected results never enter the sandbox, so even a
program that takes over the whole sandbox can do no more than give an answer.
"""

import json
import keyword
import random
from collections.abc import Iterable
from dataclasses import dataclass, field
from functools import lru_cache
from pathlib import Path
from typing import Any, Literal, NoReturn

from finback.config import UserError, check_characters, check_fields, did_you_mean
from finback.tasks.fences import program
from finback.tasks.sandbox import Limits, Outcome, shared
from finback.tasks.task import NO_ANSWER, Problem, Verdict

_LONGEST = 100_000  # characters of an answer; no genuine program is nearly as long
_LINE, _STDIN, _CALL = {"question", "tests", "entry", "solution"}, {"stdin", "stdout"}, {"args", "expected"}


@dataclass(frozen=True)
class _Item:
    """One line of the data: a problem and its tests, all of one kind."""

    problem: Problem
    entry: str | None
    tests: tuple[dict[str, Any], ...]


@dataclass(frozen=True)
class Code:
    """Problems of a JSONL file: `question`, `tests`, and optionally `entry` (name of a function) and `solution`.

    A test is {"stdin": text, "stdout": text} for a program or {"args": [...], "expected": value} for the function.
    A problem's canonical form is its question. The limits apply to each program run; for a function, to all calls together.
    """

    # a JSONL file
    path: str
    # name in tables; default: the file's name
    label: str = ""
    # how programs are isolated from the machine; auto: bubblewrap where it works, else rlimits
    isolation: Literal["auto", "bubblewrap", "rlimits", "monty"] = "auto"
    # limits of time, memory and output
    limits: Limits = field(default_factory=Limits)

    def __post_init__(self) -> None:
        check_fields(self, "code")

    @property
    def name(self) -> str:
        return self.label or f"code-{Path(self.path).stem}"

    def content_files(self) -> dict[str, list[Path]]:
        """The user's files, by the field that names them."""
        return {"path": [Path(self.path)]}

    @property
    def waits(self) -> bool:
        """Checks wait for another process, so several run at a time."""
        return True

    @property
    def problems(self) -> tuple[Problem, ...]:
        """All problems of the file, in order."""
        return tuple(item.problem for item in _load(self.path).values())

    @property
    def all_problems(self) -> tuple[Problem, ...]:
        """The same, under the name that tasks of records use."""
        return self.problems

    def draw(self, rng: random.Random) -> Problem:
        return rng.choice(self.problems)

    def check(self, problem: Problem, answer: str) -> Verdict:
        if len(answer) > _LONGEST:
            return NO_ANSWER
        item, sandbox = _load(self.path)[problem.key], shared(self.isolation)
        source = program(answer, item.entry or "")
        if not source.strip():
            return NO_ANSWER
        if item.entry is not None:
            seen = sandbox.call(source, item.entry, [test["args"] for test in item.tests], self.limits)
            return Verdict(seen.compiled and _are_right(seen, item.tests), seen.compiled)
        return verdict(  # each test in a fresh process
            (seen := sandbox.run(source, test["stdin"], self.limits), _lines(seen.stdout) == _lines(test["stdout"]))
            for test in item.tests
        )


def verdict(runs: Iterable[tuple[Outcome, bool]]) -> Verdict:
    """The verdict on (outcome, whether the result is right) pairs; stops at the first failure."""
    compiled = False
    for seen, is_right in runs:
        compiled = compiled or seen.compiled
        if seen.reason != "ok" or not is_right:
            return Verdict(correct=False, well_formed=compiled)
    return Verdict(correct=True, well_formed=True)


def same(value: Any, expected: Any) -> bool:
    """Equality of JSON values: 2 equals 2.0, true is not a number, and NaN equals nothing."""
    if isinstance(value, bool) or isinstance(expected, bool):
        return value is expected
    if isinstance(expected, list):
        is_list = isinstance(value, list) and len(value) == len(expected)
        return is_list and all(map(same, value, expected))
    if isinstance(expected, dict):
        is_dict = isinstance(value, dict) and value.keys() == expected.keys()
        return is_dict and all(same(value[key], expected[key]) for key in expected)
    return bool(value == expected)


def _are_right(seen: Outcome, tests: tuple[dict[str, Any], ...]) -> bool:
    is_complete = seen.reason == "ok" and len(seen.values) == len(tests)
    return is_complete and all(same(v, test["expected"]) for v, test in zip(seen.values, tests, strict=True))


def _lines(text: str) -> list[str]:
    """Lines without trailing white space, and without blank lines at the end."""
    return [line.rstrip() for line in text.rstrip().split("\n")]


@lru_cache
def _load(path: str) -> dict[str, _Item]:
    """The file's problems by canonical form; cached."""
    items = dict[str, _Item]()
    try:
        text = Path(path).read_text(encoding="utf-8")
    except (OSError, UnicodeDecodeError) as error:
        raise UserError("code.path", path, str(error), "Name a JSONL file in UTF-8.") from None
    for number, line in enumerate(text.split("\n"), start=1):
        if line.strip():
            item = _item(line, f"{path}:{number}")
            if item.problem.key in items:
                _refuse(f"{path}:{number}: question", item.problem.question, "the question occurs twice")
            items[item.problem.key] = item
    if not items:
        raise UserError("code.path", path, "the file has no problems", "Correct the data file.")
    return items


def _item(line: str, where: str) -> _Item:
    try:
        data = json.loads(line, parse_constant=_no_number)
    except (ValueError, RecursionError) as error:
        _refuse(where, line, f"not JSON ({error})")
    if not isinstance(data, dict):
        _refuse(where, data, "not a JSON object")
    check_characters(data, line, where)
    for key in data.keys() - _LINE:
        raise UserError(f"{where}: {key}", _short(data[key]), "no such field", did_you_mean(key, _LINE))
    question, entry, solution = data.get("question"), data.get("entry"), data.get("solution", "")
    if not isinstance(question, str) or not question.strip():
        _refuse(f"{where}: question", question, "expected a text")
    if entry is not None and not (isinstance(entry, str) and entry.isidentifier() and not keyword.iskeyword(entry)):
        _refuse(f"{where}: entry", entry, "expected the name of a function")
    if not isinstance(solution, str):
        _refuse(f"{where}: solution", solution, "expected a text")
    tests = _tests(data.get("tests"), _CALL if entry is not None else _STDIN, where)
    key = "code: " + " ".join(question.split())
    return _Item(Problem(question, solution, key, tags={"source": Path(where).name.rsplit(":", 1)[0]}), entry, tests)


def _tests(tests: Any, keys: set[str], where: str) -> tuple[dict[str, Any], ...]:
    if not isinstance(tests, list) or not tests:
        _refuse(f"{where}: tests", tests, "expected a list of tests")
    for number, test in enumerate(tests):
        at = f"{where}: tests[{number}]"
        if not isinstance(test, dict) or test.keys() != keys:
            kind = "args and expected (with 'entry')" if keys == _CALL else "stdin and stdout (without 'entry')"
            _refuse(at, test, f"a test has the fields {kind}")
        for key in keys - {"expected"}:
            wanted, name = (list, "list") if key == "args" else (str, "text")
            if not isinstance(test[key], wanted):
                _refuse(f"{at}.{key}", test[key], f"expected a {name}")
    return tuple(tests)


def _no_number(text: str) -> NoReturn:
    raise ValueError(f"{text} is not a JSON number")


def _short(value: Any) -> Any:
    return value if len(repr(value)) <= 80 else repr(value)[:80] + "…"


def _refuse(where: str, value: Any, problem: str) -> NoReturn:
    raise UserError(where, _short(value), problem, "Correct the data file.")
