"""Score tests/data/marking.jsonl: do all graders accept right answers and reject wrong ones?

python scripts/marking.py [FILE] [--failures] [--kind KIND]

Each row has a kind, a gold answer, an answer and a person's label. It is graded by the task that RL and exams use, and
by the suite that `finback compare` uses. A right answer counts as paid if both accept it, a wrong one if either does.
"""

import argparse
import ast
import json
import sys
import tempfile
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

from finback.comparison.contestant import Answer, Price
from finback.comparison.judging import judge_answers
from finback.suites import choice as choice_suites
from finback.suites import function_tests
from finback.suites.function_tests import FunctionTests
from finback.suites.problems import ProblemList
from finback.suites.suite import Suite, SuiteSource
from finback.tasks import answers
from finback.tasks.choice import Choice
from finback.tasks.code import Code
from finback.tasks.letters import LETTERS
from finback.tasks.questions import Questions
from finback.tasks.task import Problem, Task, Verdict, canonical

TABLE = Path(__file__).parent.parent / "tests/data/marking.jsonl"


@dataclass(frozen=True)
class Row:
    """An answer, and whether a person labelled it right."""

    kind: str
    gold: str
    answer: str
    right: bool
    note: str = ""
    question: str = ""
    choices: tuple[str, ...] = ()

    @property
    def asked(self) -> str:
        """A question that no other gold answer shares."""
        return self.question or f"{self.kind}: {self.gold} {' '.join(self.choices)}".strip()


@dataclass(frozen=True)
class Mark:
    """A row, and whether each grader accepts it."""

    row: Row
    paid: tuple[bool, ...]

    @property
    def failed(self) -> bool:
        return not all(self.paid) if self.row.right else any(self.paid)


def rows(path: Path = TABLE) -> list[Row]:
    """The rows of a table."""
    found = [json.loads(line) for line in path.read_text(encoding="utf-8").split("\n") if line.strip()]
    return [Row(**{**row, "choices": tuple(row.get("choices", ()))}) for row in found]


def marked(table: Sequence[Row], folder: Path, compared: bool = True) -> list[Mark]:
    """Grades every row by both, or by the task only; writes the files that tasks read to `folder`."""
    ways = {"choice": choices, "code": programs}
    marks = list[Mark]()
    for kind in dict.fromkeys(row.kind for row in table):
        some = [row for row in table if row.kind == kind]
        task, suite = ways.get(kind, mathematics)(some, folder)
        by_key = {problem.question: place for place, problem in enumerate(suite.problems)}
        asked = [(by_key[row.asked], answer(row)) for row in some]
        judged = judge_answers(suite, asked, Price()) if compared else []
        for i, (row, (place, _)) in enumerate(zip(some, asked, strict=True)):
            verdict = task(suite.problems[place], row)
            marks.append(Mark(row, (verdict.correct, *(j.verdict.correct for j in judged[i : i + 1]))))
    return marks


Marking = tuple[Callable[[Problem, Row], Verdict], Suite]


def mathematics(some: Sequence[Row], folder: Path) -> Marking:
    """`Questions` for RL, the judge of GSM8K, MATH-500 and AIME for compare."""
    task = Questions(str(folder / "none.jsonl"))
    found = {row.asked: Problem(row.asked, answers.gold(row.gold)[0], canonical(row.asked)) for row in some}
    return _checked(task), suite(ProblemList("marking", tuple(found.values()), answers.check, waits=True))


def choices(some: Sequence[Row], folder: Path) -> Marking:
    """`Choice` for RL, the judge of MMLU and similar suites for compare; each row has its choices in the order shown."""
    by_question = {row.asked: row for row in some}
    lines = [
        json.dumps({"question": q, "choices": row.choices, "answer": LETTERS.index(row.gold)})
        for q, row in by_question.items()
    ]
    (folder / "choice.jsonl").write_text("\n".join(lines), encoding="utf-8")
    task = Choice(str(folder / "choice.jsonl"), shuffle=False)
    keys = {q: canonical("\n".join([q, *sorted(row.choices)])) for q, row in by_question.items()}
    problems = tuple(Problem(q, row.gold, keys[q]) for q, row in by_question.items())
    shown = {keys[q]: list(row.choices) for q, row in by_question.items()}
    return _checked(task), suite(ProblemList("marking", problems, partial(choice_suites.judge, shown)))


