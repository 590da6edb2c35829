"""Marking by the table of tests/data/marking.jsonl: correct answers earn a reward in any notation, wrong ones never."""

import importlib.util
import json
import sys
import time
from collections import Counter
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest

from finback.comparison.judging import judge_answers
from finback.config import UserError
from finback.suites import choice as choice_suites
from finback.suites import function_tests, mathematics
from finback.suites.function_tests import FunctionTests
from finback.suites.problems import ProblemList
from finback.tasks import answers
from finback.tasks.fences import program
from finback.tasks.letters import named
from finback.tasks.questions import Questions
from finback.tasks.task import Problem

PATH = Path(__file__).parent.parent / "scripts/marking.py"
KINDS = "number unit currency date time latex exact set text choice code".split()  # noqa: SIM905
CITIES = ["London", "Paris", "Rome", "Bern"]


def loaded() -> ModuleType:
    spec = importlib.util.spec_from_file_location("marking", PATH)
    assert spec is not None and spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    sys.modules["marking"] = module
    spec.loader.exec_module(module)
    return module


MARKING = loaded()
TABLE: list[Any] = MARKING.rows()


def test_the_table_is_large_and_a_tenth_of_it_is_hostile() -> None:
    counts = Counter((row.kind, row.right) for row in TABLE)
    assert {kind for kind, _ in counts} == set(KINDS) and len(TABLE) >= 600 and min(counts.values()) >= 30
    assert len({(row.kind, row.gold, row.answer, row.choices) for row in TABLE}) == len(TABLE)
    assert sum(row.note == "adversarial" for row in TABLE) >= len(TABLE) / 10
    assert 0.4 <= sum(row.right for row in TABLE) / len(TABLE) <= 0.5


@pytest.mark.parametrize("kind", KINDS)
def test_right_answers_are_paid_and_wrong_ones_are_not(kind: str, tmp_path: Path) -> None:
    some = [row for row in TABLE if row.kind == kind]
    # every second plainly wrong answer, and a third of the expensive kinds, to save time; the script takes all
    some = [row for i, row in enumerate(some) if row.right or i % 2 or row.note == "adversarial"]
    some = some[:: 3 if kind in ("latex", "set") else 1]
    marks = MARKING.marked(
        some, tmp_path, compared=kind not in ("code", "set")
    )  # a process for each, and the same again
    failed = [(mark.row.gold, mark.row.answer) for mark in marks if mark.failed and mark.row.right]
    paid = [(mark.row.gold, mark.row.answer) for mark in marks if mark.failed and not mark.row.right]
    assert not paid, "wrong answers were rewarded"
    assert len(failed) <= 0.02 * sum(row.right for row in some), failed


def test_compare_runs_the_function_that_was_asked_for() -> None:
    fence, right = "```", "def add(a, b):\n    return a + b"
    function = FunctionTests("?", "add", "", right + "\n", "assert add(2, 3) == 5\n")
    assert function_tests.judge(function, f"{fence}python\n{right}\n{fence}\n\nOutput:\n{fence}\n5\n{fence}").correct
    assert not function_tests.judge(function, f"{fence}python\nprint(5)\n{fence}").correct


@pytest.mark.parametrize(
    ("gold", "read"),
    [
        ("12 or 13", None),
        ("48/2 = 24, 48+24 = 72", None),
        ("12 = 13", None),
        ("twelve or thirteen", None),
        ("\\frac{1}{0}", None),
        ("The answer is 12.", "12"),
        ("There are 12 clips.", "12 clips"),
        ("2√3", "2√3"),
        ("x**2", "x**2"),
        ("12,\\text{cm}", "12,\\text{cm}"),
        ("\\text{east}", "\\text{east}"),
        ("x \\le 5", "x \\le 5"),
        ("2024-05-01", "2024-05-01"),
        (r"\triangle ABC", r"\triangle ABC"),
        (r"\{x \mid x > 2\}", r"\{x \mid x > 2\}"),
        (r"\{n \in \mathbb{Z} : n > 2\}", r"\{n \in \mathbb{Z} : n > 2\}"),
    ],
)
def test_a_gold_passes_by_what_is_read_not_by_its_spelling(gold: str, read: str | None) -> None:
    found, _ = answers.gold(gold)
    assert bool(answers.fault(found)) == (read is None)
    assert read is None or found == read
    if read is not None and gold in ("2√3", "x**2", "The answer is 12."):
        other = {"2√3": "\\sqrt{12}", "x**2": "x \\cdot x", "The answer is 12.": "12.0"}[gold]
        assert answers.check(Problem("?", found, "?"), other).correct


def test_unusable_golds_are_listed(tmp_path: Path) -> None:
    bad = ["12 or 13", "48/2 = 24, 48+24 = 72", "1 or 2"]
    lines = [{"question": f"{i}?", "answer": text} for i, text in enumerate([*bad, *map(str, range(50))])]
    (tmp_path / "a.jsonl").write_text("\n".join(map(json.dumps, lines)))
    with pytest.raises(UserError, match=r"3 of 53 .*:1: '12 or 13'.*:2: '48/2 = 24, 48\+24 = 72'.*:3: '1 or 2'"):
        list(Questions(str(tmp_path / "a.jsonl")).problems())


def test_numbers_of_json_are_golds_too(tmp_path: Path) -> None:
    lines = [{"question": "big", "answer": 1e22}, {"question": "small", "answer": 1e-7}, {"question": "n", "answer": 3}]
    (tmp_path / "a.jsonl").write_text("\n".join(map(json.dumps, lines)))
    task = Questions(str(tmp_path / "a.jsonl"))
    big, small, three = (problem for problem, _ in task.problems())
    assert task.check(big, "10^{22}").correct and task.check(big, "10000000000000000000000").correct
    assert task.check(small, "0.0000001").correct and task.check(small, "10^{-7}").correct
    assert task.check(three, "3.0").correct and not task.check(big, "10^{21}").correct


def test_exams_suites_and_compare_mark_alike() -> None:
    text = "Adding up.\n\nThe answer is **12 cm**."
    problem = Problem("How long?", "12", "how long?")
    suite = MARKING.suite(ProblemList("m", (problem,), answers.check))
    row = MARKING.Row("unit", "12", text, True, question="How long?")
    assert judge_answers(suite, [(0, MARKING.answer(row))], MARKING.Price())[0].verdict.correct
    math_set = mathematics.SETS["gsm8k"]
    assert mathematics.made("m", (problem,), math_set, "?", None, 0).task.check(problem, text).correct
    choices = Problem("Which?", "B", "which?")
    assert choice_suites.judge({"which?": CITIES}, choices, "The correct answer is B.").correct
    assert named("The correct answer is B.", CITIES) == "B"


def test_votes_count_what_is_said_not_how() -> None:
    for same in (
        ["12", "12.0", "$12$", "１２"],
        ["12 hours", "720 minutes"],
        ["Paris", "paris.", "**Paris**"],
        ["½", "0.5"],
    ):
        assert len({answers.spelling(text) for text in same}) == 1
    assert answers.spelling("12 hours") != answers.spelling("12 minutes")


def test_long_hostile_replies_are_read_in_time() -> None:
    start = time.process_time()
    for piece in (
        "answer: ",
        "the answer is ",
        "**a**\n",
        "correct ",
        "#### \n",
        "<answer>",
        "> ",
        "    def f\n",
        "1 or ",
        "\\text{",
    ):
        text = (piece * 100_000)[:99_000]
        assert not answers.check(Problem("?", "12", "?"), text).correct and named(text, CITIES) is None
        program(text, "f")
    assert time.process_time() - start < 60  # CPU time; about one second on an idle machine