def programs(some: Sequence[Row], folder: Path) -> Marking:
    """`Code` for RL, the judge of HumanEval and MBPP for compare; a program that prints is graded by `Code` only."""
    items = {row.asked: _item(row) for row in some}
    for name in ("entry", "stdin"):
        lines = [json.dumps(item) for item in items.values() if (name == "entry") == ("entry" in item)]
        (folder / f"{name}.jsonl").write_text("\n".join(lines) + "\n", encoding="utf-8")
    tasks = {
        "entry": Code(str(folder / "entry.jsonl"), isolation="monty"),
        "stdin": Code(str(folder / "stdin.jsonl"), isolation="rlimits"),
    }
    problems = tuple(Problem(q, "", f"code: {q}") for q in items)
    functions = {f"code: {q}": _function(item) for q, item in items.items() if "entry" in item}

    def task(problem: Problem, row: Row) -> Verdict:
        kind = "entry" if problem.key in functions else "stdin"
        return tasks[kind].check(problem, row.answer)

    def judge(problem: Problem, text: str) -> Verdict:
        if problem.key not in functions:
            return tasks["stdin"].check(problem, text)
        return function_tests.judge(functions[problem.key], text)

    return task, suite(ProblemList("marking", problems, judge, waits=True))


def suite(task: ProblemList) -> Suite:
    return Suite("marking", task.problems, task, SuiteSource("marking", "MIT", ""))


def answer(row: Row) -> Answer:
    """The row's text as a contestant's whole reply."""
    return Answer("", "marking", row.asked, 0, "", row.answer, True, "stop", None, None, 0.0)


def summary(marks: Sequence[Mark]) -> Iterator[str]:
    """A line for each kind, and one for all."""
    kinds = list(dict.fromkeys(mark.row.kind for mark in marks))
    yield f"{'kind':10} {'right answers paid':>24} {'wrong answers paid':>22}"
    for kind in (*kinds, "all"):
        some = [mark for mark in marks if kind in (mark.row.kind, "all")]
        right, wrong = ([mark for mark in some if mark.row.right is is_right] for is_right in (True, False))
        paid, overpaid = sum(not m.failed for m in right), sum(m.failed for m in wrong)
        yield f"{kind:10} {_share(paid, len(right)):>24} {_share(overpaid, len(wrong)):>22}"


def _share(part: int, of: int) -> str:
    return f"{part}/{of} ({part / of:6.1%})" if of else "none"


def _checked(task: Task) -> Callable[[Problem, Row], Verdict]:
    return lambda problem, row: task.check(problem, row.answer)


def _item(row: Row) -> dict[str, Any]:
    """The gold answer of a row of code: `name(arguments) == value`, or `stdin "text" stdout "text"`."""
    if row.gold.startswith("stdin "):
        given, _, printed = row.gold.removeprefix("stdin ").partition(" stdout ")
        return {"question": row.asked, "tests": [{"stdin": json.loads(given), "stdout": json.loads(printed)}]}
    test = ast.parse(row.gold, mode="eval").body
    assert isinstance(test, ast.Compare) and isinstance(test.left, ast.Call) and isinstance(test.left.func, ast.Name)
    arguments, value = [ast.literal_eval(each) for each in test.left.args], ast.literal_eval(test.comparators[0])
    return {"question": row.asked, "entry": test.left.func.id, "tests": [{"args": arguments, "expected": value}]}


def _function(item: dict[str, Any]) -> FunctionTests:
    """The same test in the form of MBPP."""
    entry, (test,) = item["entry"], item["tests"]
    call = f"{entry}({', '.join(map(repr, test['args']))})"
    reference = f"def {entry}(*values):\n    return {test['expected']!r}\n"
    return FunctionTests("marking", entry, "", reference, f"assert {call} == {test['expected']!r}\n")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("file", nargs="?", type=Path, default=TABLE)
    parser.add_argument("--failures", action="store_true", help="print each row that is graded wrongly")
    parser.add_argument("--kind", help="only rows of this kind")
    options = parser.parse_args()
    table = [row for row in rows(options.file) if options.kind in (None, row.kind)]
    with tempfile.TemporaryDirectory() as folder:
        marks = marked(table, Path(folder))
    if options.failures:
        for mark in marks:
            if mark.failed:
                who = "" if len(set(mark.paid)) == 1 else f" (task and suite: {mark.paid})"
                fault = "right, not paid" if mark.row.right else "wrong, PAID"
                print(f"{mark.row.kind}: {fault}: {mark.row.gold!r} <- {mark.row.answer!r}{who}")
    print("\n".join(summary(marks)))
    sys.exit(any(mark.failed for mark in marks))


if __name__ == "__main__":
    main()
